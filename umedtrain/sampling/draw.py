"""From logits to tokens: random numbers without a state, and draws from truncated distributions without
sorting.

The numbers that choose a token are hashes of its request's seed and prompt, its sample's index and its
position, so a token does not depend on what is computed beside it, before it, or on which machine.

Shape suffixes: R rows (samples), V vocabulary, W likeliest tokens, N blocks of the vocabulary, B tokens of a
block.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count

import numpy as np
import torch

from umedtrain.sampling.params import SamplingParams

_GOLDEN = 0x9E3779B97F4A7C15
_BLOCK = 64


def request_key(seed: int, prompt: Sequence[int]) -> int:
    """64 bits, as a signed integer, that stand for a seed and a prompt."""
    data = f"{seed}:".encode() + np.asarray(prompt, dtype="<i8").tobytes()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)


def derive_keys(key_R: torch.Tensor, index: torch.Tensor | int) -> torch.Tensor:
    """A key, int64 [R], for each index (of a sample, a position) under each key.

    This is output number `index` of the SplitMix64 generator (Steele et al. 2014) that starts at the key.
    Integers wrap, so int64 serves as the unsigned words for which PyTorch has no arithmetic.
    """
    z = key_R + (torch.as_tensor(index, device=key_R.device) + 1) * _signed(_GOLDEN)
    z = (z ^ _shift_right(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift_right(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shift_right(z, 31)


def uniforms(key_R: torch.Tensor, index: int) -> torch.Tensor:
    """Number `index` of each key: fp64 [R] in [0, 1), with 53 random bits."""
    return _shift_right(derive_keys(key_R, index), 11).double() * 2.0**-53


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


@dataclass(frozen=True)
class Policy:
    """Temperature and truncation of every row, and what the host must know to skip work.

    Attributes:
        temperature: fp32 [R]; 0 for greedy.
        top_k: int64 [R], at least 1; the vocabulary's size for all.
        top_p: fp64 [R].
        most_k: largest top-k that cuts anything off; 0 if none does.
        any_greedy, all_greedy, any_cut: some row is greedy; all are; some sampled row has a top-k or top-p.
    """

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    most_k: int
    any_greedy: bool
    all_greedy: bool
    any_cut: bool

    @classmethod
    def of(cls, params_R: Sequence[SamplingParams], vocab_size: int, device: torch.device) -> "Policy":
        """The policy of rows with these parameters."""
        # As fp32, in which the smallest positive numbers are 0.
        temperatures = [float(np.float32(params.temperature)) for params in params_R]
        top_k = [min(params.top_k or vocab_size, vocab_size) for params in params_R]
        top_p = [params.top_p for params in params_R]
        cutting_k = [k for k in top_k if k < vocab_size]
        return cls(
            torch.tensor(temperatures, dtype=torch.float32, device=device),
            torch.tensor(top_k, device=device),
            torch.tensor(top_p, dtype=torch.float64, device=device),
            most_k=max(cutting_k, default=0),
            any_greedy=0 in temperatures,
            all_greedy=not any(temperatures),
            any_cut=bool(cutting_k) or min(top_p) < 1,
        )

    def rows(self, rows: slice | torch.Tensor) -> "Policy":
        """The policy of some of the rows."""
        return replace(
            self,
            temperature=self.temperature[rows],
            top_k=self.top_k[rows],
            top_p=self.top_p[rows],
        )


def choose(logits_RV: torch.Tensor, key_R: torch.Tensor, policy: Policy) -> torch.Tensor:
    """The next token, int64 [R], of each row from its fp32 logits and the key of its position."""
    if policy.all_greedy:
        return logits_RV.argmax(-1)
    # Greedy rows are drawn like the others, at temperature 1, and then overwritten.
    is_greedy_R = policy.temperature == 0
    temperature_R1 = torch.where(is_greedy_R, 1.0, policy.temperature)[:, None]
    weights_RV = (logits_RV - logits_RV.amax(-1, keepdim=True)).div_(temperature_R1).exp_()
    if policy.any_cut:
        token_R = _draw_truncated(weights_RV, key_R, policy)
    else:
        token_R = _inverse_cdf(weights_RV, uniforms(key_R, 0))
    return torch.where(is_greedy_R, logits_RV.argmax(-1), token_R) if policy.any_greedy else token_R


def _draw_truncated(weights_RV: torch.Tensor, key_R: torch.Tensor, policy: Policy) -> torch.Tensor:
    """Draw from the k likeliest tokens, and of these from the smallest set with mass top_p, by rejection.

    With tokens in order of falling weight, then rising id, the wanted set is a prefix. A token drawn from all
    is in it if few enough tokens, of little enough mass, come before; that takes no sort. If it is not in,
    then neither is anything after it, and the next draw is from what comes before it. Every accepted token
    has the wanted probability, because a refused draw says nothing about which member of the set comes next.
    """
    weights_RV, total_R = _cut_top_k(weights_RV, policy)
    limit_R = policy.top_p * total_R
    ids_V = torch.arange(weights_RV.shape[1], device=weights_RV.device)
    result_R = torch.empty_like(key_R)
    rows = torch.arange(len(key_R), device=key_R.device)
    for attempt in count():
        token_R = _inverse_cdf(weights_RV, uniforms(key_R[rows], attempt))
        weight_R1 = weights_RV.gather(1, token_R[:, None])
        before_RV = (weights_RV == weight_R1).logical_and_(ids_V < token_R[:, None])
        before_RV.logical_or_(weights_RV > weight_R1)
        weights_RV = torch.where(before_RV, weights_RV, 0.0)
        # Rounding must not cut anything when top_p is 1; weights that are NaN must not loop for ever.
        inside_R = ~(_block_sums(weights_RV).sum(-1) >= limit_R[rows]) | (policy.top_p[rows] == 1)
        if policy.most_k:
            inside_R &= before_RV.sum(-1) < policy.top_k[rows]
        result_R[rows[inside_R]] = token_R[inside_R]
        outside = (~inside_R).nonzero()[:, 0]
        if not len(outside):
            return result_R
        rows, weights_RV = rows[outside], weights_RV[outside]
    raise AssertionError("unreachable")


def _cut_top_k(weights_RV: torch.Tensor, policy: Policy) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights not below the k-th (its equals stay), and the mass, fp64 [R], of the k likeliest tokens."""
    total_R = _block_sums(weights_RV).sum(-1)
    if not policy.most_k:
        return weights_RV, total_R
    likeliest_RW = weights_RV.topk(policy.most_k, dim=-1).values
    has_k_R = policy.top_k < weights_RV.shape[1]
    last_R1 = (policy.top_k - 1).clamp(max=policy.most_k - 1)[:, None]
    in_top_k_RW = torch.arange(policy.most_k, device=weights_RV.device) <= last_R1
    top_k_total_R = (likeliest_RW * in_top_k_RW).sum(-1, dtype=torch.float64)
    least_R1 = likeliest_RW.gather(1, last_R1).masked_fill_(~has_k_R[:, None], 0.0)
    return weights_RV.masked_fill(weights_RV < least_R1, 0.0), torch.where(has_k_R, top_k_total_R, total_R)


def _inverse_cdf(weights_RV: torch.Tensor, uniform_R: torch.Tensor) -> torch.Tensor:
    """The first token, by id, whose cumulative weight exceeds uniform * total; never one of weight 0.

    First the block of tokens is found, then the token in it, so that one block per row is summed token by
    token. Both cumulative sums are fp64.
    """
    vocab_size = weights_RV.shape[1]
    sums_RN = _block_sums(weights_RV)
    mass_RN = sums_RN.cumsum(-1)
    target_R1 = uniform_R[:, None] * mass_RN[:, -1:]
    # The clamp is for NaN only, which the caller finds in the log-probabilities.
    block_R1 = torch.searchsorted(mass_RN, target_R1, right=True).clamp_(max=mass_RN.shape[1] - 1)
    sum_R1 = sums_RN.gather(1, block_R1)
    share_R1 = (target_R1 - (mass_RN.gather(1, block_R1) - sum_R1)) / sum_R1
    token_RB = block_R1 * _BLOCK + torch.arange(_BLOCK, device=weights_RV.device)
    inside_RB = weights_RV.gather(1, token_RB.clamp(max=vocab_size - 1)).double()
    mass_RB = inside_RB.masked_fill_(token_RB >= vocab_size, 0.0).cumsum(-1)
    # The block's share is in [0, 1) but for rounding.
    rest_R1 = share_R1.clamp(0.0, 1.0 - 2.0**-53) * mass_RB[:, -1:]
    return (block_R1 * _BLOCK + torch.searchsorted(mass_RB, rest_R1, right=True))[:, 0].clamp_(max=vocab_size - 1)


def _block_sums(weights_RV: torch.Tensor) -> torch.Tensor:
    """fp64 [R, N] sums of blocks of tokens; in a block fp32, which rounds no more than the logits do."""
    whole = weights_RV.shape[1] // _BLOCK * _BLOCK
    sums_RN = weights_RV[:, :whole].unflatten(1, (-1, _BLOCK)).sum(-1)
    if whole < weights_RV.shape[1]:
        sums_RN = torch.cat((sums_RN, weights_RV[:, whole:].sum(-1, keepdim=True)), dim=1)
    return sums_RN.double()
