import functools
import sys

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
from umedtrain.kernels.cross_entropy import cross_entropy
from umedtrain.kernels.offline.sanitizer import watch

IMPLS = ("torch", "triton")
module = sys.modules["umedtrain.kernels.cross_entropy"]  # the name in the package is that of the function


def make(rows, vocab, dtype=torch.float32, scale=1.5, offset=0.0):
    """Logits, targets of which every third is none, and a weight for each row."""
    logits = (torch.randn(rows, vocab) * scale + offset).to(dtype).requires_grad_()
    targets = torch.randint(vocab, (rows,))
    targets[1::3] = -100
    return logits, targets, torch.randn(rows)


def with_gradient(loss_of, logits, weights):
    loss = loss_of(logits)
    (gradient,) = torch.autograd.grad((loss.double() * weights.double()).sum(), logits)
    return loss.detach(), gradient


def reference(logits, targets, weights, dtype=torch.float64, ignore_index=-100):
    copy = logits.detach().to(dtype).requires_grad_()
    return with_gradient(
        lambda z: F.cross_entropy(z, targets.long(), reduction="none", ignore_index=ignore_index), copy, weights
    )


def check(logits, targets, weights, impl, ignore_index=-100, fp32_relative=1e-6):
    """Loss and gradient against float64, the gradient also against PyTorch in the same type. The loss is fp32."""
    before = logits.detach().clone()
    with poisoned():
        loss, gradient = with_gradient(
            lambda z: cross_entropy(z, targets, ignore_index=ignore_index, impl=impl), logits, weights
        )
    assert loss.dtype == torch.float32
    assert gradient.dtype == logits.dtype
    assert_bitwise_equal(logits.detach(), before, "the caller's logits")
    exact_loss, exact_gradient = reference(logits, targets, weights, ignore_index=ignore_index)
    _, torch_gradient = reference(logits, targets, weights, logits.dtype, ignore_index)
    assert_two_references(loss, exact_loss, fp32_relative=fp32_relative, name="loss")
    assert_two_references(gradient, exact_gradient, torch_gradient, fp32_relative=fp32_relative, name="gradient")
    return loss, gradient


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_is_the_formula(shape, dtype, impl):
    check(*make(*shape, dtype), impl)


def test_a_real_vocabulary():
    check(*make(1, 128256, torch.bfloat16), "triton")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("scale", "offset"), [(1e4, 0.0), (3.0, 1e4), (3.0, -1e4)])
def test_logits_of_ten_thousand(scale, offset, impl):
    # Of logits near 1e4 fp32 keeps 1e-3: what is asked is that nothing is lost beyond the logits' own rounding.
    check(*make(4, 3001, scale=scale, offset=offset), impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_minus_infinity_is_a_logit(impl):
    logits, targets, weights = make(4, 300)
    with torch.no_grad():
        logits[:, ::2] = float("-inf")
        logits[2, 1:] = float("-inf")
    targets = torch.tensor([1, 7, 1, 2])  # the last row's target has no probability: its loss is infinite
    loss, _ = check(logits[:3].detach().requires_grad_(), targets[:3], weights[:3], impl)
    assert loss.isfinite().sum() == 2  # in the third, every logit is -inf but that of column 0
    assert cross_entropy(logits, targets, impl=impl)[3] == float("inf")


@pytest.mark.parametrize("impl", IMPLS)
def test_a_certain_target_has_its_exact_small_gradient(impl):
    logits, targets, weights = make(1, 50, scale=0.1)
    with torch.no_grad():
        logits[0, targets[0]] += 12.0  # 1 - p is near 3e-4
    # Of the loss, log(1 + 3e-4), what fp32 keeps of 1 + 3e-4 is left.
    _, gradient = check(logits, targets, weights, impl, fp32_relative=1e-3)
    exact = reference(logits, targets, weights)[1][0, targets[0]].item()
    assert gradient[0, targets[0]].item() == pytest.approx(exact, rel=3e-4)


@pytest.mark.parametrize("impl", IMPLS)
def test_ignored_rows_are_not_read(impl):
    logits, targets, weights = make(5, 130)
    with torch.no_grad():
        logits[targets == -100] = float("nan")
    loss, gradient = with_gradient(lambda z: cross_entropy(z, targets, impl=impl), logits, weights)
    assert loss.isfinite().all()
    assert (loss[targets == -100] == 0).all()
    assert (gradient[targets == -100] == 0).all()
    everything = torch.full_like(targets, -100)
    loss, gradient = with_gradient(lambda z: cross_entropy(z, everything, impl=impl), logits, weights)
    assert_bitwise_equal(loss, torch.zeros(5))
    assert_bitwise_equal(gradient, torch.zeros(5, 130))


@pytest.mark.parametrize("impl", IMPLS)
def test_any_column_can_mean_no_target(impl):
    logits, targets, weights = make(4, 10)
    targets = torch.tensor([3, 0, 9, 3])
    loss, _ = check(logits, targets, weights, impl, ignore_index=3)
    assert loss.tolist().count(0.0) == 2


@pytest.mark.parametrize("impl", IMPLS)
def test_awkward_memory(impl):
    logits, targets, weights = make(5, 257, torch.bfloat16)
    plain = check(logits, targets, weights, impl)
    assert_same = assert_bitwise_equal if impl == "triton" else torch.testing.assert_close  # PyTorch's sums differ
    awkward = [strided_rows(logits), misaligned(logits), logits.detach().T.contiguous().T.requires_grad_()]
    spread = torch.stack((targets, targets + 1), 1)[:, 0]
    for same in awkward:
        for where in (targets.int(), spread):
            for first, second in zip(plain, check(same, where, weights, impl), strict=True):
                assert_same(first, second)


@pytest.mark.parametrize("impl", IMPLS)
def test_no_rows_stay_connected_to_the_graph(impl):
    logits, targets, weights = make(0, 7)
    loss, gradient = with_gradient(lambda z: cross_entropy(z, targets, impl=impl), logits, weights)
    assert loss.shape == (0,)
    assert gradient.shape == (0, 7)


def test_two_block_sizes_agree_and_calls_repeat_bit_for_bit(monkeypatch):
    logits, targets, weights = make(4, 4099)
    runs = [check(logits, targets, weights, "triton") for _ in range(2)]
    for first, second in zip(*runs, strict=True):
        assert_bitwise_equal(first, second)
    monkeypatch.setattr(module, "FORWARD", {"default": ((2**31, (512, 4)),)})
    monkeypatch.setattr(module, "BACKWARD", {"default": ((2**31, (1024, 4)),)})
    loss, gradient = check(logits, targets, weights, "triton")
    torch.testing.assert_close(loss, runs[0][0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient, runs[0][1], rtol=1e-6, atol=1e-9)


def test_the_twin_is_the_kernel():
    logits, targets, weights = make(6, 515, torch.float16)
    runs = [check(logits, targets, weights, impl) for impl in IMPLS]
    torch.testing.assert_close(runs[0][0], runs[1][0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(runs[0][1], runs[1][1], rtol=2**-10, atol=1e-7)


def test_kernels_stay_in_bounds_and_read_each_logit_once():
    rows, vocab = 6, 4099
    logits, targets, weights = make(rows, vocab, torch.bfloat16)
    with watch() as watched:
        with_gradient(lambda z: cross_entropy(z, targets, impl="triton"), logits, weights)
    forward, backward = watched.launches
    wanted = int((targets != -100).sum())
    assert forward.loaded <= 1.01 * wanted * vocab * 2
    assert forward.stored == rows * 12
    assert backward.loaded <= 1.01 * wanted * vocab * 2
    assert backward.stored == rows * vocab * 2


def test_an_unknown_target_on_a_gpu_is_nan_and_reads_nothing_else(monkeypatch):
    monkeypatch.setattr(module, "check_targets", lambda *_: None)  # as on a GPU, where nothing looks at the targets
    logits, _, weights = make(4, 60)
    targets = torch.tensor([5, 60, -7, 2**40])
    for impl in IMPLS:
        with watch():
            loss, gradient = with_gradient(lambda z, impl=impl: cross_entropy(z, targets, impl=impl), logits, weights)
        assert loss.isnan().tolist() == [False, True, True, True]
        assert gradient.isnan().all(1).tolist() == [False, True, True, True]


def test_the_checks_see_a_gradient_that_is_wrong(monkeypatch):
    right = module.logit_gradients

    def first_weight_for_all(logits, out, targets, terms, **options):
        right(logits, out, targets, torch.cat((terms[:2], terms[2:, :1].expand(2, len(targets)))), **options)

    def forgets_the_target(logits, out, targets, terms, **options):
        right(logits, out, targets, terms * torch.tensor([1.0, 1.0, 0.0, 1.0])[:, None], **options)

    for wrong in (first_weight_for_all, forgets_the_target):
        monkeypatch.setattr(module, "logit_gradients", wrong)
        for impl in IMPLS:
            with pytest.raises(AssertionError, match="gradient: off by"):
                check(*make(5, 40, torch.bfloat16), impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_operators_are_sound(impl):
    logits, targets, weights = make(4, 33)
    triton = impl == "triton"
    torch.library.opcheck(torch.ops.umedtrain.cross_entropy.default, (logits, targets, -100, triton))
    peak, logsum = torch.randn(4), torch.randn(4)
    arguments = (weights, logits.detach(), targets, peak, logsum, -100, triton)
    torch.library.opcheck(torch.ops.umedtrain.cross_entropy_backward.default, arguments)


@pytest.mark.parametrize(("impl", "backend"), [("torch", "inductor"), ("triton", "aot_eager")])
def test_compiles_whole(impl, backend):
    logits, targets, weights = make(4, 33)

    def loss_of(z):
        return cross_entropy(z * 1.5, targets, impl=impl)

    eager = with_gradient(loss_of, logits, weights)
    compiled = with_gradient(torch.compile(loss_of, fullgraph=True, backend=backend), logits, weights)
    for first, second in zip(eager, compiled, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-6)


def test_selective_checkpointing():
    logits, targets, weights = make(4, 33)
    op = torch.ops.umedtrain.cross_entropy.default
    calls = []

    def policy(_, called, *args, **kwargs):
        calls.append(called)
        return CheckpointPolicy.MUST_SAVE if called == op else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)

    def loss_of(z):
        return checkpoint(lambda y: cross_entropy(y * 1.5, targets), z, use_reentrant=False, context_fn=contexts)

    saved = with_gradient(loss_of, logits, weights)
    assert op in calls
    for first, second in zip(
        saved, with_gradient(lambda z: cross_entropy(z * 1.5, targets), logits, weights), strict=True
    ):
        assert_bitwise_equal(first, second)


@pytest.mark.parametrize(
    ("logits", "targets", "message"),
    [
        (torch.zeros(3), torch.zeros(3, dtype=torch.long), "logits_NV is torch.float32 .* must be floating point"),
        (torch.zeros(3, 0), torch.zeros(3, dtype=torch.long), "with V > 0"),
        (torch.zeros(3, 2, dtype=torch.long), torch.zeros(3, dtype=torch.long), "floating point"),
        (torch.zeros(3, 2), torch.zeros(2, dtype=torch.long), r"targets_N has shape \(2,\), wanted \(3,\)"),
        (torch.zeros(3, 2), torch.zeros(3), "targets_N is torch.float32; it must be int64 or int32"),
        (torch.zeros(3, 2), torch.zeros(3, dtype=torch.long, device="meta"), "targets_N is on meta"),
        (torch.zeros(3, 2), torch.tensor([0, 2, 0]), r"targets_N\[1\] is 2, outside the vocabulary of 2"),
        (torch.zeros(3, 2), torch.tensor([0, 1, -1]), r"targets_N\[2\] is -1"),
    ],
)
def test_bad_input_is_named(logits, targets, message):
    for impl in IMPLS:
        with pytest.raises(ValueError, match=message):
            cross_entropy(logits, targets, impl=impl)
