"""The two-level cache against attention over each whole sequence."""

import pytest
import torch

from umedtrain.model.attention import attention
from umedtrain.model.layout import Layout
from umedtrain.sampling.cache import SharedPromptCache

HEADS, HEAD_DIM, LAYERS = 4, 6, 2


class Reference:
    """Every sample's whole sequence of (q, k, v), attended over from scratch."""

    def __init__(self, lengths, counts, kv_heads, generator):
        self.kv_heads, self.generator = kv_heads, generator
        self.prompts = [self.random(length) for length in lengths]
        self.samples = {(p, n): [self.prompts[p]] for p, count in enumerate(counts) for n in range(count)}

    def random(self, length):
        shapes = [(length, HEADS, HEAD_DIM)] + 2 * [(length, self.kv_heads, HEAD_DIM)]
        return [torch.randn(shape, generator=self.generator) for shape in shapes]

    def step(self, live):
        """New q, k, v of the live samples, stacked, and the attention outputs wanted for them."""
        for sample in live:
            self.samples[sample].append(self.random(1))
        wanted = []
        for sample in live:
            q, k, v = (torch.cat(parts) for parts in zip(*self.samples[sample], strict=True))
            wanted.append(attention(q, k, v, Layout.packed([len(q)]))[-1])
        new = [torch.cat([self.samples[sample][-1][i] for sample in live]) for i in range(3)]
        return new, torch.stack(wanted)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("counts", [[3, 3, 3], [1, 1, 1], [2, 5, 1]], ids=str)
def test_decoding_equals_attention_over_the_whole_sequence(kv_heads, counts):
    generator = torch.Generator().manual_seed(0)
    lengths = [4, 1, 7]
    references = [Reference(lengths, counts, kv_heads, generator) for _ in range(LAYERS)]
    live = [(p, n) for p, count in enumerate(counts) for n in range(count)]
    prompt_R, sample_R = torch.tensor(live).unbind(1)
    cache = SharedPromptCache(lengths, prompt_R, sample_R, capacity=12)

    for first, layout in ((0, Layout.packed(lengths[:2])), (2, Layout.packed(lengths[2:]))):
        cache.prefill(first)
        assert cache.positions(layout).equal(layout.positions_T)
        for layer, reference in enumerate(references):
            prompts = reference.prompts[first : first + layout.num_segments]
            q, k, v = (torch.cat(parts) for parts in zip(*prompts, strict=True))
            torch.testing.assert_close(cache.attend(layer, q, k, v, layout), attention(q, k, v, layout))
    cache.prefill(None)

    cells = set()
    for step in range(12):
        layout = Layout.packed([1] * len(live))
        assert cache.positions(layout).tolist() == [lengths[p] + step for p, _ in live]
        for layer, reference in enumerate(references):
            new, wanted = reference.step(live)
            torch.testing.assert_close(cache.attend(layer, *new, layout), wanted, atol=1e-5, rtol=1e-5)
        cache.advance()
        cells.add(len(cache.lengths_P) * cache.samples)
        if step % 2 and len(live) > 1:
            kept = [i for i in range(len(live)) if i % 3 != step % 3] or [0]
            cache.keep(torch.tensor(kept))
            live = [live[i] for i in kept]
    assert len(live) < sum(counts)
    assert len(cells) > 1, "the grid never shrank"


def test_memory_past_a_prompts_end_is_never_read(monkeypatch):
    poisoned = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda x, *shape: poisoned(x, *shape).fill_(torch.nan))
    cache = SharedPromptCache([1, 3], torch.tensor([0, 1]), torch.tensor([0, 0]), capacity=4)
    cache.prefill(0)
    cache.attend(0, torch.ones(4, 2, 4), torch.ones(4, 1, 4), torch.ones(4, 1, 4), Layout.packed([1, 3]))
    cache.prefill(None)
    out = cache.attend(0, torch.ones(2, 2, 4), torch.ones(2, 1, 4), torch.ones(2, 1, 4), Layout.packed([1, 1]))
    torch.testing.assert_close(out, torch.ones(2, 2, 4))
