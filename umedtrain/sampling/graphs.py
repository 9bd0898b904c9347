"""One-token passes as CUDA graphs: the host launches one graph a token instead of a dozen kernels a layer.

A graph has fixed shapes and reads fixed memory. So there is one for each of a few numbers of rows, and a pass is copied
into the next larger one's buffers; surplus rows compute token 0 into a page of their own, which nobody reads.

Shape suffixes: R rows (sequences), M pages of a sequence, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from umedtrain.sampling.forward import Stream, TorchDecoder

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256)

Replay = Callable[[], None]


def capture_cuda_graph(run: Callable[[], None]) -> Replay:
    """Run once to compile and to allocate, then record; the returned function runs the recording."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


@dataclass
class _Recording:
    token_R: torch.Tensor
    position_R: torch.Tensor
    table_RM: torch.Tensor
    logits_RV: torch.Tensor
    replay: Replay


class GraphedDecoder:
    """A `TorchDecoder` that replays its one-token passes.

    Args:
        decoder: computes everything else, and what is recorded.
        scratch_page: of the cache, that no sequence is given.
        table_width: pages of the longest sequence.
        capture: makes a recording; another one than CUDA's in tests.
    """

    def __init__(
        self,
        decoder: TorchDecoder,
        *,
        scratch_page: int,
        table_width: int,
        capture: Callable[[Callable[[], None]], Replay] = capture_cuda_graph,
    ) -> None:
        self.decoder, self.exact = decoder, decoder.exact
        self.hidden, self.logits = decoder.hidden, decoder.logits
        self._scratch_page, self._table_width, self._capture = scratch_page, table_width, capture
        self._recordings: dict[int, _Recording] = {}

    def refresh(self) -> None:
        """Parameters may have moved, and recordings read them where they were."""
        self.decoder.refresh()
        self._recordings.clear()

    def next_logits(self, stream: Stream) -> torch.Tensor:
        """fp32 [R, V] for a stream of one token of each of up to 256 sequences; valid until the next call."""
        rows = len(stream.tokens_T)
        bucket = next((size for size in BUCKETS if size >= rows), None)
        if bucket is None:
            return self.decoder.next_logits(stream)
        if bucket not in self._recordings:
            self._recordings[bucket] = self._record(bucket, stream.tokens_T.device)
        recording = self._recordings[bucket]
        recording.token_R[:rows], recording.token_R[rows:] = stream.tokens_T, 0
        recording.position_R[:rows], recording.position_R[rows:] = stream.position_T, 0
        recording.table_RM.fill_(self._scratch_page)
        recording.table_RM[:rows, : stream.table_BM.shape[1]] = stream.table_BM[stream.sequence_T]
        recording.replay()
        return recording.logits_RV[:rows]

    def _record(self, rows: int, device: torch.device) -> _Recording:
        token_R, position_R = torch.zeros(2, rows, dtype=torch.int64, device=device)
        shape = (rows, self._table_width)
        table_RM = torch.full(shape, self._scratch_page, dtype=torch.int32, device=device)
        stream = Stream(token_R, torch.arange(rows, device=device), position_R, table_RM, rows)
        vocab_size = self.decoder.weights.config.vocab_size
        logits_RV = torch.empty(rows, vocab_size, device=device)

        def run() -> None:
            logits_RV.copy_(self.decoder.next_logits(stream))

        return _Recording(token_R, position_R, table_RM, logits_RV, self._capture(run))
