"""Losses on pairs of answers to one prompt. Pure functions of sequence log-probabilities.

Shape suffix: P pairs.

A sequence's log-probability is the sum over its answer's tokens, terminator included, in nats; its length is the number
of those tokens. A sum of a thousand tokens needs fp32 (bf16 resolves it to 2 to 4 nats); every function here computes
in the dtype that it is given. Each gives one loss per pair and averages nothing: divide the sum by the number of pairs
of the whole optimizer step, over all ranks and micro-batches. With

    rho(y) = log pi(y) - log ref(y)         h = rho(chosen) - rho(rejected)

`dpo`, `robust_dpo`, `ipo` and `hinge` see h alone, `nca` sees both rho; `simpo` and `orpo` need no reference.

Any of them `+ alpha * NLL` (Pang et al. 2024, arXiv 2404.19733, version 3; version 1 weighted the other term) is
`- alpha * policy_chosen_P / chosen_length_P` added to the loss; without the length, alpha has another meaning.
"""

import math

import torch
import torch.nn.functional as F


def dpo(
    policy_chosen_P: torch.Tensor,
    policy_rejected_P: torch.Tensor,
    reference_chosen_P: torch.Tensor,
    reference_rejected_P: torch.Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290, eq. 7), per pair, fp32 [P].

        h = (log pi(chosen) - log ref(chosen)) - (log pi(rejected) - log ref(rejected))
        loss = -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)

    e is `label_smoothing`: the probability that a pair is labelled the wrong way round (cDPO; Mitchell 2023, "A note
    on DPO with noisy preferences"). With the policy equal to the reference the loss is ln 2. Divide the sum by the
    number of pairs of the whole optimizer step.

    Given means over tokens instead of sums it is length-normalised DPO (Tulu 3; Lambert et al. 2024, arXiv
    2411.15124), which wants a larger beta: 5 there.

    Raises:
        ValueError: unless beta > 0 and 0 <= label_smoothing < 0.5, and for log-probabilities of different shapes.
    """
    check_beta(beta)
    _check_label_smoothing(label_smoothing)
    h_P = _margin(policy_chosen_P, policy_rejected_P, reference_chosen_P, reference_rejected_P)
    return -(1 - label_smoothing) * F.logsigmoid(beta * h_P) - label_smoothing * F.logsigmoid(-beta * h_P)


def robust_dpo(
    policy_chosen_P: torch.Tensor,
    policy_rejected_P: torch.Tensor,
    reference_chosen_P: torch.Tensor,
    reference_rejected_P: torch.Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.1,
) -> torch.Tensor:
    """Robust DPO (Chowdhury, Kini and Natarajan 2024, arXiv 2403.00409, section 3.1), per pair, fp32 [P].

        loss = (-(1 - e) log sigmoid(beta h) + e log sigmoid(-beta h)) / (1 - 2 e)

    e is `label_smoothing`, the probability of a wrong label, 0.1 in the paper. Where labels are flipped with
    probability e, the expected loss is DPO's on the true labels. One pair's loss may be negative and has no lower
    bound. With the policy equal to the reference it is ln 2; with e = 0 it is DPO.

    Raises:
        ValueError: unless beta > 0 and 0 <= label_smoothing < 0.5, and for log-probabilities of different shapes.
    """
    check_beta(beta)
    _check_label_smoothing(label_smoothing)
    h_P = _margin(policy_chosen_P, policy_rejected_P, reference_chosen_P, reference_rejected_P)
    as_labelled_P, flipped_P = -F.logsigmoid(beta * h_P), -F.logsigmoid(-beta * h_P)
    return ((1 - label_smoothing) * as_labelled_P - label_smoothing * flipped_P) / (1 - 2 * label_smoothing)


def ipo(
    policy_chosen_P: torch.Tensor,
    policy_rejected_P: torch.Tensor,
    reference_chosen_P: torch.Tensor,
    reference_rejected_P: torch.Tensor,
    chosen_length_P: torch.Tensor | None = None,
    rejected_length_P: torch.Tensor | None = None,
    *,
    beta: float = 0.1,
    length_normalize: bool = True,
) -> torch.Tensor:
    """Identity preference optimisation (Azar et al. 2023, arXiv 2310.12036, eq. 17), per pair, fp32 [P].

        h = rho(chosen) / |chosen| - rho(rejected) / |rejected|
        loss = (h - 1 / (2 beta))^2

    beta is the paper's tau. The equation has no lengths; dividing by them makes one beta mean the same for short and
    long answers. TRL does so since its pull request 1265, after asking the paper's authors, and so does HALOs; the
    DPO authors' code and OpenRLHF take sums. A beta tuned with the one is wrong by the answers' length with the other.

    With `length_normalize=False` the log-probabilities are taken as they are, whether sums or already means, and no
    length is used. With the policy equal to the reference the loss is 1 / (4 beta^2); it is 0 where h = 1 / (2 beta).

    Args:
        chosen_length_P: numbers of tokens that `policy_chosen_P` and `reference_chosen_P` are sums over.
        rejected_length_P: the same of the rejected answers.

    Raises:
        ValueError: unless beta > 0; for tensors of different shapes; for a length that is missing or, on CPU tensors,
            below 1.
    """
    check_beta(beta)
    if length_normalize:
        for name, length_P in (("chosen_length_P", chosen_length_P), ("rejected_length_P", rejected_length_P)):
            if length_P is None:
                raise ValueError(f"{name} is missing: IPO divides by it unless length_normalize is false")
        policy_chosen_P, policy_rejected_P = _means(
            policy_chosen_P, policy_rejected_P, chosen_length_P, rejected_length_P
        )
        reference_chosen_P, reference_rejected_P = _means(
            reference_chosen_P, reference_rejected_P, chosen_length_P, rejected_length_P, of="reference"
        )
    h_P = _margin(policy_chosen_P, policy_rejected_P, reference_chosen_P, reference_rejected_P)
    return (h_P - 1 / (2 * beta)) ** 2


def hinge(
    policy_chosen_P: torch.Tensor,
    policy_rejected_P: torch.Tensor,
    reference_chosen_P: torch.Tensor,
    reference_rejected_P: torch.Tensor,
    *,
    beta: float = 0.1,
) -> torch.Tensor:
    """Hinge loss on the margin (Liu et al. 2023, RSO, arXiv 2309.06657, "hinge-norm"), per pair, fp32 [P].

        loss = max(0, 1 - beta h)

    beta is RSO's gamma. With both references 0 and beta = 1 / delta this is the calibration loss of SLiC-HF (Zhao et
    al. 2023, arXiv 2305.10425, section 2), max(0, delta - log pi(chosen) + log pi(rejected)), divided by delta. With
    the policy equal to the reference the loss is 1; from h = 1 / beta on it is 0 and sends no gradient.

    Raises:
        ValueError: unless beta > 0, and for log-probabilities of different shapes.
    """
    check_beta(beta)
    h_P = _margin(policy_chosen_P, policy_rejected_P, reference_chosen_P, reference_rejected_P)
    return F.relu(1 - beta * h_P)


def nca(
    policy_chosen_P: torch.Tensor,
    policy_rejected_P: torch.Tensor,
    reference_chosen_P: torch.Tensor,
    reference_rejected_P: torch.Tensor,
    *,
    beta: float = 0.1,
) -> torch.Tensor:
    """Noise contrastive alignment of a pair (Chen et al. 2024, arXiv 2402.05369, section 4.1), per pair, fp32 [P].

        loss = -log sigmoid(beta rho(chosen))
               - 1/2 log sigmoid(-beta rho(chosen)) - 1/2 log sigmoid(-beta rho(rejected))

    beta is the paper's alpha. Unlike DPO it knows where rho is, not only the difference: the chosen answer is pulled
    towards beta rho = ln 2 and the rejected answer's rho is pushed down without end. With the policy equal to the
    reference the loss is 2 ln 2.

    Raises:
        ValueError: unless beta > 0, and for log-probabilities of different shapes.
    """
    check_beta(beta)
    chosen_P, rejected_P = _log_ratios(policy_chosen_P, policy_rejected_P, reference_chosen_P, reference_rejected_P)
    noise_P = -0.5 * F.logsigmoid(-beta * chosen_P) - 0.5 * F.logsigmoid(-beta * rejected_P)
    return -F.logsigmoid(beta * chosen_P) + noise_P


def simpo(
    policy_chosen_P: torch.Tensor,
    policy_rejected_P: torch.Tensor,
    chosen_length_P: torch.Tensor,
    rejected_length_P: torch.Tensor,
    *,
    beta: float = 2.0,
    gamma: float = 0.5,
) -> torch.Tensor:
    """Simple preference optimisation (Meng, Xia and Chen 2024, arXiv 2405.14734, eq. 6), per pair, fp32 [P].

        loss = -log sigmoid(beta log pi(chosen) / |chosen| - beta log pi(rejected) / |rejected| - gamma)

    gamma is the margin wanted of the rewards, in beta's units; the authors' configuration names gamma / beta instead,
    0.25 for the defaults here. There is no reference.

    Raises:
        ValueError: unless beta > 0 and gamma >= 0; for tensors of different shapes; for a length below 1 in a CPU
            tensor.
    """
    check_beta(beta)
    if not 0 <= gamma < math.inf:
        raise ValueError(f"gamma must be at least 0 and finite, got {gamma}")
    chosen_P, rejected_P = _means(policy_chosen_P, policy_rejected_P, chosen_length_P, rejected_length_P)
    return -F.logsigmoid(beta * (chosen_P - rejected_P) - gamma)


def odds_ratio(
    policy_chosen_P: torch.Tensor,
    policy_rejected_P: torch.Tensor,
    chosen_length_P: torch.Tensor,
    rejected_length_P: torch.Tensor,
) -> torch.Tensor:
    """ORPO's term for preferences, L_OR (Hong, Lee and Thorne 2024, arXiv 2403.07691, eq. 7), per pair, fp32 [P].

        log p(y) = log pi(y) / |y|          log odds(y) = log p(y) - log(1 - p(y))
        loss = -log sigmoid(log odds(chosen) - log odds(rejected))

    Add it, weighted, to the negative log-likelihood of the chosen answer: alone it does not keep that likely. `orpo`
    adds them per pair as the paper does. A mean log-probability that rounds to 0, whose odds are infinite, counts as
    -2^-24 and receives no gradient.

    Raises:
        ValueError: for tensors of different shapes, or a length below 1 in a CPU tensor.
    """
    chosen_P, rejected_P = _means(policy_chosen_P, policy_rejected_P, chosen_length_P, rejected_length_P)
    return -F.logsigmoid(_log_odds(chosen_P) - _log_odds(rejected_P))


def orpo(
    policy_chosen_P: torch.Tensor,
    policy_rejected_P: torch.Tensor,
    chosen_length_P: torch.Tensor,
    rejected_length_P: torch.Tensor,
    *,
    beta: float = 0.1,
) -> torch.Tensor:
    """Odds ratio preference optimisation (Hong, Lee and Thorne 2024, arXiv 2403.07691, eq. 6), per pair, fp32 [P].

        loss = -log pi(chosen) / |chosen| + beta L_OR

    beta is the paper's lambda and L_OR is `odds_ratio`. There is no reference. The first addend is a mean over each
    answer's tokens; for one over all tokens of the optimizer step (TRL and Liger: of the micro-batch, and TRL's
    includes the prompt's) add `beta * odds_ratio(...)` to that yourself.

    Raises:
        ValueError: unless beta > 0; for tensors of different shapes; for a length below 1 in a CPU tensor.
    """
    check_beta(beta)
    odds_ratio_P = odds_ratio(policy_chosen_P, policy_rejected_P, chosen_length_P, rejected_length_P)
    return -policy_chosen_P / chosen_length_P + beta * odds_ratio_P


def check_beta(beta: float) -> None:
    """ValueError unless beta is positive and finite."""
    if not 0 < beta < math.inf:
        raise ValueError(f"beta must be positive and finite, got {beta}")


def check_shapes(**tensors: torch.Tensor) -> None:
    """ValueError, which names the tensor, unless all shapes are the first one's: broadcasting would mix up pairs."""
    (first, wanted), *others = ((name, tuple(tensor.shape)) for name, tensor in tensors.items())
    for name, shape in others:
        if shape != wanted:
            raise ValueError(f"{name} has shape {shape}, wanted {wanted} like {first}")


def _check_label_smoothing(label_smoothing: float) -> None:
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing}")


def _log_ratios(
    policy_chosen_P: torch.Tensor,
    policy_rejected_P: torch.Tensor,
    reference_chosen_P: torch.Tensor,
    reference_rejected_P: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """[P] each: rho of the chosen and of the rejected answers."""
    check_shapes(
        policy_chosen_P=policy_chosen_P,
        policy_rejected_P=policy_rejected_P,
        reference_chosen_P=reference_chosen_P,
        reference_rejected_P=reference_rejected_P,
    )
    return policy_chosen_P - reference_chosen_P, policy_rejected_P - reference_rejected_P


def _margin(
    policy_chosen_P: torch.Tensor,
    policy_rejected_P: torch.Tensor,
    reference_chosen_P: torch.Tensor,
    reference_rejected_P: torch.Tensor,
) -> torch.Tensor:
    """[P]: h."""
    chosen_P, rejected_P = _log_ratios(policy_chosen_P, policy_rejected_P, reference_chosen_P, reference_rejected_P)
    return chosen_P - rejected_P


def _means(
    chosen_P: torch.Tensor,
    rejected_P: torch.Tensor,
    chosen_length_P: torch.Tensor,
    rejected_length_P: torch.Tensor,
    *,
    of: str = "policy",
) -> tuple[torch.Tensor, torch.Tensor]:
    """[P] each: mean log-probability of a token of the chosen and of the rejected answers."""
    lengths = {"chosen_length_P": chosen_length_P, "rejected_length_P": rejected_length_P}
    check_shapes(**{f"{of}_chosen_P": chosen_P, f"{of}_rejected_P": rejected_P}, **lengths)
    chosen_P = _per_token(chosen_P, chosen_length_P, "chosen_length_P")
    return chosen_P, _per_token(rejected_P, rejected_length_P, "rejected_length_P")


def _per_token(logp_P: torch.Tensor, length_P: torch.Tensor, name: str) -> torch.Tensor:
    # Reading the flag would make a GPU wait for the host, so only CPU tensors are checked; on a GPU it gives NaN.
    if length_P.device.type == "cpu" and (length_P < 1).any():
        pair = int((length_P < 1).nonzero()[0])
        raise ValueError(f"{name}[{pair}] is {length_P[pair].item()}: an answer has at least one token, its terminator")
    return logp_P / length_P


def _log_odds(logp_P: torch.Tensor) -> torch.Tensor:
    """log(p / (1 - p)) from log p, accurate at both ends."""
    logp_P = logp_P.clamp(max=-(2.0**-24))
    return logp_P - torch.log(-torch.expm1(logp_P))
