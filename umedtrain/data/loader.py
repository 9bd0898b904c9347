"""Steps of a training run: which examples each sees, dealt out to ranks and packed into micro-batches.

Which examples step i sees is a function of the data, the seed and i alone. Ranks and the token budget only
decide how they are cut up. The loader's place in the data is therefore the step's number, and a resumed run
needs no other state.
"""

import hashlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from umedtrain.data.batch import Batch, collate
from umedtrain.data.example import Example
from umedtrain.data.mixture import Mixture
from umedtrain.data.packing import pack


class Loader:
    """Micro-batches of one rank, for each optimizer step.

    The epochs of the mixture follow each other as one sequence, cut into steps of `batch_size` examples; a
    step may reach over the end of an epoch, and the last step may be smaller. Nothing is left out.

    Args:
        examples_by_source: the examples of each source.
        batch_size: examples per optimizer step, over all ranks and micro-batches.
        max_tokens: tokens that one micro-batch may hold.
        weights: see `Mixture`; empty for every example once per epoch.
        seed: of the order.
        shuffle: False keeps the order of the sources.
        epochs: passes over the mixture, whole or not.
        max_steps: stop after so many steps; 0 for no such bound.
        rank: which of `num_ranks` shares this loader gives.
        num_ranks: over how many ranks a step's examples are dealt.

    Raises:
        ValueError: for arguments out of range, and for an example longer than `max_tokens`.
    """

    def __init__(
        self,
        examples_by_source: Sequence[Sequence[Example]],
        *,
        batch_size: int,
        max_tokens: int,
        weights: Sequence[float] = (),
        seed: int = 0,
        shuffle: bool = True,
        epochs: float = 1.0,
        max_steps: int = 0,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch.examples must be at least 1, got {batch_size}")
        if not epochs > 0 or epochs == float("inf") or max_steps < 0:
            raise ValueError(f"batch.epochs must be above 0, batch.max_steps at least 0; got {epochs} and {max_steps}")
        assert 0 <= rank < num_ranks
        self.mixture = Mixture([len(examples) for examples in examples_by_source], weights, seed, shuffle=shuffle)
        self.batch_size, self.max_tokens, self.rank, self.num_ranks = batch_size, max_tokens, rank, num_ranks
        self.examples = [example for examples in examples_by_source for example in examples]
        self._lengths = [example.num_tokens for example in self.examples]
        self._check_lengths()
        self._digest = _content_digest(examples_by_source)
        self._epoch = lru_cache(maxsize=2)(self.mixture.epoch)
        self._num_seen = self.mixture.num_examples(epochs)
        if max_steps:
            self._num_seen = min(self._num_seen, max_steps * batch_size)
        if self._num_seen == 0:
            raise ValueError("weights and epochs leave not a single example; raise data.weights or batch.epochs")

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return -(-self._num_seen // self.batch_size)

    def step_examples(self, step: int) -> list[int]:
        """The examples of a step, over all ranks, numbered through from the first source's first."""
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step {step} is not one of the run's {self.num_steps} steps")
        position, end = step * self.batch_size, min((step + 1) * self.batch_size, self._num_seen)
        examples: list[int] = []
        while position < end:
            epoch = self.mixture.epoch_of(position)
            start = position - self.mixture.start(epoch)
            piece = self._epoch(epoch)[start : start + end - position]
            examples.extend(piece.tolist())
            position += len(piece)
        return examples

    def batch(self, step: int) -> list[Batch]:
        """This rank's micro-batches of a step; every rank has the same number, some perhaps without examples."""
        examples = self.step_examples(step)
        lengths = [self._lengths[index] for index in examples]
        plan = pack(lengths, max_tokens=self.max_tokens, num_ranks=self.num_ranks)[self.rank]
        shares = [[examples[place] for place in micro_batch] for micro_batch in plan]
        return [collate([self.examples[number] for number in share], share) for share in shares]

    def state_dict(self) -> dict[str, Any]:
        """What, beside the step's number, decides what a step sees. Equal on all ranks and at all steps."""
        return {
            "batch_size": self.batch_size,
            "seed": self.mixture.seed,
            "shuffle": self.mixture.shuffle,
            "sizes": " ".join(map(str, self.mixture.sizes)),
            "weights": " ".join(map(repr, self.mixture.weights)),
            "examples": self._digest,
        }

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Refuse to go on with other data than those that `state_dict` described.

        Raises:
            ValueError: that names each thing that differs, before and now.
        """
        changed = [
            f"{key} was {state.get(key)!r} and is {now!r}"
            for key, now in self.state_dict().items()
            if state.get(key) != now
        ]
        if changed:
            raise ValueError(f"the run's data are not those that it started with: {'; '.join(changed)}")

    def _check_lengths(self) -> None:
        longest = int(np.argmax(self._lengths))
        if self._lengths[longest] > self.max_tokens:
            example = self.examples[longest]
            raise ValueError(
                f"{example.source}, line {example.line}: the example has {self._lengths[longest]} tokens, more than "
                f"a micro-batch of {self.max_tokens}; raise batch.micro_batch_tokens or lower data.max_tokens"
            )


def _content_digest(examples_by_source: Sequence[Sequence[Example]]) -> str:
    """SHA-256 over tokens, masks, structure, pairs and margins of all examples in order, wherever read from."""
    digest = hashlib.sha256()
    for examples in examples_by_source:
        digest.update(np.int64(len(examples)).tobytes())
        for example in examples:
            parents = [-1 if segment.parent is None else segment.parent for segment in example.segments]
            lengths = [len(segment.tokens) for segment in example.segments]
            pairs = [place for pair in example.pairs for place in pair]
            digest.update(np.array([len(parents), *parents, *lengths, len(pairs), *pairs], dtype="<i8").tobytes())
            for segment in example.segments:
                digest.update(segment.tokens.astype("<i4", copy=False).tobytes())
                digest.update(segment.loss_mask.tobytes())
            if example.margins:
                digest.update(repr(example.margins).encode())
    return digest.hexdigest()
