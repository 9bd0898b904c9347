"""A micro-batch: the tokens of some examples as one packed stream, and which rows predict which targets.

Shape suffixes: T tokens of the stream, N targets, P pairs of answers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from umedtrain.data.example import Example
from umedtrain.model.layout import Layout


@dataclass(frozen=True, eq=False)
class Batch:
    """One micro-batch of one rank.

    Attributes:
        tokens_T: int64, ids of the stream.
        layout: which token sees which; the segments of the examples, in their order.
        rows_N: int64, row of the stream that predicts each target: the token before it, which for the first
            token of a child segment is its parent's last token. A prompt's last row thus appears once per
            answer.
        targets_N: int64, ids to be predicted.
        segment_of_N: int64, the layout's segment that each target stands in.
        better_P: int64, place among the layout's leaves of each pair's better answer.
        worse_P: int64, the same of its worse answer.
        weights_P: fp32, 1 / (pairs of the pair's example): an example's pairs count as one together.
        margins_P: fp32, by how much the pair's better answer is better; 0 where nothing is known of it.
        numbers: which examples of its loader the batch holds; may be none.
        answers: how many childless segments each of them has.
        num_tokens: tokens of the examples; 0 in a batch without examples, whose one token is a filler.
    """

    tokens_T: torch.Tensor
    layout: Layout
    rows_N: torch.Tensor
    targets_N: torch.Tensor
    segment_of_N: torch.Tensor
    better_P: torch.Tensor
    worse_P: torch.Tensor
    weights_P: torch.Tensor
    margins_P: torch.Tensor
    numbers: tuple[int, ...]
    answers: tuple[int, ...]
    num_tokens: int

    @property
    def num_examples(self) -> int:
        """How many examples the batch holds; may be 0."""
        return len(self.numbers)

    @property
    def leaves(self) -> tuple[int, ...]:
        """The segments that are answers, in order; none in a batch without examples."""
        return self.layout.leaves[: sum(self.answers)]

    @property
    def num_targets(self) -> int:
        """N: how many tokens are to be predicted."""
        return len(self.targets_N)

    @property
    def num_pairs(self) -> int:
        """P: how many pairs of answers are compared."""
        return len(self.better_P)

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch with its tensors on another device."""
        return replace(
            self,
            tokens_T=self.tokens_T.to(device),
            layout=self.layout.to(device),
            rows_N=self.rows_N.to(device),
            targets_N=self.targets_N.to(device),
            segment_of_N=self.segment_of_N.to(device),
            better_P=self.better_P.to(device),
            worse_P=self.worse_P.to(device),
            weights_P=self.weights_P.to(device),
            margins_P=self.margins_P.to(device),
        )


def collate(examples: Sequence[Example], numbers: Sequence[int] | None = None) -> Batch:
    """Pack examples into a batch, nothing padded. `numbers` are the examples' own, by default 0, 1, ...

    Without examples the batch holds one filler token and no target, for every rank must run the same number
    of forward passes even when there are fewer examples than ranks.
    """
    segments: list[tuple[int, int | None]] = []
    tokens: list[np.ndarray] = []
    rows: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    segment_of: list[np.ndarray] = []
    last_rows: list[int] = []
    start = 0
    for example in examples:
        base = len(segments)
        for segment in example.segments:
            parent = None if segment.parent is None else base + segment.parent
            places = np.flatnonzero(segment.loss_mask)
            if parent is None:
                places = places[places > 0]
            predicting = start + places - 1
            if parent is not None:
                predicting[places == 0] = last_rows[parent]
            rows.append(predicting)
            targets.append(segment.tokens[places])
            segment_of.append(np.full(len(places), len(segments)))
            segments.append((len(segment.tokens), parent))
            tokens.append(segment.tokens)
            start += len(segment.tokens)
            last_rows.append(start - 1)
    answers = [_num_answers(example) for example in examples]
    better_P, worse_P, weights_P, margins_P = _pairs(examples, answers)
    return Batch(
        tokens_T=_int64(tokens or [np.zeros(1)]),
        layout=Layout.tree(segments or [(1, None)]),
        rows_N=_int64(rows),
        targets_N=_int64(targets),
        segment_of_N=_int64(segment_of),
        better_P=better_P,
        worse_P=worse_P,
        weights_P=weights_P,
        margins_P=margins_P,
        numbers=tuple(range(len(examples)) if numbers is None else numbers),
        answers=tuple(answers),
        num_tokens=start,
    )


def _num_answers(example: Example) -> int:
    parents = {segment.parent for segment in example.segments}
    return sum(number not in parents for number in range(len(example.segments)))


def _pairs(examples: Sequence[Example], answers: Sequence[int]) -> tuple[torch.Tensor, ...]:
    """`better_P`, `worse_P`, `weights_P` and `margins_P` of a batch of these examples."""
    pairs, weights, margins, first = [], [], [], 0
    for example, num_answers in zip(examples, answers, strict=True):
        pairs += [(first + better, first + worse) for better, worse in example.pairs]
        weights += [1 / len(example.pairs) for _ in example.pairs]
        margins += [margin or 0.0 for margin in example.margins or [None] * len(example.pairs)]
        first += num_answers
    pairs_P2 = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
    weights_P, margins_P = (torch.tensor(values, dtype=torch.float32) for values in (weights, margins))
    return pairs_P2[:, 0], pairs_P2[:, 1], weights_P, margins_P


def _int64(pieces: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *pieces]).astype(np.int64))
