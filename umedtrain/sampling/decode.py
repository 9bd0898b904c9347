"""One batch of the sampler, from its prompts to its samples' last tokens.

Shape suffixes: P prompts, B all samples of the batch, R rows still computed, S new tokens, E stop ids,
T tokens of a prefill, D hidden size, V vocabulary.
"""

import math
from collections.abc import Iterator, Sequence

import torch

from umedtrain.model.layout import Layout
from umedtrain.model.llama import Llama
from umedtrain.sampling.batches import Piece
from umedtrain.sampling.cache import SharedPromptCache
from umedtrain.sampling.draw import Policy, choose, derive_keys

_PREFILL_TOKENS = 8192
# Few enough that a small vocabulary's logits stay in a CPU's cache, enough to reuse the projection's weights.
_LOGITS_ROWS = 256
# Finished rows ride along until this share of the rows has finished: dropping them is not free either.
_DROP_SHARE = 0.1


class BatchRun:
    """State of a batch; `steps()` runs it, `results()` reads it.

    Samples are numbered 0..B-1, prompt by prompt. Rows are those samples that still go through the model.
    """

    def __init__(self, model: Llama, batch: Sequence[Piece], eos_ids: Sequence[int]) -> None:
        self.model, self.batch = model, batch
        self.device = device = model.lm_head_weight.device
        places = [(prompt, place) for prompt, piece in enumerate(batch) for place in range(piece.count)]
        self.prompt_B, place_B = torch.tensor(places, device=device).unbind(1)
        self.params = [batch[prompt].request.params for prompt, _ in places]
        firsts_P = torch.tensor([piece.first for piece in batch], device=device)
        keys_P = torch.tensor([piece.request.key for piece in batch], device=device)
        limits_P = torch.tensor([piece.request.limit for piece in batch], device=device)
        self.key_B = derive_keys(keys_P[self.prompt_B], firsts_P[self.prompt_B] + place_B)
        self.limit_B = limits_P[self.prompt_B]
        self.stops_BE = _stop_table(batch, eos_ids).to(device)[self.prompt_B]

        self.most_steps = max(piece.request.limit for piece in batch)
        lengths = [len(piece.request.ids) for piece in batch]
        self.cache = SharedPromptCache(lengths, self.prompt_B, place_B, capacity=self.most_steps)
        self.tokens_BS = torch.zeros(len(places), self.most_steps, dtype=torch.int64, device=device)
        self.logprobs_BS = torch.zeros(len(places), self.most_steps, device=device)
        self.length_B = torch.zeros(len(places), dtype=torch.int64, device=device)
        self.stopped_B = torch.zeros(len(places), dtype=torch.bool, device=device)
        self._take(torch.arange(len(places), device=device))

    def _take(self, samples_R: torch.Tensor) -> None:
        """Make these samples the rows."""
        self.sample_R = samples_R
        self.key_R, self.limit_R = self.key_B[samples_R], self.limit_B[samples_R]
        self.stops_RE = self.stops_BE[samples_R]
        params_R = [self.params[sample] for sample in samples_R.tolist()]
        self.policy = Policy.of(params_R, self.model.config.vocab_size, self.device)
        self.done_R = torch.zeros_like(samples_R, dtype=torch.bool)
        self.layout = Layout.packed([1] * len(samples_R), device=self.device)

    def steps(self) -> Iterator[int]:
        """Run to the end; yields the number of samples that have finished so far, after every token."""
        hidden_RD = self._prefill()[self.prompt_B]
        for step in range(self.most_steps):
            token_R, logprob_R = self._next_tokens(hidden_RD, step)
            self.tokens_BS[self.sample_R, step] = token_R
            self.logprobs_BS[self.sample_R, step] = logprob_R
            live_R = self._mark_finished(token_R, step)
            num_live = int(live_R.sum())
            yield len(self.params) - num_live
            if num_live == 0:
                return
            if num_live <= (1 - _DROP_SHARE) * len(token_R):
                rows = live_R.nonzero()[:, 0]
                self.cache.keep(rows)
                self._take(self.sample_R[rows])
                token_R = token_R[rows]
            hidden_RD = self.model(token_R, self.layout, cache=self.cache)
            self.cache.advance()

    def _prefill(self) -> torch.Tensor:
        """Fill the cache with the prompts, some at a time; hidden states [P, D] of their last tokens."""
        last_hidden, first = [], 0
        while first < len(self.batch):
            ids, lengths = [], []
            for piece in self.batch[first:]:
                if ids and len(ids) + len(piece.request.ids) > _PREFILL_TOKENS:
                    break
                ids += piece.request.ids
                lengths.append(len(piece.request.ids))
            layout = Layout.packed(lengths, device=self.device)
            self.cache.prefill(first)
            hidden_TD = self.model(torch.tensor(ids, device=self.device), layout, cache=self.cache)
            last_hidden.append(hidden_TD[torch.tensor(layout.last_rows, device=self.device)])
            first += len(lengths)
        self.cache.prefill(None)
        return torch.cat(last_hidden)

    def _next_tokens(self, hidden_RD: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Each row's next token and its fp32 log-probability; logits are made for some rows at a time."""
        key_R = derive_keys(self.key_R, step)
        tokens, logprobs = [], []
        for start in range(0, len(hidden_RD), _LOGITS_ROWS):
            rows = slice(start, start + _LOGITS_ROWS)
            logits_RV = self.model.logits(hidden_RD[rows]).float()
            token_R = choose(logits_RV, key_R[rows], self.policy.rows(rows))
            tokens.append(token_R)
            logprobs.append(logits_RV.log_softmax(-1).gather(1, token_R[:, None])[:, 0])
        return torch.cat(tokens), torch.cat(logprobs)

    def _mark_finished(self, token_R: torch.Tensor, step: int) -> torch.Tensor:
        """Note which rows end with this token; returns the mask of those that go on."""
        stop_R = (token_R[:, None] == self.stops_RE).any(1)
        newly_R = (stop_R | (self.limit_R == step + 1)) & ~self.done_R
        samples = self.sample_R[newly_R]
        self.length_B[samples] = step + 1
        self.stopped_B[samples] = stop_R[newly_R]
        self.done_R |= newly_R
        return ~self.done_R

    def results(self) -> Iterator[tuple[int, int, list[int], list[float], bool]]:
        """For each sample: the prompt's index, its own, tokens, logprobs, and if a stop token ended it.

        Raises ValueError when the model's logits were not numbers.
        """
        columns = [x.tolist() for x in (self.tokens_BS, self.logprobs_BS, self.length_B, self.stopped_B)]
        numbers = [(piece.request.index, piece.first + place) for piece in self.batch for place in range(piece.count)]
        for (index, sample), tokens, logprobs, length, stopped in zip(numbers, *columns, strict=True):
            if not math.isfinite(sum(logprobs[:length])):
                raise ValueError(
                    f"prompts[{index}], sample {sample}: the model's logits are not finite numbers; "
                    "check the checkpoint for NaN or inf, or load it with dtype=torch.float32"
                )
            yield index, sample, tokens[:length], logprobs[:length], stopped


def _stop_table(batch: Sequence[Piece], eos_ids: Sequence[int]) -> torch.Tensor:
    """Stop ids of every prompt, int64 [P, E], filled up with -1, which is no token."""
    stops = [[*eos_ids, *piece.request.params.stop_token_ids] for piece in batch]
    width = max(len(ids) for ids in stops)
    padded = [ids + [-1] * (width - len(ids)) for ids in stops]
    return torch.tensor(padded, dtype=torch.int64).view(len(stops), width)
