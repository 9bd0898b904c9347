"""A stand-in for the forward pass whose logits are a hash of what the pages hold: a wrong page gives wrong tokens."""

import numpy as np
import torch

from umedtrain.model.config import LlamaConfig
from umedtrain.model.llama import Llama
from umedtrain.sampling import engine as engine_module

CONFIG = LlamaConfig(
    vocab_size=31,
    hidden_size=4,
    intermediate_size=4,
    num_hidden_layers=1,
    num_attention_heads=1,
    num_key_value_heads=1,
    head_dim=4,
    tie_word_embeddings=True,
    max_position_embeddings=60,
)
PAGE = 4
_BUCKETS = 4093
_LOGITS = torch.randn(_BUCKETS, CONFIG.vocab_size, generator=torch.Generator().manual_seed(0))


class HashDecoder:
    """Stores tokens where keys and values would be, and counts the tokens that it was given."""

    def __init__(self, num_pages):
        self.slots = np.full((num_pages, PAGE), -1)
        self.streamed = []

    def refresh(self):
        pass

    def hidden(self, stream):
        self.streamed.append(len(stream.tokens_T))
        table = stream.table_BM.numpy()
        rows, positions = stream.sequence_T.tolist(), stream.position_T.tolist()
        for token, row, position in zip(stream.tokens_T.tolist(), rows, positions, strict=True):
            self.slots[table[row, position // PAGE], position % PAGE] = token
        hashes = []
        for row, position in zip(rows, positions, strict=True):
            seen, value = self.slots[table[row]].reshape(-1)[: position + 1], 7
            for token in seen.tolist():
                value = (value * 131 + token + 1) % _BUCKETS
            hashes.append(value)
        return torch.tensor(hashes, dtype=torch.float32)[:, None]

    def logits(self, hidden_RD):
        return _LOGITS[hidden_RD[:, 0].long()]

    def next_logits(self, stream):
        return self.logits(self.hidden(stream))

    def copy_pages(self, sources, targets):
        self.slots[targets] = self.slots[sources]


def hash_engine(monkeypatch, num_pages, *, max_rows=8, chunk_tokens=2048, eos_ids=(), **options):
    """An engine with so many pages of PAGE tokens; its decoder is a `HashDecoder`."""
    monkeypatch.setattr(engine_module, "PAGE_SIZE", PAGE)
    bytes_of_page = 2 * 4 * PAGE * 4
    engine = engine_module.Engine(
        Llama(CONFIG),
        eos_ids=eos_ids,
        max_rows=max_rows,
        chunk_tokens=chunk_tokens,
        cache_bytes=num_pages * bytes_of_page,
        **options,
    )
    engine.decoder = engine.cache = HashDecoder(engine.pool.num_pages)
    return engine
