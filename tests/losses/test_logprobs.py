import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from umedtrain.losses import token_cross_entropy, token_logprobs


def reference(hidden, weight, targets):
    logp = (hidden @ weight.T).log_softmax(-1)
    picked = logp.gather(-1, targets.clamp(min=0)[:, None])[:, 0]
    return torch.where(targets == -100, torch.zeros_like(picked), picked)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(0, 17),
    vocab=st.integers(1, 33),
    chunk=st.integers(1, 9),
    seed=st.integers(0, 10**6),
    holes=st.booleans(),
)
def test_value_and_gradients_equal_a_full_log_softmax_in_fp64(rows, vocab, chunk, seed, holes):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(vocab, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(vocab, (rows,), generator=generator)
    if holes:
        targets[::3] = -100
    per_row = torch.randn(rows, generator=generator)
    logp = token_logprobs(hidden, weight, targets, chunk_bytes=4 * vocab * chunk)
    ours = torch.autograd.grad((logp * per_row).sum(), (hidden, weight))
    expected = reference(hidden, weight, targets)
    theirs = torch.autograd.grad((expected * per_row).sum(), (hidden, weight))
    assert logp.dtype == torch.float32
    torch.testing.assert_close(logp.double(), expected, rtol=1e-6, atol=1e-6)
    for got, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    loss = token_cross_entropy(hidden, weight, targets, chunk_bytes=4 * vocab * chunk)
    summed = torch.autograd.grad(loss / 7, (hidden, weight))
    theirs = torch.autograd.grad(-reference(hidden, weight, targets).sum() / 7, (hidden, weight))
    assert loss.dtype == torch.float32
    assert loss.ndim == 0
    torch.testing.assert_close(loss.double(), -expected.sum(), rtol=1e-6, atol=1e-5)
    for got, wanted in zip(summed, theirs, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_the_chunk_size_does_not_matter_beyond_rounding():
    hidden, weight = torch.randn(64, 16), torch.randn(50, 16)
    targets = torch.randint(50, (64,))
    runs = [token_logprobs(hidden, weight, targets, chunk_bytes=4 * 50 * rows) for rows in (16, 32, 64)]
    for run in runs[1:]:
        torch.testing.assert_close(run, runs[0], rtol=0, atol=2e-6)


def test_bf16_weight_gradient_is_summed_in_fp32():
    # 4096 rows in chunks of 8: a bf16 sum over chunks would lose far more than one final rounding.
    hidden = torch.randn(4096, 8).bfloat16()
    weight = torch.randn(11, 8).bfloat16().requires_grad_()
    targets = torch.randint(11, (4096,))
    token_logprobs(hidden, weight, targets, chunk_bytes=4 * 11 * 8).sum().backward()
    exact = weight.detach().double().requires_grad_()
    reference(hidden.double(), exact, targets).sum().backward()
    error = (weight.grad.double() - exact.grad).norm() / exact.grad.norm()
    assert error < 4e-3
    weight.grad = None
    token_cross_entropy(hidden, weight, targets, chunk_bytes=4 * 11 * 8).backward()
    assert weight.grad.dtype == torch.bfloat16
    assert (weight.grad.double() + exact.grad).norm() / exact.grad.norm() < 4e-3


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_large_logits_stay_finite(offset):
    hidden = torch.tensor([[1e4, offset, 1.0]], requires_grad=True)
    weight = torch.eye(3, requires_grad=True)
    logp = token_logprobs(hidden, weight, torch.tensor([0]))
    logp.sum().backward()
    assert torch.isfinite(logp).all()
    assert torch.isfinite(hidden.grad).all()


def test_no_targets_stay_connected_to_the_graph():
    hidden, weight = torch.randn(4, 3, requires_grad=True), torch.randn(7, 3, requires_grad=True)
    token_logprobs(hidden, weight, torch.full((4,), -100)).sum().backward()
    assert torch.equal(hidden.grad, torch.zeros(4, 3))
    assert torch.equal(weight.grad, torch.zeros(7, 3))


def test_cross_entropy_of_no_targets_is_zero_and_connected():
    hidden, weight = torch.randn(4, 3, requires_grad=True), torch.randn(7, 3, requires_grad=True)
    loss = token_cross_entropy(hidden, weight, torch.full((4,), -100))
    loss.backward()
    assert loss == 0
    assert torch.equal(hidden.grad, torch.zeros(4, 3))
    assert torch.equal(weight.grad, torch.zeros(7, 3))


def test_cross_entropy_makes_only_the_gradients_that_are_wanted():
    hidden, weight, targets = torch.randn(9, 3), torch.randn(7, 3), torch.arange(9) % 7
    value = token_cross_entropy(hidden, weight, targets)
    for wanted in ((True, False), (False, True), (True, True)):
        for tensor, want in zip((hidden, weight), wanted, strict=True):
            tensor.requires_grad_(want).grad = None
        loss = token_cross_entropy(hidden, weight, targets)
        assert torch.equal(loss, value)
        loss.backward()
        assert [tensor.grad is not None for tensor in (hidden, weight)] == list(wanted)
        with torch.no_grad():
            assert torch.equal(token_cross_entropy(hidden, weight, targets), value)
    with pytest.raises(RuntimeError, match="one backward pass only"):
        loss.backward()


class LargestStorage(TorchDispatchMode):
    """Notes the elements of the largest storage that any operation writes to."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.itemsize)
        return out


def test_logits_of_all_rows_are_never_held():
    hidden, weight = torch.randn(1000, 4, requires_grad=True), torch.randn(300, 4, requires_grad=True)
    targets = torch.zeros(1000, dtype=torch.long)
    for chunk, largest in ((20, 20 * 300), (10**6, 1000 * 300)):
        with LargestStorage() as watch:
            token_logprobs(hidden, weight, targets, chunk_bytes=4 * 300 * chunk).sum().backward()
        assert watch.elements == largest
        with LargestStorage() as watch:
            token_cross_entropy(hidden, weight, targets, chunk_bytes=4 * 300 * chunk).backward()
        assert watch.elements == min(largest, 256 * 300)


@pytest.mark.parametrize("chunk_rows", [3, 8, 100])
def test_a_second_backward_pass_gives_the_same_gradient(chunk_rows):
    hidden, weight = torch.randn(8, 3, requires_grad=True), torch.randn(7, 3, requires_grad=True)
    logp = token_logprobs(hidden, weight, torch.arange(8) % 7, chunk_bytes=4 * 7 * chunk_rows)
    loss = (logp * torch.arange(8)).sum()
    first, second = (torch.autograd.grad(loss, (hidden, weight), retain_graph=True) for _ in range(2))
    for before, after in zip(first, second, strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize(
    ("hidden", "weight", "targets", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(5, 4), torch.zeros(2, dtype=torch.long), "same D"),
        (torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(3, dtype=torch.long), "targets_N has shape"),
        (torch.zeros(2, 3), torch.zeros(5, 3), torch.tensor([0, 5]), r"targets_N\[1\] is 5"),
        (torch.zeros(2, 3), torch.zeros(5, 3), torch.tensor([-1, 0]), r"targets_N\[0\] is -1"),
    ],
)
def test_bad_input_is_named(hidden, weight, targets, message):
    for function in (token_logprobs, token_cross_entropy):
        with pytest.raises(ValueError, match=message):
            function(hidden, weight, targets)
