import functools
import importlib
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from tests.kernels.compare import (
    DTYPES,
    SHAPES,
    assert_bitwise_equal,
    assert_two_references,
    misaligned,
    poisoned,
    strided_rows,
)
from umedtrain.kernels.offline.sanitizer import watch
from umedtrain.kernels.swiglu import swiglu, swiglu_down

IMPLS = ("torch", "triton")
module = importlib.import_module("umedtrain.kernels.swiglu")  # the package's attribute is the function


def inputs(rows, columns, dtype, width=5):
    """gate, up, the down projection, and the gradients that arrive at h and behind the projection."""
    gate, up, dh = (torch.randn(rows, columns).to(dtype) for _ in range(3))
    weight = (torch.randn(width, columns) * columns**-0.5).to(dtype)
    return [2 * gate, up, weight], dh, torch.randn(rows, width).to(dtype)


def formula(gate, up):
    return F.silu(gate) * up


def results(function, tensors, gradient, **options):
    """Output and gradients."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    output = function(*leaves, **options)
    output.backward(gradient)
    return [output.detach()] + [x.grad for x in leaves]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_is_the_formula(rows, columns, dtype, impl):
    (gate, up, _), dh, _ = inputs(rows, columns, dtype)
    with poisoned():
        got = results(swiglu, (gate, up), dh, impl=impl)
    exact = results(formula, (gate.double(), up.double()), dh.double())
    for mine, want, same in zip(got, exact, results(formula, (gate, up), dh), strict=True):
        assert_two_references(mine, want, same)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_hf_casting_is_that_of_transformers(dtype, impl):
    """silu and the product, each rounded: what `act_fn(gate) * up` is in LlamaMLP."""
    from transformers.activations import ACT2FN

    (gate, up, weight), dh, dy = inputs(4, 300, dtype)
    want = ACT2FN["silu"](gate) * up
    if impl == "torch":
        assert_bitwise_equal(swiglu(gate, up, casting="hf", impl=impl), want)
    # exp2 is not the exp of PyTorch: one fp32 ulp may be one rounding of silu, of few elements.
    different = swiglu(gate, up, casting="hf", impl=impl) != want
    assert dtype == torch.float32 or different.sum() <= 2
    if dtype != torch.float32:
        assert (swiglu(gate, up, impl=impl) != want).sum() > 100
    one_cast, two_casts = (results(swiglu, (gate, up), dh, casting=casting, impl=impl) for casting in ("fp32", "hf"))
    for first, second in zip(one_cast[1:], two_casts[1:], strict=True):
        assert_bitwise_equal(first, second)
    h = swiglu(gate, up, casting="hf", impl=impl)
    got = results(swiglu_down, (gate, up, weight), dy, casting="hf", impl=impl)
    assert_bitwise_equal(got[0], h @ weight.T)
    assert_bitwise_equal(got[3], dy.T @ h)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_down_is_linear_of_swiglu(dtype, impl):
    """Bit for bit, although it does not keep the product."""
    tensors, _, dy = inputs(6, 130, dtype)
    with poisoned():
        got = results(swiglu_down, tensors, dy, impl=impl)
    want = results(lambda gate, up, weight: F.linear(swiglu(gate, up, impl=impl), weight), tensors, dy)
    for first, second in zip(got, want, strict=True):
        assert_bitwise_equal(first, second)


def test_down_keeps_gate_up_and_weight_only():
    def kept(function):
        (gate, up, weight), _, _ = inputs(8, 64, torch.float32)
        tensors = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: tensors.append(x) or x, lambda x: x):
            function(*(x.requires_grad_() for x in (gate, up, weight)))
        return sum(x.numel() for x in {x.data_ptr(): x for x in tensors}.values())

    with_product = kept(lambda gate, up, weight: F.linear(swiglu(gate, up, impl="triton"), weight))
    assert kept(functools.partial(swiglu_down, impl="triton")) == 2 * 8 * 64 + 5 * 64 == with_product - 8 * 64


@pytest.mark.parametrize("impl", IMPLS)
def test_extreme_gates(impl):
    gate = torch.tensor([[-1e4, -100.0, -30.0, -0.0, 0.0, 30.0, 100.0, 1e4]])
    up, dh = torch.full_like(gate, 3.0), torch.full_like(gate, -2.0)
    got = results(swiglu, (gate, up), dh, impl=impl)
    for mine, want in zip(got, results(formula, (gate.double(), up.double()), dh.double()), strict=True):
        assert mine.isfinite().all()
        torch.testing.assert_close(mine.double(), want, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_and_misaligned_tensors_and_leading_shapes(impl):
    tensors, _, dy = inputs(6, 67, torch.bfloat16, width=7)
    want = results(swiglu_down, tensors, dy, impl=impl)
    for change in (strided_rows, misaligned, lambda x: x.t().contiguous().t()):
        changed = [change(x) for x in tensors[:2]] + [tensors[2]]
        for first, second in zip(results(swiglu_down, changed, dy, impl=impl), want, strict=True):
            assert_bitwise_equal(first, second)
    deep = [x.view(2, 3, 67) for x in tensors[:2]] + [tensors[2]]
    for first, second in zip(results(swiglu_down, deep, dy.view(2, 3, 7), impl=impl), want, strict=True):
        assert_bitwise_equal(first.view(second.shape), second)

    gate, up, _ = tensors
    want = results(swiglu, (gate, up), torch.ones_like(gate), impl=impl)
    both = torch.cat((gate, up), 1).requires_grad_()
    h = swiglu(*both.chunk(2, 1), impl=impl)
    h.sum().backward()  # an expanded gradient
    assert_bitwise_equal(h.detach(), want[0])
    assert_bitwise_equal(both.grad, torch.cat(want[1:], 1))
    assert swiglu(gate[0], up[0], impl=impl).shape == (67,)


@pytest.mark.parametrize("impl", IMPLS)
def test_zero_rows(impl):
    tensors, dh, dy = inputs(0, 12, torch.bfloat16)
    assert all(x.shape == (0, 12) for x in results(swiglu, tensors[:2], dh, impl=impl))
    y, dgate, _, dweight = results(swiglu_down, tensors, dy, impl=impl)
    assert y.shape == (0, 5)
    assert dgate.shape == (0, 12)
    assert_bitwise_equal(dweight, torch.zeros(5, 12, dtype=torch.bfloat16))


def test_tiles_and_repetition_do_not_change_bits():
    tensors, _, dy = inputs(3, 200, torch.bfloat16)
    want = results(swiglu_down, tensors, dy, impl="triton")
    for tile_bytes in (64, 256, 2048):
        with mock.patch.object(module, "CONFIG", {"default": ((module.ANY, (tile_bytes, {})),)}):
            for first, second in zip(results(swiglu_down, tensors, dy, impl="triton"), want, strict=True):
                assert_bitwise_equal(first, second)
    for first, second in zip(results(swiglu_down, tensors, dy, impl="torch"), want, strict=True):
        torch.testing.assert_close(first, second)


def test_traffic_and_races():
    (gate, up, weight), dh, dy = inputs(5, 300, torch.bfloat16)
    once = 5 * 300 * 2
    with watch() as watched:
        results(swiglu, (gate, up), dh, impl="triton")
        results(swiglu_down, (gate, up, weight), dy, impl="triton")
    tensors = [
        (x.loaded / once, x.unique_loaded / once, x.stored / once, x.unique_stored / once) for x in watched.launches
    ]
    assert tensors == [(2, 2, 1, 1), (3, 3, 2, 2), (2, 2, 1, 1), (3, 3, 3, 3)]


X, W = torch.zeros(2, 4), torch.zeros(3, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: swiglu(X.long(), X), r"gate_TF is int64 \[2, 4\] on cpu; it must be fp32, bf16 or fp16"),
        (lambda: swiglu(X[:, :0], X[:, :0]), "F >= 1"),
        (lambda: swiglu(X, X[:1]), r"up_TF is float32 \[1, 4\] on cpu; it must be float32 \[2, 4\] on cpu"),
        (lambda: swiglu(X, X.half()), "up_TF is float16"),
        (lambda: swiglu(X, X, casting="bf16"), "casting is 'bf16'"),
        (lambda: swiglu(X, X, impl="cuda"), "impl is 'cuda'"),
        (
            lambda: swiglu_down(X, X, W[:, :2]),
            r"down_weight_DF is float32 \[3, 2\] on cpu; it must be float32 \[D, 4\]",
        ),
        (lambda: swiglu_down(X, X, W[0]), "down_weight_DF is"),
        (lambda: swiglu_down(X, X, W.half()), "down_weight_DF is float16"),
        (lambda: swiglu_down(X, X[:1], W), "up_TF is"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_opcheck():
    ops = torch.ops.umedtrain
    (gate, up, weight), dh, _ = inputs(3, 20, torch.float32)
    for triton in (True, False):
        torch.library.opcheck(ops.swiglu_backward.default, (dh, gate, up, triton, not triton, triton))
    leaves = [x.requires_grad_() for x in (gate, up, weight)]
    for triton in (True, False):
        torch.library.opcheck(ops.swiglu.default, (*leaves[:2], False, triton))
        torch.library.opcheck(ops.swiglu_down.default, (*leaves, True, triton))


def mlp(gate, up, weight):
    h = swiglu(gate, up, casting="hf", impl="triton")
    return swiglu_down(h, up, weight, impl="triton")


def test_compiles_into_one_graph():
    tensors, _, dy = inputs(3, 20, torch.bfloat16)
    torch._dynamo.reset()
    compiled = results(torch.compile(mlp, fullgraph=True, backend="aot_eager"), tensors, dy)
    for first, second in zip(compiled, results(mlp, tensors, dy), strict=True):
        assert_bitwise_equal(first, second)


def test_selective_checkpointing():
    tensors, _, dy = inputs(3, 20, torch.bfloat16)
    calls = []

    def policy(ctx, op, *args, **kwargs):
        calls.append(op)
        saved = op == torch.ops.umedtrain.swiglu.default
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)

    def recomputed(*leaves):
        return checkpoint(mlp, *leaves, use_reentrant=False, context_fn=contexts)

    got = results(recomputed, tensors, dy)
    assert torch.ops.umedtrain.swiglu.default in calls
    for first, second in zip(got, results(mlp, tensors, dy), strict=True):
        assert_bitwise_equal(first, second)
