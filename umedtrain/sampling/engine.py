"""The sampler's engine: requests join and leave at every pass, and share one paged cache.

`step` is one round: the scheduler says what is computed, `Decoder` computes it, `Drawer` draws, and the results go to
the sequences. While all that runs only decodes, a round is several tokens long, and nothing in it is done once per
request by Python.

Shape suffixes: T tokens of a pass, R rows (sequences), V vocabulary.
"""

import math
from collections.abc import Collection
from collections.abc import Sequence as Listed
from typing import Literal, NamedTuple

import numpy as np
import torch

from umedtrain.model.llama import Llama
from umedtrain.sampling.drawing import Drawer, Drawn, logprobs_of, padded, top_logprobs
from umedtrain.sampling.forward import PagedCache, Stream, Weights, make_decoder
from umedtrain.sampling.graphs import GraphedDecoder
from umedtrain.sampling.pages import PagePool
from umedtrain.sampling.params import TopLogprobs
from umedtrain.sampling.requests import Request
from umedtrain.sampling.scheduler import Chunk, Scheduler
from umedtrain.sampling.sequence import Sequence
from umedtrain.sampling.speculation import DraftModel, PromptLookup
from umedtrain.sampling.stops import GrowingText, find_stop
from umedtrain.text.tokenizer import Tokenizer

PAGE_SIZE = 16
# Tokens between two looks at what has finished: on a GPU each look waits for the device.
_ROUND = {"cpu": 16, "cuda": 16}
# Rows that have finished ride along until there are so many of them: ending a round is not free either.
_IDLE_SHARE = 0.1
# Few enough that a small vocabulary's logits stay in a CPU's cache, enough to reuse the projection's weights.
_LOGITS_ROWS = 256

_NO_NUMBERS = (
    "the model's logits are not finite numbers; check the checkpoint for NaN or inf, or load it with "
    "dtype=torch.float32"
)
_NO_TOKENS = "logit_bias, repetition_penalty and min_tokens together leave no token that could be drawn"


class RequestError(ValueError):
    """What has ended one request, and no other."""

    def __init__(self, message: str, request: Request) -> None:
        super().__init__(message)
        self.request = request


class Engine:
    """Requests in, finished sequences out.

    Args:
        model: a whole (unsharded) model; its weights are read anew in every pass.
        tokenizer: needed for stop strings.
        eos_ids: ids that end every answer.
        max_rows: sequences that run at once.
        cache_bytes: memory of the key-value cache, at most; what no request needs any more stays in it until it is
            full, for later requests that begin alike.
        chunk_tokens: tokens of prompts in one pass.
        exact: see `Sampler`.
        quantize: see `Sampler`.
        draft, draft_tokens: see `Sampler`.
    """

    def __init__(
        self,
        model: Llama,
        tokenizer: Tokenizer | None = None,
        *,
        eos_ids: Listed[int] = (),
        max_rows: int = 1024,
        cache_bytes: int = 2 * 2**30,
        chunk_tokens: int = 2048,
        exact: bool = False,
        quantize: Literal["int8", "int4"] | None = None,
        draft: Llama | None = None,
        draft_tokens: int = 0,
    ) -> None:
        config = model.config
        self.model, self.tokenizer, self.eos_ids = model, tokenizer, tuple(eos_ids)
        self.device = model.lm_head_weight.device
        self.weights = Weights(model, quantize=quantize)
        numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * PAGE_SIZE
        pages_of_all = max_rows * -(-config.max_position_embeddings // PAGE_SIZE)
        page_bytes = numbers * model.lm_head_weight.element_size()
        if cache_bytes < page_bytes:
            raise ValueError(f"cache_bytes={cache_bytes} has no room for a page of {PAGE_SIZE} tokens; raise it")
        num_pages = min(cache_bytes // page_bytes, pages_of_all)
        self.pool = PagePool(num_pages, PAGE_SIZE)
        # One page more than there are to give: the one that surplus rows of a recorded pass write to.
        self.cache = PagedCache(config, num_pages + 1, PAGE_SIZE, dtype=model.lm_head_weight.dtype, device=self.device)
        self.decoder = make_decoder(self.weights, self.cache, exact=exact)
        if self.device.type == "cuda":
            # Rows that ride along after their end reach into one page more.
            width = -(-config.max_position_embeddings // PAGE_SIZE) + 1
            self.decoder = GraphedDecoder(self.decoder, scratch_page=num_pages, table_width=width)
        self.scheduler = Scheduler(self.pool, max_rows=max_rows, chunk_tokens=chunk_tokens)
        self.draft_tokens, self.drafter = draft_tokens, PromptLookup() if draft_tokens else None
        if draft is not None and draft_tokens:
            self.drafter = DraftModel(draft, self.cache, self._drawers, exact=exact)
        self._texts: dict[Sequence, GrowingText] = {}
        self._broken: dict[Request, RequestError] = {}
        self._version = self._current_version()
        self.computed_tokens = self.confirmed_tokens = 0

    @property
    def cache_tokens(self) -> int:
        """Tokens that the cache has room for."""
        return self.pool.num_pages * self.pool.page_size

    @property
    def busy(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self.scheduler.running or self.scheduler.waiting or self._broken)

    def check_fits(self, request: Request) -> None:
        """ValueError for a request that the cache could not hold even alone."""
        needed, size = len(request.ids) + request.limit, self.pool.page_size
        if -(-needed // size) > self.pool.num_pages:
            raise ValueError(
                f"{request.name} needs a cache for {len(request.ids)} tokens and {request.limit} new ones, but the "
                f"cache has room for {self.cache_tokens} in all; lower max_tokens, or give the sampler more cache_bytes"
            )

    def submit(self, request: Request) -> list[Sequence]:
        """Queue a request; its sequences, in order of their samples, are filled by `step`."""
        self.check_fits(request)
        sequences = self.scheduler.add(request)
        if request.params.stop:
            self._texts.update({sequence: GrowingText(self.tokenizer) for sequence in sequences})
        return sequences

    def cancel(self, sequences: Collection[Sequence]) -> None:
        """Drop sequences and what they hold."""
        self.scheduler.discard(sequences)
        for sequence in sequences:
            self._texts.pop(sequence, None)
            self._broken.pop(sequence.request, None)

    @torch.no_grad()
    def step(self, most: int | None = None) -> list[Sequence]:
        """One round; returns the sequences with new tokens, or a prompt that has been scored.

        Args:
            most: tokens that a sequence may get in it, at most, for callers that want to see them early.

        Raises:
            RequestError: when there were no numbers to draw or score a request by in the last round; it has been
                dropped, and nothing else has been done in this round.
            RuntimeError: when the weights have been written to while requests were running.
        """
        if self._broken:
            raise self._broken.pop(next(iter(self._broken)))
        self._check_weights()
        chunks = self.scheduler.plan()
        if not chunks:
            return []
        if any(chunk.sequence.in_prompt for chunk in chunks):
            return self._pass(chunks)
        return self._decode([chunk.sequence for chunk in chunks], most or _ROUND.get(self.device.type, 1))

    def _current_version(self) -> tuple[int, int]:
        return self.weights.version(), self.drafter.version() if self.drafter else 0

    def _check_weights(self) -> None:
        version = self._current_version()
        if version == self._version:
            return
        # One that waits may have tokens too: those that it had drawn before it gave its pages back.
        if self.scheduler.running or any(s.generated or s.prompt_logprobs for s in self.scheduler.waiting):
            raise RuntimeError(
                "the model's weights were written to while requests were running, so the keys and values in their "
                "cache are those of other weights; finish or cancel requests before updating the model"
            )
        weight, cached = self.model.lm_head_weight, self.cache.keys[0]
        if (weight.dtype, weight.device) != (cached.dtype, cached.device):
            raise RuntimeError(
                f"the model was {cached.dtype} on {cached.device} when its sampler was made and is {weight.dtype} on "
                f"{weight.device} now; make a new sampler"
            )
        self.pool.forget()
        self.weights.forget_copies()
        self.decoder.refresh()
        if self.drafter:
            self.drafter.refresh()
        self._version = version

    def _stops(self, sequence: Sequence) -> tuple[int, ...]:
        own = sequence.request.params.stop_token_ids
        return own if sequence.request.params.ignore_eos else (*self.eos_ids, *own)

    def _drawers(self, sequences: Listed[Sequence]) -> list[Drawer]:
        """One for each block of rows whose logits are held at a time."""
        most_top = max(sequence.request.params.top_logprobs for sequence in sequences)
        vocab_size, blocks = self.model.config.vocab_size, range(0, len(sequences), _LOGITS_ROWS)
        return [
            Drawer(block, [self._stops(sequence) for sequence in block], vocab_size, most_top, self.device)
            for block in (sequences[first : first + _LOGITS_ROWS] for first in blocks)
        ]

    def _draw(self, hidden_RD: torch.Tensor, drawers: list[Drawer]) -> Drawn:
        blocks = zip(drawers, hidden_RD.split(_LOGITS_ROWS), strict=True)
        return Drawn.join([drawer.draw(self.decoder.logits(block)) for drawer, block in blocks])

    def _draw_next(self, stream: Stream, drawers: list[Drawer]) -> Drawn:
        """For a stream of one token of each sequence."""
        if self.drafter or len(drawers) > 1:
            return self._draw(self._hidden(stream), drawers)
        self.computed_tokens += len(stream.tokens_T)
        return drawers[0].draw(self.decoder.next_logits(stream))

    def _hidden(self, stream: Stream) -> torch.Tensor:
        self.computed_tokens += len(stream.tokens_T)
        if self.drafter:
            self.drafter.follow(stream)
        return self.decoder.hidden(stream)

    def _tables(self, sequences: Listed[Sequence]) -> torch.Tensor:
        # Entries past a sequence's end are never looked at, but must be pages.
        return padded([sequence.pages for sequence in sequences], self.device, torch.int32).clamp_(min=0)

    def _pass(self, chunks: list[Chunk]) -> list[Sequence]:
        """Compute chunks of any length, and draw for those that have reached their last token."""
        chunks = sorted(chunks, key=lambda chunk: chunk.count != 1)
        singles = sum(chunk.count == 1 for chunk in chunks)
        tokens, rows, positions, spans = [], [], [], []
        for row, chunk in enumerate(chunks):
            sequence, first = chunk.sequence, chunk.sequence.computed
            spans.append((len(tokens), chunk.count))
            tokens += sequence.tokens[first : first + chunk.count]
            rows += [row] * chunk.count
            positions += range(first, first + chunk.count)
        tokens_T, rows_T, positions_T = torch.tensor([tokens, rows, positions], device=self.device).unbind(0)
        table_BM = self._tables([chunk.sequence for chunk in chunks])
        stream = Stream(tokens_T, rows_T, positions_T, table_BM, singles, tuple(spans[singles:]))
        hidden_TD = self._hidden(stream)

        progressed, drawing, last_rows = [], [], []
        for chunk, (first, count) in zip(chunks, spans, strict=True):
            sequence = chunk.sequence
            if sequence.request in self._broken:
                continue
            if sequence.request.params.prompt_logprobs and sequence.sample == 0:
                self._score_prompt(sequence, hidden_TD[first : first + count])
                if not math.isfinite(sum(sequence.prompt_logprobs[sequence.computed :])):
                    self._break(sequence, _NO_NUMBERS)
                    continue
            sequence.computed += count
            self.scheduler.publish(sequence)
            if sequence.pending:
                continue
            if sequence.generated >= sequence.request.limit:
                self._finish(sequence, None)
                progressed.append(sequence)
                continue
            forked = self._fork(sequence) if not sequence.generated else []
            drawing += [sequence, *forked]
            last_rows += [first + count - 1] * (1 + len(forked))
        if drawing:
            hidden_RD = hidden_TD[torch.tensor(last_rows, device=self.device)]
            self._take([self._draw(hidden_RD, self._drawers(drawing))], drawing)
        return progressed + drawing

    def _fork(self, leader: Sequence) -> list[Sequence]:
        forks = self.scheduler.fork(leader)
        copies = [(source, target) for _, source, target in forks if source is not None]
        for cache in (self.cache, self.drafter) if self.drafter else (self.cache,):
            cache.copy_pages([source for source, _ in copies], [target for _, target in copies])
        return [sequence for sequence, *_ in forks]

    def _score_prompt(self, sequence: Sequence, hidden_TD: torch.Tensor) -> None:
        """Log-probabilities of the prompt's tokens that follow those of a chunk."""
        first, params = sequence.computed, sequence.request.params
        del sequence.prompt_logprobs[first:], sequence.prompt_top_logprobs[first:]  # after a preemption
        targets = sequence.request.ids[first + 1 : first + 1 + len(hidden_TD)]
        for start in range(0, len(targets), _LOGITS_ROWS):
            target_R = torch.tensor(targets[start : start + _LOGITS_ROWS], device=self.device)
            logits_RV = self.decoder.logits(hidden_TD[start : start + len(target_R)])
            sequence.prompt_logprobs += logprobs_of(logits_RV, target_R[:, None])[:, 0].tolist()
            if params.top_logprobs:
                sequence.prompt_top_logprobs += _pairs(top_logprobs(logits_RV, params.top_logprobs))

    def _decode(self, sequences: list[Sequence], most: int) -> list[Sequence]:
        """Several tokens for sequences that only decode, up to where one of them may change what is to be done."""
        if self.drafter and (guesses := self._guesses(sequences)):
            return self._confirm(sequences, guesses)
        steps = self._round(sequences, most)
        drawers, table_BM = self._drawers(sequences), self._tables(sequences)
        rows_R = torch.arange(len(sequences), device=self.device)
        columns = [[sequence.tokens[-1], sequence.computed] for sequence in sequences]
        token_R, position_R = torch.tensor(columns, device=self.device).unbind(1)
        history: list[Drawn] = []
        stopped_R = torch.zeros_like(rows_R, dtype=torch.bool)
        for _ in range(steps):
            stream = Stream(token_R.contiguous(), rows_R, position_R.contiguous(), table_BM, len(sequences))
            history.append(self._draw_next(stream, drawers))
            token_R, position_R = history[-1].token_R, position_R + 1
            stopped_R = stopped_R | history[-1].stopped_R
            if self.device.type == "cpu" and int(stopped_R.sum()) >= max(1, _IDLE_SHARE * len(sequences)):
                break
        for sequence in sequences:
            sequence.computed += len(history)
        self._take(history, sequences)
        return sequences

    def _round(self, sequences: list[Sequence], most: int) -> int:
        """How many tokens can be decoded at once; takes the pages for them."""
        if self._texts and any(sequence in self._texts for sequence in sequences):
            return 1
        left = sorted(s.request.limit - s.generated for s in sequences)
        steps = min(most, left[int(_IDLE_SHARE * len(left))])
        size = self.pool.page_size
        missing = sum(max(0, -(-(s.computed + steps) // size) - len(s.pages)) for s in sequences)
        if steps <= 1 or missing > self.pool.available:
            return 1
        for sequence in sequences:
            self.scheduler.make_room(sequence, steps)
        return steps

    def _guesses(self, sequences: list[Sequence]) -> list[list[int]]:
        """Guesses for each sequence, for which it then has pages; nothing where it does not pay or cannot be done."""
        count = min(self.draft_tokens, *(s.request.limit - s.generated - 1 for s in sequences))
        # Adjusted logits depend on the tokens before, of which the guesses are not certain.
        if count < 1 or any(s.request.params.adjusts_logits for s in sequences):
            return []
        size = self.pool.page_size
        missing = sum(max(0, -(-(s.computed + 1 + count) // size) - len(s.pages)) for s in sequences)
        if missing > self.pool.available:
            return []
        for sequence in sequences:
            self.scheduler.make_room(sequence, 1 + count)
        guesses = self.drafter.propose(sequences, self._tables(sequences), count)
        return guesses if any(guesses) else []

    def _confirm(self, sequences: list[Sequence], guesses: list[list[int]]) -> list[Sequence]:
        """Compute the last token and the guesses of each sequence in one pass, and keep what is drawn anyway."""
        pieces = [[s.tokens[-1], *guess] for s, guess in zip(sequences, guesses, strict=True)]
        order = sorted(range(len(sequences)), key=lambda row: len(pieces[row]) != 1)
        sequences, pieces = [sequences[row] for row in order], [pieces[row] for row in order]
        cells = [(row, place) for row, piece in enumerate(pieces) for place in range(len(piece))]
        rows, places = zip(*cells, strict=True)
        positions = [sequences[row].computed + place for row, place in cells]
        tokens = [token for piece in pieces for token in piece]
        tokens_T, rows_T, positions_T = torch.tensor([tokens, rows, positions], device=self.device).unbind(0)
        starts = np.cumsum([0, *map(len, pieces)]).tolist()
        singles = sum(len(piece) == 1 for piece in pieces)
        chunks = tuple((starts[row], len(pieces[row])) for row in range(singles, len(pieces)))
        stream = Stream(tokens_T, rows_T, positions_T, self._tables(sequences), singles, chunks)
        drawers = self._drawers([sequences[row] for row in rows])
        for drawer, first in zip(drawers, range(0, len(cells), _LOGITS_ROWS), strict=True):
            drawer.skip(places[first : first + _LOGITS_ROWS])
        self.computed_tokens += len(cells)
        drawn = self._draw(self.decoder.hidden(stream), drawers)
        cells = _on_host([drawn])
        answers = []
        for row, (sequence, piece) in enumerate(zip(sequences, pieces, strict=True)):
            own = _Tokens.join(cells[starts[row] : starts[row + 1]])
            right = next((i for i, guess in enumerate(piece[1:]) if guess != own.ids[i]), len(piece) - 1)
            sequence.computed += right + 1
            self.confirmed_tokens += right
            answers.append(own.first(right + 1))
        self._give(sequences, answers)
        return sequences

    def _take(self, history: list[Drawn], sequences: list[Sequence]) -> None:
        """Give each sequence the tokens that were drawn for it one after the other."""
        self._give(sequences, _on_host(history))

    def _give(self, sequences: list[Sequence], answers: list["_Tokens"]) -> None:
        """Add to each answer, up to the token that ends it."""
        for sequence, tokens in zip(sequences, answers, strict=True):
            if sequence.request in self._broken:
                continue
            if not math.isfinite(sum(tokens.logprobs)):
                self._break(sequence, _NO_NUMBERS)
                continue
            if math.isnan(sum(tokens.draw_logprobs)):
                self._break(sequence, _NO_TOKENS)
                continue
            count, reason = self._end(sequence, tokens.ids)
            tokens, ends = tokens.first(count), reason is not None or count == self._left(sequence)
            sequence.tokens += tokens.ids
            sequence.logprobs += tokens.logprobs
            sequence.draw_logprobs += tokens.draw_logprobs
            if wanted := sequence.request.params.top_logprobs:
                sequence.top_logprobs += [top[:wanted] for top in tokens.tops]
            if ends:
                self._finish(sequence, reason)

    def _left(self, sequence: Sequence) -> int:
        return sequence.request.limit - sequence.generated

    def _break(self, sequence: Sequence, reason: str) -> None:
        """Drop a sequence's request; the next step says why."""
        request = sequence.request
        self.cancel(self.scheduler.sequences_of(request))
        self._broken[request] = RequestError(f"{request.name}, sample {sequence.sample}: {reason}", request)

    def _end(self, sequence: Sequence, ids: list[int]) -> tuple[int, int | str | None]:
        """How many of the next tokens belong to the answer, and what ends it with the last of these, if not a limit."""
        params, stops, text = sequence.request.params, self._stops(sequence), self._texts.get(sequence)
        ids = ids[: self._left(sequence)]
        for count, token in enumerate(ids, start=1):
            if token in stops:
                return count, token
            if text is not None:
                new = text.push(token)
                # A match may have begun before the new characters; one that was whole before min_tokens may pass.
                late_enough = sequence.generated + count >= params.min_tokens
                known = len(text.text) - len(new)
                if late_enough and new and (match := find_stop(text.text, params.stop, known)):
                    sequence.stop_at, reason = match
                    sequence.stopped_text = text.text[: sequence.stop_at]
                    return count, reason
        return len(ids), None

    def _finish(self, sequence: Sequence, reason: int | str | None) -> None:
        sequence.finished, sequence.stop_reason = True, reason
        self.scheduler.remove(sequence)
        self._texts.pop(sequence, None)


class _Tokens(NamedTuple):
    """What was drawn for one sequence, place by place."""

    ids: list[int]
    logprobs: list[float]
    draw_logprobs: list[float]
    tops: list[TopLogprobs]

    def first(self, count: int) -> "_Tokens":
        return _Tokens(*(column[:count] for column in self))

    @classmethod
    def join(cls, parts: list["_Tokens"]) -> "_Tokens":
        return cls(*([cell for column in columns for cell in column] for columns in zip(*parts, strict=True)))


def _on_host(history: list[Drawn]) -> list[_Tokens]:
    """For each row what was drawn at each step."""
    columns = (
        torch.stack([getattr(drawn, name) for drawn in history]).t().tolist()
        for name in ("token_R", "logprob_R", "draw_logprob_R")
    )
    if history[0].top_RW is None:
        tops = [[]] * len(history[0].token_R)
    else:
        tops = [list(row) for row in zip(*(_pairs(drawn.top_RW) for drawn in history), strict=True)]
    return [_Tokens(*row) for row in zip(*columns, tops, strict=True)]


def _pairs(top_RW: tuple[torch.Tensor, torch.Tensor]) -> list[list[tuple[int, float]]]:
    logprobs, ids = (x.tolist() for x in top_RW)
    return [list(zip(i, p, strict=True)) for i, p in zip(ids, logprobs, strict=True)]
