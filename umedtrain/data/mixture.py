"""The order in which examples of several sources are seen: a pure function of the seed.

A source's weight says how many times its examples are seen per epoch, and nothing else: 1 is once, 2 is
twice, 0.5 is a random half. Each source is an endless series of passes, every pass a fresh permutation of its
examples, and an epoch takes the next `weight * size` examples of that series. So two epochs at weight 0.5 see
every example once, and at any weight two examples of a source never differ by more than one in how often they
were seen. An epoch's examples are then shuffled together.
"""

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

# Keep the random numbers of a source's passes and those of the shuffled epochs apart.
_PASS, _EPOCH = 0, 1


class Mixture:
    """An endless sequence of epochs over the examples of some sources, which are numbered through.

    Args:
        sizes: examples of each source.
        weights: how often each source's examples are seen per epoch; empty for once each.
        seed: of all permutations.
        shuffle: False keeps sources and examples in their order.

    Raises:
        ValueError: for empty sources, weights that are not positive numbers, or not one per source.
    """

    def __init__(
        self, sizes: Sequence[int], weights: Sequence[float] = (), seed: int = 0, *, shuffle: bool = True
    ) -> None:
        self.sizes = tuple(int(size) for size in sizes)
        self.weights = tuple(float(weight) for weight in weights) or (1.0,) * len(self.sizes)
        self.seed, self.shuffle = int(seed), shuffle
        if not self.sizes or min(self.sizes) < 1:
            raise ValueError(f"every source needs at least one example, got sizes {list(self.sizes)}")
        if len(self.weights) != len(self.sizes):
            raise ValueError(
                f"data.weights has {len(self.weights)} numbers for {len(self.sizes)} files; give one per file"
            )
        if not all(math.isfinite(weight) and weight > 0 for weight in self.weights):
            raise ValueError(f"data.weights must be positive numbers, got {list(self.weights)}; leave out unused files")
        if self.seed < 0:
            raise ValueError(f"the seed must not be negative, got {self.seed}")
        # As the decimals that the user wrote, so that ten epochs at weight 0.1 are one pass and not almost
        # one.
        per_epoch = [Fraction(repr(weight)) * size for weight, size in zip(self.weights, self.sizes, strict=True)]
        self._per_epoch = tuple(per_epoch)
        self._offsets = tuple(int(offset) for offset in np.cumsum([0, *self.sizes[:-1]]))

    def start(self, epoch: int) -> int:
        """How many examples are seen before the given epoch."""
        return sum(self._seen(source, epoch) for source in range(len(self.sizes)))

    def num_examples(self, epochs: float) -> int:
        """How many examples a number of epochs, whole or not, has."""
        whole = math.floor(epochs)
        part = Fraction(repr(float(epochs))) - whole
        return self.start(whole) + round(part * (self.start(whole + 1) - self.start(whole)))

    def epoch_of(self, position: int) -> int:
        """The epoch that holds the example at a position of the whole sequence."""
        # Each source's share is rounded down, so the estimate may be early but never late.
        epoch = math.floor(position / sum(self._per_epoch))
        while self.start(epoch + 1) <= position:
            epoch += 1
        return epoch

    def epoch(self, epoch: int) -> np.ndarray:
        """int64: the examples of an epoch, in the order in which they are seen."""
        pieces = []
        for source, offset in enumerate(self._offsets):
            pieces.append(offset + self._take(source, self._seen(source, epoch), self._seen(source, epoch + 1)))
        examples = np.concatenate(pieces)
        return examples[self._permutation(len(examples), _EPOCH, 0, epoch)]

    def _seen(self, source: int, epoch: int) -> int:
        """Examples of a source that are seen before an epoch."""
        return math.floor(epoch * self._per_epoch[source])

    def _take(self, source: int, start: int, end: int) -> np.ndarray:
        """Positions [start, end) of a source's series of passes."""
        size = self.sizes[source]
        pieces = [np.zeros(0, np.int64)]
        for number in range(start // size, -(-end // size)):
            one_pass = self._permutation(size, _PASS, source, number)
            pieces.append(one_pass[max(start - number * size, 0) : end - number * size])
        return np.concatenate(pieces)

    def _permutation(self, size: int, *key: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(size)
        # Sorting a bit generator's raw output: numpy promises that stream for all versions, but not
        # `permutation`'s.
        raw = np.random.Philox(np.random.SeedSequence([self.seed, *key])).random_raw(size)
        return np.argsort(raw, kind="stable")
