"""Guessing several tokens ahead, so that one pass of the model can confirm them.

The token at each place of an answer is a function of the logits there and of a random number that belongs to the place
(`drawing.py`). So a guess needs no rejection sampling (Leviathan et al. 2023, arXiv 2211.17192): the model draws at
every guessed place as it would have anyway, and guesses count up to the first one that it has not drawn itself. The
answer is the same, token for token and at any temperature, wherever logits do not depend on the batch (see `Sampler`).

Shape suffixes: R rows (sequences).
"""

from collections.abc import Callable
from collections.abc import Sequence as Listed
from typing import Protocol

import numpy as np
import torch

from umedtrain.model.llama import Llama
from umedtrain.sampling.drawing import Drawer
from umedtrain.sampling.forward import PagedCache, Stream, Weights, make_decoder
from umedtrain.sampling.sequence import Sequence

LONGEST_MATCH = 3


class Drafter(Protocol):
    """Guesses how sequences go on."""

    def follow(self, stream: Stream) -> None:
        """The model computes these tokens."""
        ...

    def copy_pages(self, sources: list[int], targets: list[int]) -> None:
        """The model's cache copies these pages."""
        ...

    def version(self) -> int:
        """Changes when parameters do."""
        ...

    def refresh(self) -> None:
        """Parameters have been written to."""
        ...

    def propose(self, sequences: Listed[Sequence], table_BM: torch.Tensor, count: int) -> list[list[int]]:
        """Up to `count` tokens for each sequence after its last one."""
        ...


class PromptLookup:
    """What followed the last few tokens where they occurred before, in the prompt or the answer (Saxena 2023)."""

    def follow(self, stream: Stream) -> None:
        """Nothing is computed."""

    def copy_pages(self, sources: list[int], targets: list[int]) -> None:
        """Nothing is cached."""

    def version(self) -> int:
        """There are no parameters."""
        return 0

    def refresh(self) -> None:
        """There are no parameters."""

    def propose(self, sequences: Listed[Sequence], table_BM: torch.Tensor, count: int) -> list[list[int]]:
        """See `Drafter`."""
        return [look_up(sequence.tokens, count) for sequence in sequences]


def look_up(tokens: Listed[int], count: int) -> list[int]:
    """Tokens after the latest earlier place that ends like `tokens`, in as many tokens as possible up to three."""
    data = np.asarray(tokens, dtype="<i8")
    for length in range(min(LONGEST_MATCH, len(tokens) - 1), 0, -1):
        windows = np.lib.stride_tricks.sliding_window_view(data[:-1], length)
        places = (windows == data[-length:]).all(axis=1).nonzero()[0]
        if len(places):
            after = int(places[-1]) + length
            return data[after : after + count].tolist()
    return []


class DraftModel:
    """A smaller model with the same vocabulary, whose cache has the pages of the large one's under the same numbers.

    Args:
        model: the smaller model.
        cache: the large model's cache, for its size.
        drawers: makes those that draw for the large model, so that both use the same random numbers.
    """

    def __init__(
        self, model: Llama, cache: PagedCache, drawers: Callable[[Listed[Sequence]], list[Drawer]], *, exact: bool
    ) -> None:
        pages, page_size, *_ = cache.keys[0].shape
        weight = model.lm_head_weight
        self._weights = Weights(model)
        self._cache = PagedCache(model.config, pages, page_size, dtype=weight.dtype, device=weight.device)
        self._decoder = make_decoder(self._weights, self._cache, exact=exact)
        self._drawers = drawers

    def follow(self, stream: Stream) -> None:
        """See `Drafter`."""
        self._decoder.hidden(stream)

    def copy_pages(self, sources: list[int], targets: list[int]) -> None:
        """See `Drafter`."""
        self._cache.copy_pages(sources, targets)

    def version(self) -> int:
        """See `Drafter`."""
        return self._weights.version()

    def refresh(self) -> None:
        """See `Drafter`."""
        self._decoder.refresh()

    def propose(self, sequences: Listed[Sequence], table_BM: torch.Tensor, count: int) -> list[list[int]]:
        """See `Drafter`. The pages have room for `count` more tokens after the last one."""
        device = table_BM.device
        drawers, rows_R = self._drawers(sequences), torch.arange(len(sequences), device=device)
        columns = [[sequence.tokens[-1], sequence.computed] for sequence in sequences]
        token_R, position_R = torch.tensor(columns, device=device).unbind(1)
        guesses = []
        # One pass more than guesses: the last guess has to be in the cache too, should it be confirmed.
        for step in range(count + 1):
            stream = Stream(token_R.contiguous(), rows_R, position_R.contiguous(), table_BM, len(sequences))
            hidden_RD = self._decoder.hidden(stream)
            if step < count:
                token_R = torch.cat(
                    [
                        drawer.draw(self._decoder.logits(block)).token_R
                        for drawer, block in zip(drawers, hidden_RD.split(drawers[0].rows), strict=True)
                    ]
                )
                guesses.append(token_R)
                position_R = position_R + 1
        return torch.stack(guesses).t().tolist()
