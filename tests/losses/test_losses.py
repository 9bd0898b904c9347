import math

import pytest
import torch

from umedtrain import losses


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_sft_is_the_negative_sum_and_takes_weights():
    logp = torch.tensor([-1.0, -2.0, -0.5])
    assert losses.sft(logp).item() == 3.5
    assert losses.sft(logp, torch.tensor([1.0, 0.0, 2.0])).item() == 2.0


def test_dpo_starts_at_ln_2():
    chosen, rejected = torch.tensor([-10.0, -300.0]), torch.tensor([-12.0, -5.0])
    loss = losses.dpo(chosen, rejected, chosen, rejected, beta=0.3, label_smoothing=0.1)
    assert loss.tolist() == pytest.approx([math.log(2)] * 2, abs=1e-7)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_dpo_by_hand(smoothing):
    # h = (-10 + 12) - (-20 + 18) = 4; beta h = 2
    loss = losses.dpo(
        torch.tensor([-10.0]),
        torch.tensor([-20.0]),
        torch.tensor([-12.0]),
        torch.tensor([-18.0]),
        beta=0.5,
        label_smoothing=smoothing,
    )
    expected = -(1 - smoothing) * math.log(sigmoid(2.0)) - smoothing * math.log(sigmoid(-2.0))
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_dpo_gradient_by_hand():
    chosen = torch.tensor([-10.0], requires_grad=True)
    rejected = torch.tensor([-20.0], requires_grad=True)
    losses.dpo(chosen, rejected, torch.tensor([-12.0]), torch.tensor([-18.0]), beta=0.5).sum().backward()
    assert chosen.grad.item() == pytest.approx(-0.5 * sigmoid(-2.0), rel=1e-6)
    assert rejected.grad.item() == pytest.approx(0.5 * sigmoid(-2.0), rel=1e-6)


def test_dpo_far_from_zero_is_finite():
    huge = torch.tensor([-1e4], requires_grad=True)
    loss = losses.dpo(huge, torch.tensor([0.0]), torch.tensor([0.0]), torch.tensor([0.0]))
    loss.sum().backward()
    assert loss.item() == pytest.approx(1000.0)
    assert torch.isfinite(huge.grad).all()


@pytest.mark.parametrize(
    ("name", "value"),
    [("beta", 0.0), ("beta", math.nan), ("label_smoothing", 0.5), ("label_smoothing", -0.1)],
)
def test_dpo_refuses_settings_out_of_range(name, value):
    zero = torch.zeros(1)
    with pytest.raises(ValueError, match=name):
        losses.dpo(zero, zero, zero, zero, **{name: value})


def test_bradley_terry_by_hand():
    loss = losses.bradley_terry(torch.tensor([1.0, -50.0]), torch.tensor([-1.0, 50.0]))
    assert loss.tolist() == pytest.approx([-math.log(sigmoid(2.0)), 100.0])


def test_bradley_terry_with_margins_by_hand():
    loss = losses.bradley_terry(
        torch.tensor([1.0, 1.0]), torch.tensor([-1.0, -1.0]), margin_P=torch.tensor([0.5, -3.0])
    )
    assert loss.tolist() == pytest.approx([-math.log(sigmoid(1.5)), -math.log(sigmoid(5.0))])


def test_centering_by_hand():
    chosen = torch.tensor([1.0, -2.0, 3.0], dtype=torch.bfloat16, requires_grad=True)
    loss = losses.centering(chosen, torch.tensor([-1.0, -3.0, 1.0], dtype=torch.bfloat16))
    assert loss.dtype == torch.float32
    assert loss.tolist() == [0.0, 25.0, 16.0]
    loss.sum().backward()
    assert chosen.grad.tolist() == [0.0, -10.0, 8.0]
