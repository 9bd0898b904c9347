"""From logits to tokens: adjustments, the draw, and the log-probabilities that are reported.

The numbers that choose a token are hashes of its request's seed and prompt, its sample's index and its place in the
answer, so a token does not depend on what is computed beside it, before it, or on which machine.

Shape suffixes: R rows (sequences), V vocabulary, E stop ids, W likeliest tokens.
"""

from collections.abc import Sequence as Rows
from dataclasses import dataclass

import torch

from umedtrain import kernels
from umedtrain.kernels import cpu
from umedtrain.sampling.sequence import Sequence


@dataclass(frozen=True)
class Drawn:
    """One token for each row, and what is reported of it; see `Output`."""

    token_R: torch.Tensor
    logprob_R: torch.Tensor
    draw_logprob_R: torch.Tensor
    stopped_R: torch.Tensor  # whether the token is a stop id
    top_RW: tuple[torch.Tensor, torch.Tensor] | None  # log-probabilities and ids

    @classmethod
    def join(cls, blocks: list["Drawn"]) -> "Drawn":
        """Blocks of rows, one after the other."""
        if len(blocks) == 1:
            return blocks[0]
        columns = [
            [getattr(block, name) for block in blocks]
            for name in ("token_R", "logprob_R", "draw_logprob_R", "stopped_R")
        ]
        tops = [block.top_RW for block in blocks]
        top_RW = None if tops[0] is None else tuple(torch.cat(parts) for parts in zip(*tops, strict=True))
        return cls(*map(torch.cat, columns), top_RW)


class Drawer:
    """How some sequences draw; made anew when others join them.

    Args:
        sequences: the rows.
        stops: ids that end an answer, for each row.
        vocab_size: V.
        most_top: likeliest tokens to report, W; 0 for none.
        device: of the logits.
    """

    def __init__(
        self,
        sequences: Rows[Sequence],
        stops: Rows[Rows[int]],
        vocab_size: int,
        most_top: int,
        device: torch.device,
    ) -> None:
        params_R = [sequence.request.params for sequence in sequences]
        integers = [[p.top_k, s.key, s.generated, p.min_tokens] for p, s in zip(params_R, sequences, strict=True)]
        fractions = [[p.temperature, p.min_p, p.top_p] for p in params_R]
        self.top_k_R, self.key_R, self.generated_R, self.min_tokens_R = _columns(integers, torch.int64, device)
        temperature_R, min_p_R, self.top_p_R = _columns(fractions, torch.float64, device)
        self.temperature_R, self.min_p_R = temperature_R.float(), min_p_R.float()
        self.stops_RE = padded(stops, device)
        self.rows, self.most_top = len(sequences), most_top
        self._in_cpp = device.type == "cpu" and cpu.available()
        self._adjusts = any(p.adjusts_logits for p in params_R)
        if self._adjusts:
            self._prepare(sequences, vocab_size, device)

    def _prepare(self, sequences: Rows[Sequence], vocab_size: int, device: torch.device) -> None:
        params_R = [sequence.request.params for sequence in sequences]
        penalties = [p.repetition_penalty for p in params_R]
        self._seen_RV = self._bias_RV = None
        if any(penalty != 1 for penalty in penalties):
            self._penalty_R1 = torch.tensor(penalties, device=device)[:, None]
            self._seen_RV = torch.zeros(len(sequences), vocab_size, dtype=torch.bool, device=device)
            for row, sequence in enumerate(sequences):
                self._seen_RV[row, torch.tensor(sequence.tokens, device=device)] = True
        if any(p.logit_bias for p in params_R):
            self._bias_RV = torch.zeros(len(sequences), vocab_size, device=device)
            for row, p in enumerate(params_R):
                if p.logit_bias:
                    ids = torch.tensor(list(p.logit_bias), device=device)
                    self._bias_RV[row, ids] = torch.tensor(list(p.logit_bias.values()), device=device)

    def skip(self, places: Rows[int]) -> None:
        """Let each row draw for a place so many after its sequence's next one."""
        self.generated_R = self.generated_R + torch.tensor(places, device=self.generated_R.device)

    def draw(self, logits_RV: torch.Tensor) -> Drawn:
        """The next token of every row from the model's fp32 logits; counts it as generated."""
        adjusted_RV = self._adjusted(logits_RV) if self._adjusts else logits_RV
        params = (self.temperature_R, self.top_k_R, self.top_p_R, self.min_p_R, self.key_R, self.generated_R)
        drawn = _sample(adjusted_RV, *params, in_cpp=self._in_cpp)
        logprob_R, top_RW = drawn.logprobs_B, None
        if self._adjusts:
            logprob_R = logprobs_of(logits_RV, drawn.tokens_B[:, None])[:, 0]
            if self._seen_RV is not None:
                self._seen_RV.scatter_(1, drawn.tokens_B[:, None], True)
        if self.most_top:
            top_RW = top_logprobs(logits_RV, self.most_top)
        self.generated_R = self.generated_R + 1
        stopped_R = (drawn.tokens_B[:, None] == self.stops_RE).any(1)
        return Drawn(drawn.tokens_B, logprob_R, drawn.truncated_logprobs_B, stopped_R, top_RW)

    def _adjusted(self, logits_RV: torch.Tensor) -> torch.Tensor:
        if self._seen_RV is not None:
            positive_RV = logits_RV > 0
            scaled_RV = torch.where(positive_RV, logits_RV / self._penalty_R1, logits_RV * self._penalty_R1)
            logits_RV = torch.where(self._seen_RV, scaled_RV, logits_RV)
        if self._bias_RV is not None:
            logits_RV = logits_RV + self._bias_RV
        early_R1 = (self.generated_R < self.min_tokens_R)[:, None]
        # A column more takes the -1 that fills up the table of stop ids, and ids that the model does not have.
        vocab_size = logits_RV.shape[1]
        stops_RV = torch.zeros(len(logits_RV), vocab_size + 1, dtype=torch.bool, device=logits_RV.device)
        stops_RV.scatter_(1, self.stops_RE.masked_fill(self.stops_RE < 0, vocab_size).clamp(max=vocab_size), True)
        return logits_RV.masked_fill(stops_RV[:, :-1] & early_R1, -torch.inf)


def _sample(
    logits_RV: torch.Tensor,
    temperature_R: torch.Tensor,
    top_k_R: torch.Tensor,
    top_p_R: torch.Tensor,
    min_p_R: torch.Tensor,
    key_R: torch.Tensor,
    place_R: torch.Tensor,
    *,
    in_cpp: bool,
) -> kernels.Sampled:
    if in_cpp:
        return cpu.sample(
            logits_RV.contiguous(),
            temperature_R=temperature_R,
            top_k_R=top_k_R,
            top_p_R=top_p_R,
            min_p_R=min_p_R,
            seeds_R=key_R,
            positions_R=place_R,
        )
    return kernels.sample(
        logits_RV,
        temperature_B=temperature_R,
        top_k_B=top_k_R,
        top_p_B=top_p_R,
        min_p_B=min_p_R,
        seeds_B=key_R,
        positions_B=place_R,
    )


def logprobs_of(logits_RV: torch.Tensor, ids_RW: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [R, W] of some tokens of each row; on a CPU those that a draw reports, to the last bit."""
    if logits_RV.device.type == "cpu" and cpu.available():
        peak_R, log_sum_R = cpu.softmax_statistics(logits_RV.contiguous())
    else:
        peak_R = logits_RV.amax(-1)
        log_sum_R = (logits_RV - peak_R[:, None]).exp().sum(-1).log()
    return logits_RV.gather(1, ids_RW) - peak_R[:, None] - log_sum_R[:, None]


def top_logprobs(logits_RV: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and ids, [R, W], of the likeliest tokens, of equal ones the lowest ids."""
    vocab_size = logits_RV.shape[1]
    # As integers, the bits of floats stand in the order of the floats once those of negative ones are turned round.
    bits_RV = (logits_RV + 0.0).view(torch.int32)  # -0 becomes 0
    ordered_RV = torch.where(bits_RV < 0, bits_RV ^ 0x7FFFFFFF, bits_RV).long()
    ids_V = torch.arange(vocab_size, device=logits_RV.device)
    best_RW = (ordered_RV * 2**32 + (vocab_size - 1 - ids_V)).topk(min(count, vocab_size), dim=-1).values
    ids_RW = vocab_size - 1 - (best_RW & 0xFFFFFFFF)
    return logprobs_of(logits_RV, ids_RW), ids_RW


def padded(lists: Rows[Rows[int]], device: torch.device, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """Lists of numbers as the rows of one tensor, filled up with -1."""
    width = max(1, *(len(numbers) for numbers in lists), 1)
    return torch.tensor([[*numbers, *[-1] * (width - len(numbers))] for numbers in lists], dtype=dtype, device=device)


def _columns(rows: list[list], dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    return [column.contiguous() for column in torch.tensor(rows, dtype=dtype, device=device).unbind(1)]
