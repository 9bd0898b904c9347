import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from umedtrain import losses

# Every loss on pairs, as a function of the same six tensors.
REFERENCED = {
    "dpo": losses.dpo,
    "cdpo": partial(losses.dpo, label_smoothing=0.2),
    "robust_dpo": partial(losses.robust_dpo, label_smoothing=0.2),
    "hinge": losses.hinge,
    "nca": losses.nca,
    "kto_pair": lambda *tensors, **options: losses.kto_pair(*tensors, 0.4, -0.3, **options),
}
REFERENCE_FREE = {"simpo": losses.simpo, "odds_ratio": losses.odds_ratio, "orpo": losses.orpo}
PAIRED = (
    {name: lambda c, r, rc, rr, lc, lr, loss=loss, **options: loss(c, r, rc, rr, **options)
     for name, loss in REFERENCED.items()}
    | {name: lambda c, r, rc, rr, lc, lr, loss=loss, **options: loss(c, r, lc, lr, **options)
       for name, loss in REFERENCE_FREE.items()}
    | {"ipo": losses.ipo, "ipo of sums": partial(losses.ipo, length_normalize=False)}
)  # fmt: skip
every_loss = pytest.mark.parametrize("loss", PAIRED.values(), ids=PAIRED.keys())


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def one(*numbers):
    """Each number as a tensor of one pair."""
    return [torch.tensor([float(number)]) for number in numbers]


def random_pairs(count, *, dtype=torch.float32, seed=0):
    """Log-probabilities (chosen, rejected, and the reference's) that depend on the lengths, and the lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [torch.randint(1, 30, (count,), generator=generator) for _ in range(2)]
    policy = [-(0.2 + torch.rand(count, generator=generator, dtype=dtype)) * length for length in lengths]
    reference = [logp + torch.randn(count, generator=generator, dtype=dtype) for logp in policy]
    return *policy, *reference, *lengths


# The pair of all hand-computed values: rho(chosen) = -10 + 12 = 2, rho(rejected) = -20 + 18 = -2, h = 4.
BY_HAND = (-10, -20, -12, -18)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.3])
def test_robust_dpo_by_hand(smoothing):
    loss = losses.robust_dpo(*one(*BY_HAND), beta=0.5, label_smoothing=smoothing)
    kept, flipped = -math.log(sigmoid(2.0)), -math.log(sigmoid(-2.0))
    expected = ((1 - smoothing) * kept - smoothing * flipped) / (1 - 2 * smoothing)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_robust_dpo_may_be_negative():
    # beta h = 2, e = 0.3: (0.7 * 0.126928 - 0.3 * 2.126928) / 0.4
    loss = losses.robust_dpo(*one(*BY_HAND), beta=0.5, label_smoothing=0.3)
    assert loss.item() == pytest.approx(-1.373072, abs=1e-6)


def test_ipo_by_hand_divides_by_each_answers_own_length():
    # 2 / 4 - (-2) / 8 = 0.75; the target is 1 / (2 * 0.5) = 1
    assert losses.ipo(*one(*BY_HAND, 4, 8), beta=0.5).item() == pytest.approx((0.75 - 1) ** 2)


def test_ipo_of_sums_by_hand_ignores_the_lengths():
    assert losses.ipo(*one(*BY_HAND), beta=0.5, length_normalize=False).item() == pytest.approx((4 - 1) ** 2)
    assert losses.ipo(*one(*BY_HAND, 4, 8), beta=0.5, length_normalize=False).item() == pytest.approx((4 - 1) ** 2)


def test_ipo_takes_means_that_are_made_already():
    means = one(-10 / 4, -20 / 8, -12 / 4, -18 / 8)
    assert losses.ipo(*means, beta=0.5, length_normalize=False).item() == pytest.approx((0.75 - 1) ** 2)


@pytest.mark.parametrize(("beta", "expected"), [(0.1, 0.6), (0.25, 0.0), (0.5, 0.0)])
def test_hinge_by_hand(beta, expected):
    assert losses.hinge(*one(*BY_HAND), beta=beta).item() == pytest.approx(expected, abs=1e-7)


def test_hinge_without_reference_is_slic_over_delta():
    # delta 15: max(0, 15 - (-10) + (-20)) = 5
    chosen, rejected, none, _ = one(-10, -20, 0, 0)
    assert losses.hinge(chosen, rejected, none, none, beta=1 / 15).item() == pytest.approx(5 / 15, rel=1e-5)


def test_nca_by_hand():
    expected = -math.log(sigmoid(1.0)) - 0.5 * math.log(sigmoid(-1.0)) - 0.5 * math.log(sigmoid(1.0))
    assert losses.nca(*one(*BY_HAND), beta=0.5).item() == pytest.approx(expected, rel=1e-6)


def test_simpo_by_hand():
    # means -2 and -2.5: 2 * 0.5 - 0.3 = 0.7
    loss = losses.simpo(*one(-10, -20, 5, 8), beta=2.0, gamma=0.3)
    assert loss.item() == pytest.approx(-math.log(sigmoid(0.7)), rel=1e-6)


def test_odds_ratio_and_orpo_by_hand():
    # A token's geometric mean probability is 1/2 and 1/5: odds 1 and 1/4, their ratio 4, its sigmoid(log) 4/5.
    pair = one(3 * math.log(1 / 2), 7 * math.log(1 / 5), 3, 7)
    assert losses.odds_ratio(*pair).item() == pytest.approx(math.log(5 / 4), rel=1e-6)
    assert losses.orpo(*pair, beta=0.25).item() == pytest.approx(math.log(2) + 0.25 * math.log(5 / 4), rel=1e-6)


def test_kto_by_hand():
    # rho = 2, 2, -1, -1 and z = 0.5
    loss = losses.kto(
        torch.tensor([-10.0, -10.0, -7.0, -7.0]),
        torch.tensor([-12.0, -12.0, -6.0, -6.0]),
        torch.tensor([True, False, True, False]),
        0.5,
        beta=0.4,
        desirable_weight=1.5,
        undesirable_weight=0.8,
    )
    expected = [1.5 * (1 - sigmoid(0.6)), 0.8 * sigmoid(0.6), 1.5 * (1 - sigmoid(-0.6)), 0.8 * sigmoid(-0.6)]
    assert loss.tolist() == pytest.approx(expected, rel=1e-6)


def test_kto_pair_by_hand_takes_each_sides_kl_from_the_other_side():
    # chosen: rho 2 against z_r = 0.5; rejected: rho -2 against z_c = 1
    loss = losses.kto_pair(*one(*BY_HAND), 1.0, 0.5, beta=0.4)
    expected = ((1 - sigmoid(0.4 * (2 - 0.5))) + (1 - sigmoid(0.4 * (1 + 2)))) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (losses.dpo, math.log(2)),
        (partial(losses.dpo, label_smoothing=0.2), math.log(2)),
        (losses.robust_dpo, math.log(2)),
        (losses.hinge, 1.0),
        (losses.nca, 2 * math.log(2)),
        (partial(losses.ipo, length_normalize=False), 1 / (4 * 0.3**2)),
        (lambda *tensors, beta: losses.ipo(*tensors, *one(5, 9), beta=beta), 1 / (4 * 0.3**2)),
        (lambda *tensors, beta: losses.kto_pair(*tensors, 0.0, 0.0, beta=beta), 0.5),
    ],
)
def test_where_the_policy_is_the_reference(loss, expected):
    chosen, rejected = one(-310.0, -4.0)
    assert loss(chosen, rejected, chosen, rejected, beta=0.3).item() == pytest.approx(expected, rel=1e-6)


def test_kto_where_the_policy_is_the_reference():
    logp = torch.tensor([-310.0, -4.0])
    loss = losses.kto(logp, logp, torch.tensor([True, False]), 0.0, desirable_weight=3.0, undesirable_weight=2.0)
    assert loss.tolist() == [1.5, 1.0]


def test_equal_means_without_margin_give_ln_2():
    tensors = one(-10, -25, 4, 10)
    assert losses.simpo(*tensors, gamma=0.0).item() == pytest.approx(math.log(2), rel=1e-6)
    assert losses.odds_ratio(*tensors).item() == pytest.approx(math.log(2), rel=1e-6)


def test_gradients_by_hand():
    def gradients(loss, *tensors, **options):
        chosen, rejected, *others = tensors
        chosen.requires_grad_()
        rejected.requires_grad_()
        loss(chosen, rejected, *others, **options).sum().backward()
        return chosen.grad.item(), rejected.grad.item()

    # beta h = 2 and beta rho = 1, -1 with beta = 0.5
    slope = -0.5 * (0.8 * sigmoid(-2.0) + 0.2 * sigmoid(2.0)) / 0.6
    assert gradients(losses.robust_dpo, *one(*BY_HAND), beta=0.5, label_smoothing=0.2) == pytest.approx((slope, -slope))
    assert gradients(losses.ipo, *one(*BY_HAND, 4, 8), beta=0.5) == pytest.approx((2 * -0.25 / 4, -2 * -0.25 / 8))
    assert gradients(losses.hinge, *one(*BY_HAND), beta=0.1) == pytest.approx((-0.1, 0.1))
    assert gradients(losses.hinge, *one(*BY_HAND), beta=0.5) == (0.0, 0.0)
    nca = (0.5 * (-sigmoid(-1.0) + 0.5 * sigmoid(1.0)), 0.5 * 0.5 * sigmoid(-1.0))
    assert gradients(losses.nca, *one(*BY_HAND), beta=0.5) == pytest.approx(nca)
    simpo = 2.0 * sigmoid(-0.7)
    assert gradients(losses.simpo, *one(-10, -20, 5, 8), beta=2.0, gamma=0.3) == pytest.approx((-simpo / 5, simpo / 8))
    # d log odds / d log p = 1 / (1 - p): 2 and 5/4, times 1 - 4/5 of the sigmoid
    pair = one(3 * math.log(1 / 2), 7 * math.log(1 / 5), 3, 7)
    assert gradients(losses.odds_ratio, *pair) == pytest.approx((-0.2 * 2 / 3, 0.2 * 1.25 / 7))
    pair = gradients(losses.kto_pair, *one(*BY_HAND, 1.0, 0.5)[:4], 1.0, 0.5, beta=0.4)
    by_hand = (-0.2 * sigmoid(0.6) * sigmoid(-0.6), 0.2 * sigmoid(1.2) * sigmoid(-1.2))
    assert pair == pytest.approx(by_hand)


def test_kto_gradient_by_hand_and_none_through_the_kl():
    policy = torch.tensor([-10.0, -7.0], requires_grad=True)
    kl = torch.tensor(0.5, requires_grad=True)
    reference, desirable = torch.tensor([-12.0, -6.0]), torch.tensor([True, False])
    losses.kto(policy, reference, desirable, kl, beta=0.4, undesirable_weight=0.5).sum().backward()
    slope = 0.4 * sigmoid(0.6) * sigmoid(-0.6)
    assert policy.grad.tolist() == pytest.approx([-slope, 0.5 * slope])
    assert kl.grad is None


def test_kto_pair_sends_gradient_through_a_kl_that_carries_a_graph():
    kl = torch.tensor([0.5, 0.5], requires_grad=True)
    losses.kto_pair(*one(*BY_HAND), kl[0], kl[1], beta=0.4).sum().backward()
    # z_c = 0.5 meets rho(rejected) = -2, z_r = 0.5 meets rho(chosen) = 2
    chosen, rejected = 0.4 * (2 - 0.5), 0.4 * (0.5 + 2)
    slopes = [-0.2 * sigmoid(rejected) * sigmoid(-rejected), 0.2 * sigmoid(chosen) * sigmoid(-chosen)]
    assert kl.grad.tolist() == pytest.approx(slopes)


@every_loss
def test_gradcheck_of_pairs(loss):
    chosen, rejected, *others = random_pairs(6, dtype=torch.float64)
    chosen.requires_grad_()
    rejected.requires_grad_()
    assert torch.autograd.gradcheck(lambda c, r: loss(c, r, *others), (chosen, rejected))


def test_gradcheck_of_kto():
    policy, _, reference, *_ = random_pairs(6, dtype=torch.float64)
    desirable = torch.tensor([True, False, False, True, True, False])
    weights = {"desirable_weight": 1.3, "undesirable_weight": 0.7}
    check = lambda policy: losses.kto(policy, reference, desirable, 0.2, **weights)
    assert torch.autograd.gradcheck(check, (policy.requires_grad_(),))


@every_loss
def test_each_pair_has_its_own_fp32_loss_that_no_other_pair_changes(loss):
    tensors = random_pairs(7)
    together = loss(*tensors)
    assert together.shape == (7,)
    assert together.dtype == torch.float32
    alone = torch.cat([loss(*(tensor[pair : pair + 1] for tensor in tensors)) for pair in range(7)])
    assert torch.equal(together, alone)


@every_loss
def test_no_pairs_give_no_losses_and_stay_connected_to_the_graph(loss):
    chosen, rejected, *others = random_pairs(0)
    chosen.requires_grad_()
    total = loss(chosen, rejected, *others).sum()
    total.backward()
    assert total.item() == 0
    assert chosen.grad.shape == (0,)


@pytest.mark.parametrize("label", [True, False])
def test_kto_of_answers_of_one_kind_or_of_none(label):
    policy, _, reference, *_ = random_pairs(3)
    policy.requires_grad_()
    for count in (3, 0):
        loss = losses.kto(policy[:count], reference[:count], torch.full((count,), label), 0.1)
        assert loss.shape == (count,)
        loss.sum().backward()
    assert torch.isfinite(policy.grad).all()


@every_loss
def test_a_step_down_raises_the_chosen_answer_and_lowers_the_rejected_at_the_start(loss):
    chosen, rejected, _, _, *lengths = random_pairs(5)
    reference = chosen.clone(), rejected.clone()
    chosen.requires_grad_()
    rejected.requires_grad_()
    loss(chosen, rejected, *reference, *lengths).sum().backward()
    assert (chosen.grad < 0).all()
    assert (rejected.grad > 0).all()


@every_loss
@pytest.mark.parametrize("far", [-1e4, -1e-9, 0.0])
def test_extreme_log_probabilities_give_finite_losses_and_gradients(loss, far):
    for flip in (False, True):
        policy = [torch.tensor([far], requires_grad=True), torch.tensor([-5.0], requires_grad=True)]
        chosen, rejected = reversed(policy) if flip else policy
        total = loss(chosen, rejected, *one(-6, -5, 3, 3)).sum()
        total.backward()
        assert math.isfinite(total.item())
        assert all(torch.isfinite(logp.grad).all() for logp in policy)


@pytest.mark.parametrize("p", [0.5, 0.999, 1 - 2**-15, 1e-3, 1e-12])
def test_odds_are_accurate_at_both_ends(p):
    # Against a rejected answer of even odds the log odds of the chosen one are -log(1 / sigmoid - 1) of the loss.
    logp = torch.tensor([p], dtype=torch.float64).log().float()
    loss = losses.odds_ratio(torch.tensor([math.log(0.5)]), logp, *one(1, 1)).double()
    log_odds = torch.log(torch.expm1(loss)).item()
    exact = logp.double().item()
    assert log_odds == pytest.approx(exact - math.log(-math.expm1(exact)), abs=2e-5)


@settings(max_examples=50, deadline=None)
@given(
    rho=st.tuples(st.floats(-40, 40), st.floats(-40, 40)),
    beta=st.floats(0.01, 2.0),
    smoothing=st.floats(0.0, 0.45),
)
def test_exchanging_the_two_answers(rho, beta, smoothing):
    zero = torch.zeros(1, dtype=torch.float64)
    chosen, rejected = (zero + number for number in rho)
    margin = rho[0] - rho[1]

    def both(loss, *more, **options):
        kept = loss(chosen, rejected, zero, zero, *more, beta=beta, **options).item()
        return kept, loss(rejected, chosen, zero, zero, *more, beta=beta, **options).item()

    # -log sigmoid(x) + log sigmoid(-x) = -x
    kept, flipped = both(losses.dpo)
    assert kept - flipped == pytest.approx(-beta * margin, abs=1e-9)
    smoothed = both(losses.dpo, label_smoothing=smoothing)
    assert smoothed[0] == pytest.approx((1 - smoothing) * kept + smoothing * flipped, abs=1e-9)
    # Robust DPO is unbiased: flipped with probability e, its mean is the loss of the right label.
    robust = both(losses.robust_dpo, label_smoothing=smoothing)
    assert (1 - smoothing) * robust[0] + smoothing * robust[1] == pytest.approx(kept, abs=1e-8)
    ipo = both(losses.ipo, length_normalize=False)
    assert ipo[0] - ipo[1] == pytest.approx(-2 * margin / beta, abs=1e-6)
    hinge = both(losses.hinge)
    assert sum(hinge) == pytest.approx(max(2.0, 1 + abs(beta * margin)), abs=1e-9)
    # Its noise terms are symmetric.
    nca = both(losses.nca)
    pulls = [math.log1p(math.exp(-beta * number)) for number in rho]
    assert nca[0] - nca[1] == pytest.approx(pulls[0] - pulls[1], abs=1e-9)
    pair = both(losses.kto_pair, 0.7, 0.7)
    assert sum(pair) == pytest.approx(1.0, abs=1e-12)


@settings(max_examples=50, deadline=None)
@given(
    means=st.tuples(st.floats(-20, -0.01), st.floats(-20, -0.01)),
    lengths=st.tuples(st.integers(1, 500), st.integers(1, 500)),
    gamma=st.floats(0.0, 3.0),
)
def test_reference_free_losses_see_means_only(means, lengths, gamma):
    ones = torch.ones(2, dtype=torch.float64)
    chosen, rejected = (torch.tensor([mean], dtype=torch.float64) for mean in means)
    long, short = (torch.tensor([length]) for length in lengths)
    for loss in (partial(losses.simpo, gamma=gamma), losses.odds_ratio, losses.orpo):
        expected = loss(chosen, rejected, ones[:1], ones[:1]).item()
        assert loss(chosen * long, rejected * short, long, short).item() == pytest.approx(expected, rel=1e-9)
    zero = torch.zeros(1, dtype=torch.float64)
    simpo = losses.simpo(chosen, rejected, ones[:1], ones[:1], beta=0.7, gamma=0.0)
    assert simpo.item() == pytest.approx(losses.dpo(chosen, rejected, zero, zero, beta=0.7).item(), rel=1e-12)
    odds = [losses.odds_ratio(*pair, ones[:1], ones[:1]).item() for pair in ((chosen, rejected), (rejected, chosen))]
    ratio = [mean - math.log(-math.expm1(mean)) for mean in means]
    assert odds[0] - odds[1] == pytest.approx(ratio[1] - ratio[0], abs=1e-9)


@pytest.mark.parametrize("name", ["dpo", "cdpo", "robust_dpo", "hinge", "ipo of sums"])
def test_only_the_difference_of_the_log_ratios_counts(name):
    chosen, rejected, *reference, _, _ = random_pairs(5, dtype=torch.float64)
    loss = lambda *tensors: PAIRED[name](*tensors, None, None)
    expected = loss(chosen, rejected, *reference)
    torch.testing.assert_close(loss(chosen + 3, rejected + 3, *reference), expected)
    prompt = torch.tensor([-100.0, -3.0, -7.0, 0.0, -40.0], dtype=torch.float64)
    torch.testing.assert_close(loss(*(tensor + prompt for tensor in (chosen, rejected, *reference))), expected)


def test_nca_pulls_the_chosen_answer_to_ln_2_over_beta_and_pushes_the_rejected_down_forever():
    zero = torch.zeros(3)
    chosen = (math.log(2) / 0.25 + torch.tensor([-1.0, 0.0, 1.0])).requires_grad_()
    rejected = torch.tensor([-50.0, 0.0, 50.0], requires_grad=True)
    losses.nca(chosen, rejected, zero, zero, beta=0.25).sum().backward()
    assert chosen.grad[0] < 0 < chosen.grad[2]
    assert chosen.grad[1].item() == pytest.approx(0, abs=1e-7)
    assert (rejected.grad > 0).all()


def test_ipo_is_least_where_the_mean_margin_is_its_target():
    lengths = torch.tensor([6]), torch.tensor([3])
    rho = torch.tensor([6 * 1 / (2 * 0.2)]), torch.zeros(1)
    assert losses.ipo(*rho, torch.zeros(1), torch.zeros(1), *lengths, beta=0.2).item() == pytest.approx(0, abs=1e-10)


def test_good_and_bad_losses_of_one_answer_sum_to_one():
    policy, _, reference, *_ = random_pairs(9)
    labels = torch.arange(9) % 2 == 0
    total = losses.kto(policy, reference, labels, 0.3) + losses.kto(policy, reference, ~labels, 0.3)
    torch.testing.assert_close(total, torch.ones(9))


def test_kto_pair_is_the_mean_of_kto_on_both_sides():
    chosen, rejected, reference_chosen, reference_rejected, *_ = random_pairs(5)
    good = losses.kto(chosen, reference_chosen, torch.full((5,), True), 0.2, beta=0.3)
    bad = losses.kto(rejected, reference_rejected, torch.full((5,), False), 0.6, beta=0.3)
    pair = losses.kto_pair(chosen, rejected, reference_chosen, reference_rejected, 0.6, 0.2, beta=0.3)
    torch.testing.assert_close(pair, (good + bad) / 2)


@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_a_negative_kl_counts_as_none(kind):
    policy, _, reference, *_ = random_pairs(4)
    labels = torch.tensor([True, False, True, False])
    assert torch.equal(losses.kto(policy, reference, labels, kind(-2.0)), losses.kto(policy, reference, labels, 0.0))
    tensors = random_pairs(4)[:4]
    none = losses.kto_pair(*tensors, 0.0, 0.0)
    assert torch.equal(losses.kto_pair(*tensors, kind(-2.0), kind(-1.0)), none)


def test_kl_is_to_be_clamped_after_the_reduction_over_ranks():
    """Two ranks estimate -1 and 2: the step's z is 0.5. Ranks that clamp alone would use 0 and 2, or 1 in the mean."""
    policy, reference, label = torch.tensor([-3.0]), torch.tensor([-4.0]), torch.tensor([True])
    ranks = torch.tensor([-1.0, 2.0])
    loss = losses.kto(policy, reference, label, ranks.mean(), beta=0.4)
    assert loss.item() == pytest.approx(1 - sigmoid(0.4 * (1 - 0.5)), rel=1e-6)


def test_nll_beside_a_loss_keeps_the_chosen_answer_up():
    """`+ alpha * NLL`: DPO is content when both fall, as long as the rejected answer falls further."""
    chosen, rejected, *reference = one(-30, -60, -10, -20)
    chosen.requires_grad_()
    length = torch.tensor([5])
    loss = losses.dpo(chosen, rejected, *reference, beta=0.5) - 0.3 * chosen / length
    assert loss.item() == pytest.approx(-math.log(sigmoid(0.5 * 20)) + 0.3 * 6, rel=1e-6)
    loss.sum().backward()
    assert chosen.grad.item() == pytest.approx(-0.5 * sigmoid(-10.0) - 0.3 / 5, rel=1e-5)


@pytest.mark.parametrize("name", [name for name in PAIRED if name != "odds_ratio"])
@pytest.mark.parametrize("beta", [0.0, -0.1, math.nan, math.inf])
def test_a_beta_that_is_not_positive_is_refused(name, beta):
    with pytest.raises(ValueError, match="beta must be positive"):
        PAIRED[name](*random_pairs(2), beta=beta)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, "beta must be positive"),
        ({"desirable_weight": -1.0}, "desirable_weight must be at least 0"),
        ({"undesirable_weight": math.nan}, "undesirable_weight must be at least 0"),
        ({"kl": torch.zeros(2)}, r"kl must be one number for the whole step, got shape \(2,\)"),
        ({"desirable_N": torch.tensor([1, 0])}, "desirable_N must be bool, got torch.int64"),
        ({"desirable_N": torch.tensor([True])}, r"desirable_N has shape \(1,\), wanted \(2,\) like policy_N"),
        ({"reference_N": torch.zeros(2, 1)}, r"reference_N has shape \(2, 1\)"),
    ],
)
def test_bad_input_to_kto_is_named(options, message):
    good = {
        "policy_N": torch.zeros(2),
        "reference_N": torch.zeros(2),
        "desirable_N": torch.tensor([True, False]),
        "kl": 0.0,
    }
    with pytest.raises(ValueError, match=message):
        losses.kto(**(good | options))


@pytest.mark.parametrize("name", ["chosen_kl", "rejected_kl"])
def test_bad_kl_of_kto_pair_is_named(name):
    estimates = {"chosen_kl": 0.0, "rejected_kl": 0.0} | {name: torch.zeros(3)}
    with pytest.raises(ValueError, match=name):
        losses.kto_pair(*random_pairs(3)[:4], **estimates)


@pytest.mark.parametrize("smoothing", [-0.1, 0.5, math.nan])
def test_label_smoothing_out_of_range_is_refused(smoothing):
    with pytest.raises(ValueError, match="label_smoothing"):
        losses.robust_dpo(*random_pairs(2)[:4], label_smoothing=smoothing)


@pytest.mark.parametrize("gamma", [-0.1, math.nan, math.inf])
def test_gamma_out_of_range_is_refused(gamma):
    chosen, rejected, _, _, *lengths = random_pairs(2)
    with pytest.raises(ValueError, match="gamma"):
        losses.simpo(chosen, rejected, *lengths, gamma=gamma)


@every_loss
def test_tensors_that_would_broadcast_are_refused(loss):
    chosen, rejected, *others = random_pairs(3)
    with pytest.raises(ValueError, match=r"policy_rejected_P has shape \(3, 1\), wanted \(3,\)"):
        loss(chosen, rejected[:, None], *others)


@pytest.mark.parametrize("loss", [losses.simpo, losses.odds_ratio, losses.orpo])
def test_lengths_below_one_are_named_where_there_is_no_reference(loss):
    with pytest.raises(ValueError, match=r"rejected_length_P\[1\] is 0"):
        loss(torch.tensor([-9.0, -9.0]), torch.tensor([-9.0, -9.0]), torch.tensor([3, 3]), torch.tensor([3, 0]))


def test_lengths_of_ipo_are_named_when_bad_or_missing():
    tensors = random_pairs(2)[:4]
    good = torch.tensor([3, 4])
    with pytest.raises(ValueError, match=r"chosen_length_P is missing: IPO divides by it unless length_normalize"):
        losses.ipo(*tensors)
    with pytest.raises(ValueError, match=r"rejected_length_P is missing"):
        losses.ipo(*tensors, good)
    with pytest.raises(ValueError, match=r"chosen_length_P\[1\] is 0: an answer has at least one token"):
        losses.ipo(*tensors, torch.tensor([3, 0]), good)
    with pytest.raises(ValueError, match=r"rejected_length_P has shape \(1,\)"):
        losses.ipo(*tensors, good, good[:1])
