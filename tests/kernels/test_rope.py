import functools
import importlib
import itertools
from unittest import mock

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from tests.kernels.compare import (
    DTYPES,
    assert_bitwise_equal,
    assert_two_references,
    misaligned,
    poisoned,
    strided_rows,
)
from umedtrain.kernels.offline.sanitizer import watch
from umedtrain.kernels.rope import rope, rope_frequencies, rope_tables

IMPLS = ("torch", "triton")
module = importlib.import_module("umedtrain.kernels.rope")  # the package's attribute is the function
SHAPES = ((1, 1, 1, 2), (3, 3, 1, 10), (5, 7, 2, 96), (2, 17, 3, 128), (2, 5, 5, 1024))
"""Tokens, query heads, key heads, head dimension."""


def inputs(tokens, heads, kv_heads, head_dim, dtype):
    """q and k, their tables, and the gradients that arrive."""
    positions_T = torch.randint(0, 131072, (tokens,))
    q, k = torch.randn(tokens, heads, head_dim).to(dtype), torch.randn(tokens, kv_heads, head_dim).to(dtype)
    tables = rope_tables(rope_frequencies(head_dim, 500000.0), positions_T)
    return [q, k], tables, [torch.randn_like(q), torch.randn_like(k)]


def formula(q, k, cos, sin):
    """In the type of its arguments."""

    def rotated(x):
        left, right = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
        c, s = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
        return torch.cat((left * c - right * s, left * s + right * c), -1)

    return rotated(q), rotated(k)


def results(function, tensors, tables, gradients, **options):
    """Outputs and gradients of q and k."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    outputs = function(*leaves, *tables, **options)
    torch.autograd.backward(outputs, gradients)
    return [y.detach() for y in outputs] + [x.grad for x in leaves]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_is_the_formula(shape, dtype, impl):
    tensors, tables, gradients = inputs(*shape, dtype)
    with poisoned():
        got = results(rope, tensors, tables, gradients, impl=impl)
    wide = ([x.double() for x in xs] for xs in (tensors, tables, gradients))
    exact, same = results(formula, *wide), results(formula, tensors, tables, gradients)
    for mine, want, torchs in zip(got, exact, same, strict=True):
        assert_two_references(mine, want, torchs)


def test_is_that_of_transformers():
    """In fp32, where both round once for each operation: bit for bit."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    scaled = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    ours = {"factor": 32.0, "original_max_position": 8192}
    for parameters, options in ((scaled, ours), ({"rope_type": "default", "rope_theta": 10000.0}, {})):
        config = LlamaConfig(
            hidden_size=512, num_attention_heads=4, rope_parameters=parameters, max_position_embeddings=131072
        )
        theirs = LlamaRotaryEmbedding(config)
        frequencies = rope_frequencies(128, parameters["rope_theta"], **options)
        assert_bitwise_equal(frequencies, theirs.inv_freq)
        positions = torch.tensor([0, 1, 5, 8191, 131071])
        (q, k), _, _ = inputs(5, 4, 2, 128, torch.float32)
        cos, sin = theirs(q, positions[None])
        want = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
        for impl in IMPLS:
            got = rope(q, k, *rope_tables(frequencies, positions), impl=impl)
            for mine, their in zip(got, want, strict=True):
                assert_bitwise_equal(mine, their[0].transpose(0, 1))


def test_tables_are_right_at_large_positions():
    frequencies = rope_frequencies(128, 500000.0)
    positions = torch.cat((torch.arange(200), torch.arange(131072 - 200, 131073)))
    angles = (positions[:, None].float() * frequencies).double()  # the product is rounded to fp32; its sine is not
    for table, exact in zip(rope_tables(frequencies, positions), (angles.cos(), angles.sin()), strict=True):
        assert table.dtype == torch.float32
        assert (table.double() - exact).abs().max() < 1e-6


def test_scaled_frequencies():
    """Few turns over the original context: slower by the factor; many: kept; between: monotonously in between."""
    plain = rope_frequencies(128, 500000.0)
    scaled = rope_frequencies(128, 500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
    turns = plain * 8192 / (2 * torch.pi)
    torch.testing.assert_close(scaled[turns < 1], plain[turns < 1] / 8)
    assert torch.equal(scaled[turns > 4], plain[turns > 4])
    ratio = (scaled / plain)[(turns > 1) & (turns < 4)]
    assert len(ratio) > 3
    assert (ratio.diff() < 0).all()
    assert ((ratio > 1 / 8) & (ratio < 1)).all()


def test_products_depend_on_the_distance_only():
    q, k = torch.randn(1, 1, 64, dtype=torch.float32), torch.randn(1, 1, 64, dtype=torch.float32)
    frequencies = rope_frequencies(64, 10000.0)

    def product(q_position, k_position):
        (rotated_q, _), (_, rotated_k) = (
            rope(q, k, *rope_tables(frequencies, torch.tensor([position])), impl="triton")
            for position in (q_position, k_position)
        )
        return (rotated_q * rotated_k).sum()

    torch.testing.assert_close(product(40, 33), product(7, 0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_and_misaligned_tensors(impl):
    tensors, tables, gradients = inputs(4, 6, 2, 20, torch.bfloat16)
    want = results(rope, tensors, tables, gradients, impl=impl)

    def transposed(x):
        return x.transpose(0, 1).contiguous().transpose(0, 1) if x.ndim == 3 else x.t().contiguous().t()

    for change in (strided_rows, misaligned, transposed):
        changed = ([change(x) for x in xs] for xs in (tensors, tables, gradients))
        for first, second in zip(results(rope, *changed, impl=impl), want, strict=True):
            assert_bitwise_equal(first, second)

    fused = torch.cat((*tensors, torch.full((4, 2, 20), float("nan"), dtype=torch.bfloat16)), 1)
    for first, second in zip(rope(*fused.split((6, 2, 2), 1)[:2], *tables, impl=impl), want[:2], strict=True):
        assert_bitwise_equal(first, second)


@pytest.mark.parametrize("impl", IMPLS)
def test_gradient_of_one_output(impl):
    (q, k), tables, (dq, _) = inputs(3, 2, 1, 8, torch.float32)
    q, k = q.requires_grad_(), k.requires_grad_()
    rope(q, k, *tables, impl=impl)[0].backward(dq)
    assert_bitwise_equal(q.grad, rope(dq, k, tables[0], -tables[1], impl=impl)[0])
    assert k.grad is None or not k.grad.any()


@pytest.mark.parametrize("impl", IMPLS)
def test_zero_tokens_and_bf16_tables(impl):
    tensors, tables, gradients = inputs(0, 4, 2, 8, torch.bfloat16)
    assert [x.shape[0] for x in results(rope, tensors, tables, gradients, impl=impl)] == [0] * 4
    tensors, tables, gradients = inputs(3, 4, 2, 8, torch.bfloat16)
    rounded = [x.bfloat16() for x in tables]
    want = results(rope, tensors, [x.float() for x in rounded], gradients, impl=impl)
    for first, second in zip(results(rope, tensors, rounded, gradients, impl=impl), want, strict=True):
        assert_bitwise_equal(first, second)


def test_blocks_and_repetition_do_not_change_bits():
    tensors, tables, gradients = inputs(3, 9, 2, 24, torch.bfloat16)
    want = results(rope, tensors, tables, gradients, impl="triton")
    for values in (16, 64, 512):
        with mock.patch.object(module, "CONFIG", {"default": ((512, (values, {})),)}):
            for first, second in zip(results(rope, tensors, tables, gradients, impl="triton"), want, strict=True):
                assert_bitwise_equal(first, second)
    for first, second in zip(results(rope, tensors, tables, gradients, impl="torch"), want, strict=True):
        assert_bitwise_equal(first, second)


def test_traffic_and_races():
    tensors, tables, gradients = inputs(6, 9, 2, 20, torch.bfloat16)
    with watch() as watched:
        results(rope, tensors, tables, gradients, impl="triton")
    assert len(watched.launches) == 2
    for launch in watched.launches:
        assert launch.loaded == launch.unique_loaded == 6 * 11 * 20 * 2 + 6 * 20 * 4
        assert launch.stored == launch.unique_stored == 6 * 11 * 20 * 2


Q, T = torch.zeros(2, 3, 8), torch.zeros(2, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rope(Q[0], Q, T, T), r"q_THK is float32 \[3, 8\] on cpu; it must be .* \[T, H, K\]"),
        (lambda: rope(Q.long(), Q, T, T), "q_THK is int64"),
        (lambda: rope(Q[..., :7], Q, T, T), "K must be even and at most 1024"),
        (lambda: rope(torch.zeros(2, 1, 1026), Q, T, T), "K must be even and at most 1024"),
        (lambda: rope(Q, Q[:1], T, T), r"k_TGK is float32 \[1, 3, 8\]"),
        (lambda: rope(Q, Q.half(), T, T), "k_TGK is float16"),
        (lambda: rope(Q, Q[..., :6], T, T), "k_TGK is"),
        (lambda: rope(Q, Q, T[:, :3], T), r"cos_TF is float32 \[2, 3\] on cpu; it must be fp32 \[2, 4\]"),
        (lambda: rope(Q, Q, T, T[:1]), "sin_TF is"),
        (lambda: rope(Q, Q, T, T.long()), "sin_TF is int64"),
        (lambda: rope_tables(torch.zeros(4, dtype=torch.float16), torch.arange(2)), "frequencies_F is float16"),
        (lambda: rope_tables(torch.zeros(4), torch.zeros(2)), "positions_T is float32"),
        (lambda: rope_frequencies(7, 1e4), "head_dim is 7; it must be even"),
        (lambda: rope_frequencies(8, 0.0), "theta is 0.0"),
        (lambda: rope_frequencies(8, 1e4, factor=0.0), "factor is 0.0"),
        (lambda: rope_frequencies(8, 1e4, factor=8.0, high_freq_factor=1.0), "high_freq_factor is 1.0"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_opcheck():
    (q, k), (cos, sin), _ = inputs(3, 2, 1, 8, torch.float32)
    for triton, inverse in itertools.product((True, False), (True, False)):
        args = (q.clone().requires_grad_(), k.clone().requires_grad_(), cos, sin, inverse, triton)
        torch.library.opcheck(torch.ops.umedtrain.rope.default, args)


def rotate_twice(q, k, cos, sin):
    return rope(*rope(q, k, cos, sin, impl="triton"), cos, sin, impl="triton")


def test_compiles_into_one_graph():
    args = inputs(3, 4, 2, 16, torch.bfloat16)
    torch._dynamo.reset()
    compiled = results(torch.compile(rotate_twice, fullgraph=True, backend="aot_eager"), *args)
    for first, second in zip(compiled, results(rotate_twice, *args), strict=True):
        assert_bitwise_equal(first, second)


def test_selective_checkpointing():
    args = inputs(3, 4, 2, 16, torch.bfloat16)
    calls = []

    def policy(ctx, op, *args, **kwargs):
        calls.append(op)
        saved = op == torch.ops.umedtrain.rope.default
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)

    def recomputed(*leaves):
        return checkpoint(rotate_twice, *leaves, use_reentrant=False, context_fn=contexts)

    got = results(recomputed, *args)
    assert torch.ops.umedtrain.rope.default in calls
    for first, second in zip(got, results(rotate_twice, *args), strict=True):
        assert_bitwise_equal(first, second)
