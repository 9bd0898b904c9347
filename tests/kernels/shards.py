"""Lists of tensors as an optimizer has them, and the sanitizer for kernels that find them by address."""

from contextlib import contextmanager
from unittest import mock

import torch

from umedtrain.kernels.offline import sanitizer

SIZES = (1, 3, 0, 300, 4099)
"""Elements of shards: none a multiple of a chunk, one empty, the last of more than one tile."""


def random_shards(sizes=SIZES, dtype=torch.float32):
    return [torch.randn(size).to(dtype) for size in sizes]


def clones(tensors):
    return [tensor.clone() for tensor in tensors]


@contextmanager
def watch_shards(*lists):
    """`sanitizer.watch`, where kernels may reach the tensors of `lists` beside those they are given."""
    reachable = [tensor for tensors in lists for tensor in tensors]
    begin = sanitizer.Watched.begin

    def begin_with_shards(self, name, tensors):
        begin(self, name, [*tensors, *reachable])

    with mock.patch.object(sanitizer.Watched, "begin", begin_with_shards), sanitizer.watch() as watched:
        yield watched
