import functools
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
from umedtrain.kernels import norm
from umedtrain.kernels.norm import add_rms_norm, rms_norm
from umedtrain.kernels.offline.sanitizer import watch

EPS = 0.05
IMPLS = ("torch", "triton")
BF16, FP32 = torch.bfloat16, torch.float32


def inputs(rows, columns, dtype, weight_dtype=None):
    """x, residual, weight, and the gradients that arrive at y and at the sum: no two rows alike."""
    x, residual, dy, dsum = (torch.randn(rows, columns).to(dtype) for _ in range(4))
    weight = (1 + 0.3 * torch.randn(columns)).to(weight_dtype or dtype)
    return [x, residual, weight], [dy, dsum]


def alone(x, residual, weight, **options):
    return (rms_norm(x, weight, EPS, **options),)


def added(x, residual, weight, **options):
    return add_rms_norm(x, residual, weight, EPS, **options)


def torch_alone(x, residual, weight):
    return (F.rms_norm(x, x.shape[-1:], weight, EPS),)


def torch_added(x, residual, weight):
    return F.rms_norm(x + residual, x.shape[-1:], weight, EPS), x + residual


PAIRS = {"alone": (alone, torch_alone), "added": (added, torch_added)}


def results(function, tensors, gradients, **options):
    """Outputs, then the gradients of x, (residual) and weight."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    outputs = function(*leaves, **options)
    torch.autograd.backward(outputs, [g.to(y.dtype) for g, y in zip(gradients, outputs, strict=False)])
    return [y.detach() for y in outputs] + [x.grad for x in leaves if x.grad is not None]


def assert_right(ours, tensors, gradients, reference, **rule):
    exact = results(reference, [x.double() for x in tensors], [g.double() for g in gradients])
    same = results(reference, tensors, gradients)
    assert len(ours) == len(exact)
    for i, (mine, want, torchs) in enumerate(zip(ours, exact, same, strict=True)):
        assert_two_references(mine, want, torchs, name=f"result {i}", **rule)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_is_the_formula(rows, columns, dtype, kind, impl):
    ours, reference = PAIRS[kind]
    tensors, gradients = inputs(rows, columns, dtype)
    with poisoned():
        got = results(ours, tensors, gradients, impl=impl)
    # With one column dh is a small difference of large numbers.
    assert_right(got, tensors, gradients, reference, fp32_relative=1e-6 if columns > 1 else 1e-5)


@pytest.mark.parametrize("kind", PAIRS)
def test_many_rows_for_each_program(kind):
    """The grid of a GPU with one multiprocessor: the loop turns, and the partial sums of dw are added."""
    ours, reference = PAIRS[kind]
    tensors, gradients = inputs(37, 96, FP32)
    large = results(ours, tensors, gradients, impl="triton")
    with mock.patch.object(norm, "_processors", return_value=1), poisoned():
        small = results(ours, tensors, gradients, impl="triton")
        again = results(ours, tensors, gradients, impl="triton")
    assert_right(small, tensors, gradients, reference)
    for first, second in zip(small, again, strict=True):
        assert_bitwise_equal(first, second)
    for first, second in zip(small[:-1], large[:-1], strict=True):
        assert_bitwise_equal(first, second)  # all but dw, whose order of addition follows the grid


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("columns", (33, 250))
def test_rows_too_wide_for_the_registers(kind, columns):
    ours, reference = PAIRS[kind]
    tensors, gradients = inputs(9, columns, FP32)
    narrow = {"WIDEST_FORWARD": 32, "WIDEST_BACKWARD": 32, "WIDEST_BACKWARD_ODD": 32, "TILE": 64}
    with mock.patch.multiple(norm, **narrow, _processors=lambda device: 2), poisoned():
        got = results(ours, tensors, gradients, impl="triton")
    assert_right(got, tensors, gradients, reference)
    for first, second in zip(got, results(ours, tensors, gradients, impl="triton"), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-6)


def test_wider_than_any_program():
    columns = norm.WIDEST_FORWARD + 16
    tensors, gradients = inputs(1, columns, BF16)
    with mock.patch.object(norm, "_processors", return_value=1), poisoned():
        got = results(alone, tensors, gradients, impl="triton")
    assert_right(got, tensors, gradients, torch_alone)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", PAIRS)
def test_fp32_weight_of_bf16_rows(kind, impl):
    ours, reference = PAIRS[kind]
    tensors, gradients = inputs(5, 200, BF16, FP32)
    got = results(ours, tensors, gradients, impl=impl)
    assert [x.dtype for x in got[-2:]] == [BF16, FP32]
    assert all(x.dtype == BF16 for x in got[:-1])

    def in_fp32(x, residual, weight):
        if kind == "alone":
            return (reference(x.float(), None, weight)[0].to(x.dtype),)
        total = x + residual
        return torch_alone(total.float(), None, weight)[0].to(x.dtype), total

    exact = results(reference, [x.double() for x in tensors], [g.double() for g in gradients])
    for mine, want, same in zip(got, exact, results(in_fp32, tensors, gradients), strict=True):
        if mine.dtype == BF16:
            assert_two_references(mine, want, same)
        elif kind == "alone":
            assert_two_references(mine, want)
        else:  # dw of the sum, which is rounded to bf16 before all else
            torch.testing.assert_close(mine, same, rtol=1e-5, atol=1e-5)


# --- Hugging Face's casts


@pytest.mark.parametrize("weight_dtype", (None, FP32))
@pytest.mark.parametrize("dtype", DTYPES)
def test_hf_casting_is_that_of_transformers(dtype, weight_dtype):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    (x, residual, weight), _ = inputs(7, 96, dtype, weight_dtype)
    theirs = LlamaRMSNorm(96, EPS)
    theirs.weight.data = weight
    want, want_of_sum = theirs(x).detach(), theirs(x + residual).detach()
    assert_bitwise_equal(rms_norm(x, weight, EPS, casting="hf", impl="torch"), want)
    y, total = add_rms_norm(x, residual, weight, EPS, casting="hf", impl="torch")
    assert_bitwise_equal(y, want_of_sum)
    assert_bitwise_equal(total, x + residual)

    # The kernel adds squares in another order; of small quarters all orders give the same.
    x = (torch.randint(-16, 17, (7, 96)) / 4).to(dtype)
    residual = (torch.randint(-16, 17, (7, 96)) / 4).to(dtype)
    assert_bitwise_equal(rms_norm(x, weight, EPS, casting="hf", impl="triton"), theirs(x).detach())
    y, _ = add_rms_norm(x, residual, weight, EPS, casting="hf", impl="triton")
    assert_bitwise_equal(y, theirs(x + residual).detach())
    if dtype != FP32 and weight_dtype is None:
        assert not torch.equal(theirs(x), rms_norm(x, weight, EPS, impl="triton"))


def test_gradients_do_not_depend_on_the_casting():
    tensors, gradients = inputs(4, 64, BF16)
    ours = [results(added, tensors, gradients, casting=casting, impl="triton")[2:] for casting in ("fp32", "hf")]
    for first, second in zip(*ours, strict=True):
        assert_bitwise_equal(first, second)


# --- what the caller may pass


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_and_misaligned_tensors_and_leading_shapes(impl):
    tensors, gradients = inputs(6, 67, BF16)
    want = results(added, tensors, gradients, impl=impl)
    for change in (strided_rows, misaligned, lambda x: x.t().contiguous().t() if x.ndim == 2 else x):
        changed = [change(x) for x in tensors[:2]] + [tensors[2]]
        got = results(added, changed, [change(g) for g in gradients], impl=impl)
        for first, second in zip(got, want, strict=True):
            assert_bitwise_equal(first, second)
    deep = [x.view(2, 3, 67) for x in tensors[:2]] + [tensors[2]]
    got = results(added, deep, [g.view(2, 3, 67) for g in gradients], impl=impl)
    for first, second in zip(got, want, strict=True):
        assert_bitwise_equal(first.view(second.shape), second)
    assert rms_norm(tensors[0][0], tensors[2], EPS, impl=impl).shape == (67,)


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_that_are_expanded_or_missing(impl):
    (x, residual, weight), _ = inputs(4, 33, FP32)

    def gradients(take):
        leaves = [x.clone().requires_grad_(), residual.clone().requires_grad_(), weight.clone().requires_grad_()]
        take(add_rms_norm(*leaves, EPS, impl=impl)).backward()
        return [leaf.grad for leaf in leaves]

    ones = torch.ones_like(x)
    want = results(added, (x, residual, weight), (ones, 2 * ones), impl=impl)[2:]
    for first, second in zip(gradients(lambda both: both[0].sum() + 2 * both[1].sum()), want, strict=True):
        assert_bitwise_equal(first, second)
    dx, dresidual, dweight = gradients(lambda both: both[0].sum())
    assert_bitwise_equal(dx, results(alone, (x + residual, x, weight), [ones], impl=impl)[1])
    assert_bitwise_equal(dx, dresidual)
    assert_bitwise_equal(dweight, want[2])
    dx, dresidual, dweight = gradients(lambda both: both[1].sum())
    assert torch.equal(dx, ones)
    assert torch.equal(dresidual, ones)
    assert dweight is None or not dweight.any()


@pytest.mark.parametrize("impl", IMPLS)
def test_zero_rows(impl):
    tensors, gradients = inputs(0, 16, BF16)
    y, total, dx, dresidual, dweight = results(added, tensors, gradients, impl=impl)
    assert y.shape == total.shape == dx.shape == dresidual.shape == (0, 16)
    assert_bitwise_equal(dweight, torch.zeros(16, dtype=BF16))


X, W = torch.zeros(2, 4), torch.ones(4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rms_norm(X.long(), W, EPS), r"x_TD is int64 \[2, 4\] on cpu; it must be fp32, bf16 or fp16"),
        (lambda: rms_norm(X[:, :0], W, EPS), "x_TD is .* D >= 1"),
        (lambda: rms_norm(torch.tensor(1.0), W, EPS), "x_TD is"),
        (lambda: rms_norm(X, W[:3], EPS), r"weight_D is float32 \[3\] on cpu; it must be .* \[4\] on cpu"),
        (lambda: rms_norm(X, W.double(), EPS), "weight_D is float64"),
        (lambda: rms_norm(X, W.to("meta"), EPS), "weight_D is .* on meta"),
        (lambda: rms_norm(X, W, -1.0), "eps is -1.0"),
        (lambda: rms_norm(X, W, EPS, casting="bf16"), "casting is 'bf16'; it must be 'fp32' or 'hf'"),
        (lambda: rms_norm(X, W, EPS, impl="cuda"), "impl is 'cuda'"),
        (lambda: add_rms_norm(X, X[:1], W, EPS), r"residual_TD is float32 \[1, 4\]"),
        (lambda: add_rms_norm(X, X.half(), W, EPS), "residual_TD is float16"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- memory


def test_traffic_and_races():
    rows, columns = 40, 96
    tensors, gradients = inputs(rows, columns, BF16)
    once = rows * columns * 2
    with watch() as watched, mock.patch.object(norm, "_processors", return_value=1):
        results(added, tensors, gradients, impl="triton")
    forward, backward, partials = watched.launches
    assert forward.loaded == forward.unique_loaded + (rows - 1) * columns * 2  # w, again for every row: L2's to give
    assert forward.stored == forward.unique_stored == 2 * once + rows * 4
    assert backward.programs == 16  # for one multiprocessor
    assert backward.stored == backward.unique_stored == once + 16 * columns * 4
    assert backward.loaded <= 1.2 * backward.unique_loaded
    assert backward.unique_loaded == 3 * once + columns * 2 + rows * 4
    assert partials.loaded == partials.unique_loaded == 16 * columns * 4

    tiled = {"WIDEST_FORWARD": 32, "WIDEST_BACKWARD": 32, "TILE": 64, "_processors": lambda device: 1}
    with watch(), mock.patch.multiple(norm, **tiled):
        results(added, tensors, gradients, impl="triton")


# --- tracers


def test_opcheck():
    (x, residual, weight), (dy, dsum) = inputs(3, 20, FP32)
    leaves = [t.requires_grad_() for t in (x, residual, weight)]
    rstd = torch.ones(3)
    for triton in (True, False):
        ops = torch.ops.umedtrain
        torch.library.opcheck(ops.rms_norm.default, (x, weight, EPS, False, triton))
        torch.library.opcheck(ops.add_rms_norm.default, (*leaves, EPS, True, triton))
        torch.library.opcheck(ops.rms_norm_backward.default, (dy, dsum, x.detach(), weight.detach(), rstd, triton))


def chain(x, residual, weight):
    y, total = add_rms_norm(x, residual, weight, EPS, impl="triton")
    return rms_norm(y, weight, EPS, casting="hf", impl="triton"), total


@pytest.mark.parametrize("backend", ("aot_eager", "inductor"))
def test_compiles_into_one_graph(backend):
    tensors, gradients = inputs(3, 40, BF16)
    torch._dynamo.reset()
    compiled = results(torch.compile(chain, fullgraph=True, backend=backend), tensors, gradients)
    for first, second in zip(compiled, results(chain, tensors, gradients), strict=True):
        assert_bitwise_equal(first, second)


def test_selective_checkpointing():
    tensors, gradients = inputs(3, 40, BF16)
    calls = []

    def policy(ctx, op, *args, **kwargs):
        calls.append(op)
        saved = op == torch.ops.umedtrain.add_rms_norm.default
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)

    def recomputed(*leaves):
        return checkpoint(chain, *leaves, use_reentrant=False, context_fn=contexts)

    got = results(recomputed, tensors, gradients)
    assert torch.ops.umedtrain.add_rms_norm.default in calls
    for first, second in zip(got, results(chain, tensors, gradients), strict=True):
        assert_bitwise_equal(first, second)
