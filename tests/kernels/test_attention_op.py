"""Attention under PyTorch's tracers and checkpointing, and what it refuses."""

import functools
import importlib
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from tests.kernels.attention_reference import random_inputs, run, small_blocks
from tests.kernels.compare import assert_bitwise_equal
from umedtrain.kernels.attention import attention, attention_plan

MODULE = importlib.import_module("umedtrain.kernels.attention")  # the package has the function under this name
IMPLS = ("torch", "triton")
NAMES = ("out", "dq", "dk", "dv")
LENGTHS, PARENTS = (9, 5), (None, 0)


def run_plan(plan, inputs, impl, function=attention):
    return run(lambda q, k, v: function(q, k, v, plan, impl=impl), *inputs)


def assert_same(first, second):
    for name, a, b in zip(NAMES, first, second, strict=True):
        assert_bitwise_equal(a, b, name)


@pytest.mark.parametrize("impl", IMPLS)
def test_operators_pass_opcheck(impl):
    plan = attention_plan(LENGTHS, PARENTS)
    q, k, v, do = random_inputs(14)
    tail = (*plan.tables, 0.25, impl == "triton")
    inputs = [x.requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(torch.ops.umedtrain.attention.default, (*inputs, *tail))
    out, lse = torch.ops.umedtrain.attention(*inputs, *tail)
    assert lse.shape == (2, 14 if impl == "triton" else 0)
    saved = [x.detach() for x in (do, *inputs, out, lse)]
    torch.library.opcheck(torch.ops.umedtrain.attention_backward.default, (*saved, *tail))


@pytest.mark.parametrize(("impl", "backend"), (("torch", "inductor"), ("triton", "aot_eager")))
def test_compiles_as_one_graph_for_all_layouts(impl, backend):
    torch.compiler.reset()
    compiled = torch.compile(attention, fullgraph=True, backend=backend)
    with small_blocks(16):
        for lengths, parents in ((LENGTHS, PARENTS), ((3, 8, 6), (None, 0, 0)), ((20,), (None,))):
            plan = attention_plan(lengths, parents)
            inputs = random_inputs(sum(lengths))
            assert_same(run_plan(plan, inputs, impl, compiled), run_plan(plan, inputs, impl))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("keep", (True, False))
def test_checkpointing(impl, keep):
    """An operator that the policy keeps runs once, any other again in the backward."""
    plan = attention_plan(LENGTHS, PARENTS)
    inputs = random_inputs(14)

    def policy(context, op, *args, **kwargs):
        kept = keep and op == torch.ops.umedtrain.attention.default
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    def checkpointed(q, k, v, plan, impl):
        contexts = functools.partial(create_selective_checkpoint_contexts, policy)
        return checkpoint(attention, q, k, v, plan, impl=impl, use_reentrant=False, context_fn=contexts)

    name = "launch_forward" if impl == "triton" else "torch_forward"
    with small_blocks(16):
        expected = run_plan(plan, inputs, impl)
        with mock.patch.object(MODULE, name, wraps=getattr(MODULE, name)) as forward:
            assert_same(run_plan(plan, inputs, impl, checkpointed), expected)
    assert forward.call_count == (1 if keep else 2)


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_for_some_inputs_only(impl):
    plan = attention_plan(LENGTHS, PARENTS)
    q, k, v, do = random_inputs(14)
    with small_blocks(16):
        _, _, _, dv = run_plan(plan, (q, k, v, do), impl)
        out = attention(q, k, v.requires_grad_(), plan, impl=impl)
        out.backward(do)
    assert_bitwise_equal(v.grad, dv)
    assert q.grad is None


@pytest.mark.parametrize("impl", IMPLS)
def test_fake_tensors_keep_shapes_and_types(impl):
    with FakeTensorMode():
        plan = attention_plan(LENGTHS, PARENTS)
        q, k, v, do = random_inputs(14, dtype=torch.bfloat16)
        for real, fake in zip((q, q, k, v), run_plan(plan, (q, k, v, do), impl), strict=True):
            assert (fake.shape, fake.dtype) == (real.shape, real.dtype)


def bad(**changes):
    q, k, v, _ = random_inputs(14)
    return {"q_THK": q, "k_TGK": k, "v_TGK": v, "plan": attention_plan(LENGTHS, PARENTS), **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    (
        (
            {"q_THK": torch.randn(14, 2)},
            r"q_THK is float32 \[14, 2\] on cpu; it must be fp32, bf16 or fp16 \[T, H, K\]",
        ),
        ({"q_THK": torch.randn(14, 2, 257)}, "K from 1 to 256"),
        ({"q_THK": torch.ones(14, 2, 16, dtype=torch.int32)}, "q_THK is int32"),
        ({"q_THK": torch.randn(13, 2, 16)}, "q_THK has 13 tokens; it must have the plan's 14"),
        ({"k_TGK": torch.randn(14, 1, 8)}, r"k_TGK is float32 \[14, 1, 8\] on cpu; it must be like q_THK"),
        ({"k_TGK": torch.randn(14, 1, 16).half()}, "k_TGK is float16"),
        ({"v_TGK": torch.randn(12, 1, 16)}, r"v_TGK is float32 \[12, 1, 16\]"),
        ({"v_TGK": torch.randn(14, 2, 16)}, "v_TGK has 2 heads; it must have k_TGK's 1"),
        (
            {"q_THK": torch.randn(14, 3, 16), "k_TGK": torch.randn(14, 2, 16), "v_TGK": torch.randn(14, 2, 16)},
            "multiple",
        ),
        ({"k_TGK": torch.randn(14, 0, 16), "v_TGK": torch.randn(14, 0, 16)}, "k_TGK has 0 heads"),
        ({"plan": attention_plan(LENGTHS, device="meta")}, "plan is on meta; it must be on q_THK's device, cpu"),
        ({"scale": 0.0}, "scale is 0.0; it must be positive and finite"),
        ({"scale": float("inf")}, "scale is inf"),
        ({"impl": "cuda"}, "impl is 'cuda'"),
    ),
)
def test_wrong_arguments_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        attention(**bad(**changes))


def test_float64_is_for_the_twin():
    inputs = [x.double() for x in random_inputs(14)[:3]]
    assert attention(*inputs, attention_plan(LENGTHS, PARENTS)).dtype == torch.float64
    with pytest.raises(ValueError, match="q_THK is float64"):
        attention(*inputs, attention_plan(LENGTHS, PARENTS), impl="triton")
