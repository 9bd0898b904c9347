import functools
import itertools
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from tests.kernels.compare import (
    DTYPES,
    assert_bitwise_equal,
    assert_two_references,
    misaligned,
    poisoned,
    strided_rows,
)
from tests.ranks import run_ranks
from umedtrain.kernels import linear_chunks, linear_passes
from umedtrain.kernels.cross_entropy import logit_gradients
from umedtrain.kernels.linear_chunks import TILE, head_traffic, tiled_blocks, weight_traffic, whole_rows
from umedtrain.kernels.linear_loss import linear_cross_entropy, linear_logprobs
from umedtrain.kernels.offline.sanitizer import watch

IMPLS = ("torch", "triton")
ONE_BLOCK = 2**29


def make(rows, hidden, vocab, dtype=torch.float32, scale=1.0):
    """Hidden states, weight, targets of which every third is none, and four numbers for each row."""
    states = torch.randn(rows, hidden).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, hidden) * scale * hidden**-0.5).to(dtype).requires_grad_()
    targets = torch.randint(vocab, (rows,))
    targets[1::3] = -100
    return states, weight, targets, torch.randn(4, rows)


def plain(states, weight, targets):
    """Log-probability, logsumexp, entropy: the whole matrix of logits, softmax in at least fp32."""
    logits = states @ weight.T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logp = logits.log_softmax(-1)
    wanted = logp.gather(-1, targets.long().clamp(min=0)[:, None])[:, 0]
    outputs = (wanted, logits.logsumexp(-1), -(logp.exp() * logp).sum(-1))
    return [torch.where(targets == -100, 0.0, output) for output in outputs]


def with_gradients(outputs_of, states, weight, factors):
    outputs = outputs_of(states, weight)
    total = sum((output.double() * factor.double()).sum() for output, factor in zip(outputs, factors, strict=False))
    return [output.detach() for output in outputs], torch.autograd.grad(total, (states, weight))


def references(outputs_of, states, weight, factors):
    """The same in float64, and with PyTorch's operators in the inputs' type."""
    exact = [tensor.detach().double().requires_grad_() for tensor in (states, weight)]
    same = [tensor.detach().clone().requires_grad_() for tensor in (states, weight)]
    return with_gradients(outputs_of, *exact, factors), with_gradients(outputs_of, *same, factors)


def compare(ours, exact, same):
    """fp32 outputs of a half-precision GEMM may err twice as much as PyTorch's; gradients as every kernel's."""
    for name, mine, right, theirs in zip(("logprob", "logsumexp", "entropy"), ours[0], exact[0], same[0], strict=False):
        largest = max(right.abs().max().item(), 1e-30)
        relative = 2 * (theirs.double() - right).abs().max().item() / largest + 1e-6
        assert mine.dtype == torch.float32
        assert_two_references(mine, right, fp32_relative=relative, name=name)
    for name, mine, right, theirs in zip(("d hidden", "d weight"), ours[1], exact[1], same[1], strict=True):
        # fp32: BLAS itself errs by several 1e-6 where it sums the whole vocabulary into few columns.
        largest = max(right.abs().max().item(), 1e-30)
        relative = 2 * (theirs.double() - right).abs().max().item() / largest + 2e-6
        assert_two_references(mine, right, theirs, fp32_relative=relative, name=name)


def check_logprobs(states, weight, targets, factors, impl, chunk_bytes=ONE_BLOCK):
    with poisoned():
        ours = with_gradients(
            lambda h, w: linear_logprobs(h, w, targets, chunk_bytes=chunk_bytes, with_entropy=True, impl=impl),
            states,
            weight,
            factors,
        )
    compare(ours, *references(lambda h, w: plain(h, w, targets), states, weight, factors))
    return ours


def check_loss(states, weight, targets, factors, impl, chunk_bytes=ONE_BLOCK, upstream=1 / 7):
    """Weights for each row, one of them wanting a gradient, and an incoming gradient that bf16 does not hold."""
    token_weights = factors[0].clone().requires_grad_()
    with poisoned():
        loss = linear_cross_entropy(states, weight, targets, token_weights, chunk_bytes=chunk_bytes, impl=impl)
        *gradients, of_weights = torch.autograd.grad(loss, (states, weight, token_weights), torch.tensor(upstream))
    scaled = [-upstream * factors[0].double()]
    exact, same = references(lambda h, w: plain(h, w, targets)[:1], states, weight, scaled)
    compare(((), gradients), exact, same)
    right = -(exact[0][0] * factors[0]).sum()
    wrong = (same[0][0].double() - exact[0][0]).abs().max().item()
    assert abs(loss.item() - right.item()) <= (2 * wrong + 1e-6 * exact[0][0].abs().max().item()) * len(targets)
    of_weights_error = (of_weights + upstream * exact[0][0]).abs().max().item()
    assert of_weights_error <= (2 * wrong + 1e-6 * exact[0][0].abs().max().item()) * upstream
    return loss.detach(), *gradients, of_weights


CHECKS = (check_logprobs, check_loss)


# --- values and gradients


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 4, 3), (5, 8, 257), (4, 16, 4099)])
@pytest.mark.parametrize("check", CHECKS)
def test_is_the_formula(check, sizes, dtype, impl):
    check(*make(*sizes, dtype), impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("check", CHECKS)
def test_more_blocks_than_one_in_both_directions(check, impl):
    sizes = (6, 64, 2 * TILE + 100)
    chunk_bytes = 2 * TILE * 2
    plan = tiled_blocks(4, sizes[2], chunk_bytes, 2)
    assert (len(plan.row_slices), len(plan.column_slices)) == (2, 3)
    check(*make(*sizes, torch.bfloat16), impl, chunk_bytes)


def test_fp64_inputs_are_taken():
    # Their GEMMs are fp64, the softmax is not.
    states, weight, targets, factors = make(5, 8, 40, torch.float64)
    exact = with_gradients(lambda h, w: plain(h, w, targets), states, weight, factors)
    ours = with_gradients(
        lambda h, w: linear_logprobs(h, w, targets, chunk_bytes=8 * 40 * 2, with_entropy=True), states, weight, factors
    )
    loss = linear_cross_entropy(states, weight, targets, factors[0], chunk_bytes=8 * 40 * 2)
    torch.testing.assert_close(loss.double(), -(exact[0][0] * factors[0]).sum(), rtol=1e-5, atol=1e-5)
    for first, second in zip((*ours[0], *ours[1]), (*exact[0], *exact[1]), strict=True):
        torch.testing.assert_close(first.double(), second, rtol=1e-5, atol=1e-6)
    fast = torch.autograd.grad(loss, (states, weight))
    slow = with_gradients(lambda h, w: plain(h, w, targets)[:1], states, weight, -factors)[1]
    for first, second in zip(fast, slow, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)


@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(0, 17),
    vocab=st.integers(1, 33),
    chunk_rows=st.integers(1, 9),
    seed=st.integers(0, 10**6),
    holes=st.booleans(),
)
def test_any_sizes(rows, vocab, chunk_rows, seed, holes):
    torch.manual_seed(seed)
    states, weight, targets, factors = make(rows, 5, vocab)
    if not holes:
        targets = torch.randint(vocab, (rows,))
    if rows:
        for check in CHECKS:
            check(states, weight, targets, factors, "torch", 4 * vocab * chunk_rows)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_logits_of_ten_thousand(offset, impl):
    states = torch.tensor([[1e4, offset, 1.0], [3.0, offset, 1e4]], requires_grad=True)
    weight = torch.eye(3, requires_grad=True)
    targets = torch.tensor([0, 2])
    check_logprobs(states, weight, targets, torch.randn(4, 2), impl)
    check_loss(states, weight, targets, torch.randn(4, 2), impl)
    states = torch.randn(4, 3).add_(offset).requires_grad_()
    weight = torch.cat((torch.ones(40, 1), torch.randn(40, 2) * 1e-4), 1).requires_grad_()
    logits = (states @ weight.T).detach()
    logp = linear_logprobs(states, weight, torch.arange(4), impl=impl).logprobs_N
    exact = logits.double().log_softmax(-1).diagonal()
    assert_two_references(logp.detach(), exact)


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_without_a_target_are_never_projected(impl, monkeypatch):
    states, weight, targets, factors = make(7, 8, 60)
    with torch.no_grad():
        states[targets == -100] = float("nan")
    products = []
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, **options: products.append(a.shape[0]) or mm(a, b, **options))
    outputs = linear_logprobs(states, weight, targets, with_entropy=True, impl=impl)
    of_states, of_weight = torch.autograd.grad((outputs.logprobs_N * factors[0]).sum(), (states, weight))
    assert products == [5, 5, 5, 60]
    for output in outputs:
        assert output.isfinite().all()
        assert (output[targets == -100] == 0).all()
    assert (of_states[targets == -100] == 0).all()
    assert of_weight.isfinite().all()
    loss = linear_cross_entropy(states, weight, targets, factors[0], impl=impl)
    assert loss.isfinite()
    assert (torch.autograd.grad(loss, states)[0][targets == -100] == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rows", [0, 4])
def test_no_targets_stay_connected_to_the_graph(rows, impl):
    states, weight, _, factors = make(rows, 3, 7)
    targets = torch.full((rows,), -100)
    with poisoned():
        outputs = linear_logprobs(states, weight, targets, with_entropy=True, impl=impl)
        loss = linear_cross_entropy(states, weight, targets, factors[0], impl=impl)
        for total in (sum(output.sum() for output in outputs), loss):
            assert total == 0
            for gradient, input_ in zip(torch.autograd.grad(total, (states, weight)), (states, weight), strict=True):
                assert_bitwise_equal(gradient, torch.zeros_like(input_))


@pytest.mark.parametrize("impl", IMPLS)
def test_bf16_weight_gradient_is_summed_in_fp32(impl):
    # 4096 rows in blocks of 8: a bf16 sum over blocks would lose far more than one final rounding.
    rows, vocab = (4096, 11) if impl == "torch" else (32, 11)
    states, weight = torch.randn(rows, 8).bfloat16(), torch.randn(vocab, 8).bfloat16().requires_grad_()
    targets = torch.randint(vocab, (rows,))
    exact = weight.detach().double().requires_grad_()
    plain(states.double(), exact, targets)[0].sum().backward()
    linear_logprobs(states, weight, targets, chunk_bytes=2 * vocab * 8, impl=impl).logprobs_N.sum().backward()
    fast = weight.detach().clone().requires_grad_()
    (-linear_cross_entropy(states, fast, targets, chunk_bytes=2 * vocab * 8, impl=impl)).backward()
    for gradient in (weight.grad, fast.grad):
        assert (gradient.double() - exact.grad).norm() / exact.grad.norm() < 4e-3


@pytest.mark.parametrize("impl", IMPLS)
def test_awkward_memory(impl):
    states, weight, targets, factors = make(5, 8, 65, torch.bfloat16)
    targets = torch.randint(65, (5,))
    transposed = weight.detach().T.contiguous().T.requires_grad_()
    for check in CHECKS:
        check(strided_rows(states), strided_rows(weight), targets.int(), factors, impl)
        check(misaligned(states), misaligned(weight), torch.stack((targets, targets), 1)[:, 0], factors, impl)
        check(states.detach().T.contiguous().T.requires_grad_(), transposed, targets, factors, impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_other_peoples_losses(impl):
    states, weight, targets, _ = make(9, 8, 50)

    def gradients(loss):
        return loss.detach(), *torch.autograd.grad(loss, (states, weight))

    count = int((targets != -100).sum())
    ours = [
        gradients(linear_cross_entropy(states, weight, targets, impl=impl) / count),
        gradients(-linear_logprobs(states, weight, targets, impl=impl).logprobs_N.sum() / count),
    ]
    theirs = [gradients(F.cross_entropy(F.linear(states, weight), targets))]
    if hasattr(F, "linear_cross_entropy"):
        options = torch.nn.LinearCrossEntropyOptions()
        theirs.append(gradients(F.linear_cross_entropy(states, weight, targets, options=options)))
    for mine in ours:
        for other in theirs:
            for first, second in zip(mine, other, strict=True):
                torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)


# --- what a result may depend on


@pytest.mark.parametrize("impl", IMPLS)
def test_calls_repeat_bit_for_bit(impl):
    problem = make(6, 8, 300, torch.bfloat16)
    for check in CHECKS:
        first, second = (check(*problem, impl, chunk_bytes=2 * 300 * 2) for _ in range(2))
        for one, other in zip(
            torch.utils._pytree.tree_leaves(first), torch.utils._pytree.tree_leaves(second), strict=True
        ):
            assert_bitwise_equal(one, other)


@pytest.mark.parametrize("impl", IMPLS)
def test_how_logits_are_cut_does_not_show(impl):
    # Small whole numbers, so that every GEMM is exact whatever its shape: what remains is our own arithmetic.
    vocab = TILE + 50
    states, weight = torch.randint(-3, 4, (6, 8)).float(), torch.randint(-3, 4, (vocab, 8)).float()
    targets = torch.randint(vocab, (6,))

    def run(rows, chunk_bytes):
        return linear_logprobs(
            states[rows], weight, targets[rows], chunk_bytes=chunk_bytes, with_entropy=True, impl=impl
        )

    whole = run(slice(0, 6), ONE_BLOCK)
    for rows, chunk_bytes in ((slice(0, 6), 4), (slice(0, 6), 4 * TILE * 4), (slice(2, 4), ONE_BLOCK)):
        for first, second in zip(run(rows, chunk_bytes), whole, strict=True):
            assert_bitwise_equal(first, second[rows])


@pytest.mark.parametrize("impl", IMPLS)
def test_a_row_does_not_see_its_neighbours(impl):
    states, weight, targets, _ = make(8, 16, 500, torch.bfloat16)
    targets = torch.randint(500, (8,))
    changed = states.detach().clone()
    changed[:4] = torch.randn(4, 16)
    outputs = [linear_logprobs(h, weight, targets, with_entropy=True, impl=impl) for h in (states, changed)]
    for first, second in zip(*outputs, strict=True):
        assert_bitwise_equal(first[4:].detach(), second[4:].detach())


@pytest.mark.parametrize("impl", IMPLS)
def test_values_do_not_depend_on_wanting_gradients(impl):
    states, weight, targets, factors = make(6, 8, 90, torch.bfloat16)
    chunk_bytes = 2 * 90 * 2

    def values(h, w):
        logprobs = linear_logprobs(h, w, targets, chunk_bytes=chunk_bytes, with_entropy=True, impl=impl)
        return *logprobs, linear_cross_entropy(h, w, targets, factors[0], chunk_bytes=chunk_bytes, impl=impl)

    frozen = [tensor.detach() for tensor in (states, weight)]
    with torch.no_grad():
        runs = [values(states, weight)]
    runs += [values(states, weight), values(*frozen), values(states, frozen[1]), values(frozen[0], weight)]
    for run in runs[1:]:
        for first, second in zip(runs[0], run, strict=True):
            assert_bitwise_equal(first, second.detach())


@pytest.mark.parametrize("impl", IMPLS)
def test_only_wanted_gradients_are_made(impl):
    states, weight, targets, factors = make(6, 8, 90, torch.bfloat16)
    for check in (
        lambda h, w: (linear_logprobs(h, w, targets, impl=impl).logprobs_N * factors[0]).sum(),
        lambda h, w: linear_cross_entropy(h, w, targets, factors[0], impl=impl),
    ):
        both = torch.autograd.grad(check(states, weight), (states, weight))
        (only_states,) = torch.autograd.grad(check(states, weight.detach()), states)
        (only_weight,) = torch.autograd.grad(check(states.detach(), weight), weight)
        assert_bitwise_equal(only_states, both[0])
        assert_bitwise_equal(only_weight, both[1])
        assert not check(states.detach(), weight.detach()).requires_grad


@pytest.mark.parametrize("impl", IMPLS)
def test_backward_can_be_run_again(impl):
    states, weight, targets, factors = make(6, 8, 90)
    for loss in (
        (linear_logprobs(states, weight, targets, impl=impl).logprobs_N * factors[0]).sum(),
        linear_cross_entropy(states, weight, targets, factors[0], impl=impl),
    ):
        first, second = (torch.autograd.grad(loss, (states, weight), retain_graph=True) for _ in range(2))
        for one, other in zip(first, second, strict=True):
            assert_bitwise_equal(one, other)


def test_two_block_sizes_agree(monkeypatch):
    problem = make(4, 8, 4099)
    usual = check_logprobs(*problem, "triton")
    monkeypatch.setattr(linear_passes, "FORWARD", {"default": ((2**31, (512, 4)),)})
    monkeypatch.setattr(sys.modules[logit_gradients.__module__], "BACKWARD", {"default": ((2**31, (1024, 4)),)})
    other = check_logprobs(*problem, "triton")
    for first, second in zip(
        torch.utils._pytree.tree_leaves(usual), torch.utils._pytree.tree_leaves(other), strict=True
    ):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)


def test_the_twin_is_the_kernel():
    problem = make(5, 16, TILE + 700)
    for check in CHECKS:
        twin, kernel = (torch.utils._pytree.tree_leaves(check(*problem, impl, 4 * TILE * 3)) for impl in IMPLS)
        for first, second in zip(twin, kernel, strict=True):
            torch.testing.assert_close(first, second, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("check", CHECKS)
def test_the_checks_see_a_gradient_that_is_wrong(check, impl, monkeypatch):
    right = linear_passes.logit_gradients

    def first_weight_for_all(logits, out, targets, terms, **options):
        spread = torch.cat((terms[:2], terms[2:, :1].expand(len(terms) - 2, len(targets))))
        right(logits, out, targets, spread, **options)

    def forgets_the_target(logits, out, targets, terms, **options):
        terms = terms.clone()
        terms[2] = 0
        right(logits, out, targets, terms, **options)

    problem = make(5, 16, 60, torch.bfloat16)
    for wrong in (first_weight_for_all, forgets_the_target):
        monkeypatch.setattr(linear_passes, "logit_gradients", wrong)
        with pytest.raises(AssertionError, match="d hidden: off by"):
            check(*problem, impl)


# --- memory and traffic


@given(rows=st.integers(0, 10**5), vocab=st.integers(1, 200_000), chunk_bytes=st.integers(1, 2**30))
def test_blocks_cover_everything_within_the_budget(rows, vocab, chunk_bytes):
    for plan, least in (
        (tiled_blocks(rows, vocab, chunk_bytes, 2), min(vocab, TILE)),
        (whole_rows(rows, vocab, chunk_bytes, 2), vocab),
    ):
        assert plan.rows * plan.columns * 2 <= max(chunk_bytes, least * 2)
        for slices, total in ((plan.column_slices, vocab), (plan.row_slices, rows) if rows < 1000 else ((), 0)):
            assert [index for part in slices for index in (part.start, part.stop)][:: max(1, 2 * len(slices) - 1)] == (
                [0, total] if total else []
            )
            assert all(first.stop == second.start for first, second in itertools.pairwise(slices))
        assert all(part.start % TILE == 0 for part in plan.column_slices)


def test_weight_traffic_of_llama_8b():
    assert weight_traffic(8192, 4096, 128256) < 5e9
    assert weight_traffic(8192, 4096, 128256, gradient_in_forward=True) < 26e9
    # Chunks of 256 rows with gradients in bf16, or fp32: what is to be beaten.
    small = 256 * 128256 * 2
    assert weight_traffic(8192, 4096, 128256, small, gradient_in_forward=True) > 134e9
    everything = head_traffic(8192, 4096, 128256)
    assert everything.hidden < 2e9
    assert everything.logits == 7 * 8192 * 128256 * 2


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("chunk_bytes", [ONE_BLOCK, 4 * TILE * 4, 4 * TILE * 12])
def test_gemms_move_what_the_formula_says(chunk_bytes, fast, monkeypatch):
    rows, hidden, vocab = 12, 8, 2 * TILE + 100
    moved, largest = 0, 0
    mm, addmm = torch.mm, torch.addmm

    def watched_mm(left, right, *, out):
        nonlocal moved, largest
        moved += 4 * (left.numel() + right.numel() + out.numel())
        largest = max(largest, out.numel() if {*out.shape}.isdisjoint({hidden}) else 0)
        return mm(left, right, out=out)

    def watched_addmm(total, left, right, *, out):
        nonlocal moved
        moved += 4 * (left.numel() + right.numel() + 2 * out.numel())
        return addmm(total, left, right, out=out)

    monkeypatch.setattr(torch, "mm", watched_mm)
    monkeypatch.setattr(torch, "addmm", watched_addmm)
    states, weight, _, _ = make(rows, hidden, vocab)
    targets = torch.randint(vocab, (rows,))
    loss_of = linear_cross_entropy if fast else lambda *a, **k: linear_logprobs(*a, **k).logprobs_N.sum()
    loss_of(states, weight, targets, chunk_bytes=chunk_bytes).backward()
    expected = head_traffic(rows, hidden, vocab, chunk_bytes, itemsize=4, gradient_in_forward=fast)
    by_softmax = 3 * 4 * rows * vocab  # read for the statistics; read and written for the gradient
    assert moved == expected.weight + expected.hidden + expected.logits - by_softmax
    assert largest * 4 <= max(chunk_bytes, 4 * (vocab if fast else TILE))


def test_kernels_stay_in_bounds_and_read_each_logit_once():
    states, weight, targets, factors = make(6, 8, TILE + 301, torch.bfloat16)
    wanted = int((targets != -100).sum())
    logits = wanted * (TILE + 301) * 2
    with watch() as watched:
        outputs = linear_logprobs(
            states, weight, targets, with_entropy=True, chunk_bytes=wanted * TILE * 2, impl="triton"
        )
        sum((output * factor).sum() for output, factor in zip(outputs, factors, strict=False)).backward()
    statistics, gradients = watched.launches[:2], watched.launches[2:]
    assert len(gradients) == 2
    assert sum(launch.loaded for launch in statistics) <= 1.01 * logits
    assert sum(launch.stored for launch in statistics) <= 0.01 * logits
    assert sum(launch.loaded for launch in gradients) <= 1.02 * logits
    assert sum(launch.stored for launch in gradients) == logits


def test_mixed_precision_sums_take_one_gemm_on_a_gpu(monkeypatch):
    # No GPU here: what is called, and with what, is checked against PyTorch's own rule for it on meta tensors.
    calls = []
    addmm = torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *a, **k: calls.append(k) or addmm(*a, **k))
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    total = torch.empty(7, 4, device="meta")
    left, right = torch.empty(7, 5, device="meta").bfloat16(), torch.empty(5, 4, device="meta").bfloat16()
    for first in (True, False):
        linear_chunks.accumulate(total, left, right, first=first)
    assert [(call["beta"], call["out_dtype"]) for call in calls] == [(0, torch.float32), (1, torch.float32)]
    assert all(call["out"] is total for call in calls)


# --- PyTorch


@pytest.mark.parametrize("impl", IMPLS)
def test_operators_are_sound(impl):
    states, weight, targets, factors = make(5, 8, 33)
    ops, triton = torch.ops.umedtrain, impl == "triton"
    torch.library.opcheck(ops.linear_logprobs.default, (states, weight, targets, 4 * 33 * 2, True, triton))
    torch.library.opcheck(
        ops.linear_cross_entropy.default,
        (states, weight, targets, factors[0].clone().requires_grad_(), 4 * 33 * 2, True, True, triton),
    )
    fixed = [states.detach(), weight.detach(), targets]
    statistics, order, count = ops.linear_logprobs(*fixed, 4 * 33 * 2, True, triton)
    arguments = (torch.randn(5, 5), *fixed, statistics, order, count, 4 * 33 * 2, True)
    torch.library.opcheck(ops.linear_logprobs_backward.default, (*arguments, True, triton, triton))
    torch.library.opcheck(ops.scaled.default, (torch.randn(3, 4), torch.tensor(0.3), torch.bfloat16))


def sft_and_more(states, weight, targets, factors, impl=None):
    """A loss through everything that is offered."""
    logp, lse, entropy = linear_logprobs(states * 1.5, weight, targets, with_entropy=True, impl=impl)
    weighted = (logp * factors[0] + lse * factors[1] + entropy * factors[2]).sum()
    return weighted + 0.3 * linear_cross_entropy(states * 0.5, weight, targets, factors[3], impl=impl)


@pytest.mark.parametrize(("impl", "backend"), [("torch", "inductor"), ("triton", "aot_eager")])
def test_compiles_whole_and_once_for_any_number_of_targets(impl, backend):
    states, weight, targets, factors = make(6, 8, 33)
    compiled = torch.compile(functools.partial(sft_and_more, impl=impl), fullgraph=True, backend=backend)
    torch._dynamo.utils.counters.clear()
    for holes in (3, 2, 1):
        targets = torch.randint(33, (6,))
        targets[::holes] = -100
        eager = sft_and_more(states, weight, targets, factors, impl)
        traced = compiled(states, weight, targets, factors)
        torch.testing.assert_close(traced, eager, rtol=1e-5, atol=1e-5)
        expected = torch.autograd.grad(eager, (states, weight))
        for first, second in zip(torch.autograd.grad(traced, (states, weight)), expected, strict=True):
            torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_selective_checkpointing():
    states, weight, targets, factors = make(6, 8, 33)
    ops = (torch.ops.umedtrain.linear_logprobs.default, torch.ops.umedtrain.linear_cross_entropy.default)
    called = []

    def policy(_, op, *args, **kwargs):
        called.append(op)
        return CheckpointPolicy.MUST_SAVE if op in ops else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    plain_loss = sft_and_more(states, weight, targets, factors)
    loss = checkpoint(sft_and_more, states, weight, targets, factors, use_reentrant=False, context_fn=contexts)
    assert set(ops) <= set(called)
    for first, second in zip(
        (loss, *torch.autograd.grad(loss, (states, weight))),
        (plain_loss, *torch.autograd.grad(plain_loss, (states, weight))),
        strict=True,
    ):
        assert_bitwise_equal(first.detach(), second.detach())


class Head(nn.Module):
    """A head whose weight FSDP gathers for its forward."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, states, targets, factors):
        return sft_and_more(states, self.weight, targets, factors)


def head_problem(rank):
    torch.manual_seed(rank)
    states, _, targets, factors = make(6 + rank, 8, 34)
    torch.manual_seed(7)
    return states, torch.randn(34, 8), targets, factors


def sharded_gradient(world):
    from torch.distributed.fsdp import fully_shard

    states, weight, targets, factors = head_problem(world.rank)
    head = Head(weight)
    fully_shard(head)
    head(states, targets, factors).backward()
    return states.grad, head.weight.grad.full_tensor()


def test_sharded_head_over_two_ranks():
    gradients = run_ranks(2, sharded_gradient)
    total = 0
    for rank, (of_states, _) in enumerate(gradients):
        states, weight, targets, factors = head_problem(rank)
        head = Head(weight)
        head(states, targets, factors).backward()
        torch.testing.assert_close(of_states, states.grad)
        total = total + head.weight.grad / 2
    for _, of_weight in gradients:
        torch.testing.assert_close(of_weight, total)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"states": torch.zeros(2, 4)}, "same D"),
        ({"states": torch.zeros(2)}, "same D"),
        ({"weight": torch.zeros(0, 3)}, "weight_VD has no rows"),
        ({"weight": torch.zeros(5, 3).bfloat16()}, "both must be the same float"),
        ({"weight": torch.zeros(5, 3, device="meta")}, "weight_VD is on meta"),
        ({"targets": torch.zeros(3, dtype=torch.long)}, "targets_N has shape"),
        ({"targets": torch.zeros(2)}, "must be int64 or int32"),
        ({"targets": torch.tensor([0, 5])}, r"targets_N\[1\] is 5, outside the vocabulary of 5"),
        ({"targets": torch.tensor([-1, 0])}, r"targets_N\[0\] is -1"),
        ({"chunk_bytes": 0}, "chunk_bytes must be positive"),
    ],
)
def test_bad_input_is_named(change, message):
    inputs = {"states": torch.zeros(2, 3), "weight": torch.zeros(5, 3), "targets": torch.zeros(2, dtype=torch.long)}
    inputs |= change
    options = {"chunk_bytes": inputs.pop("chunk_bytes", ONE_BLOCK)}
    for loss_of in (linear_logprobs, linear_cross_entropy):
        with pytest.raises(ValueError, match=message):
            loss_of(*inputs.values(), **options)


def test_bad_weights_are_named():
    inputs = (torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(2, dtype=torch.long))
    for weights in (torch.zeros(3), torch.zeros(2, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"weights_N is .* must be floating point \[2\]"):
            linear_cross_entropy(*inputs, weights)
    with pytest.raises(ValueError, match="weights_N is on meta"):
        linear_cross_entropy(*inputs, torch.zeros(2, device="meta"))
