"""Examples and a tokenizer small enough to count by hand."""

from collections.abc import Sequence

import numpy as np

from umedtrain.data.example import Example, Segment

SPECIALS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>")


class ByteTokenizer:
    """A byte is a token (its value + 10); the special tokens are 0 to 5."""

    bos_id = 0
    eos_ids = (3, 5)
    vocab_size = 266

    def __init__(self, chat_template: str = "llama3") -> None:
        self.chat_template = chat_template

    def encode(self, text: str) -> list[int]:
        return [byte + 10 for byte in text.encode()]

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        return bytes(id_ - 10 for id_ in ids if id_ >= 10).decode()

    def special_id(self, name: str) -> int | None:
        return SPECIALS.index(name) if name in SPECIALS else None


def segment(tokens: Sequence[int], mask: Sequence[int] | None = None, parent: int | None = None) -> Segment:
    """A segment; without a mask, all of its tokens are learned."""
    learned = np.ones(len(tokens), bool) if mask is None else np.array(mask, dtype=bool)
    return Segment(np.array(tokens, dtype=np.int32), learned, parent)


def flat(length: int, first: int = 0) -> Example:
    """One segment of tokens first, first + 1, ..."""
    return Example((segment(range(first, first + length)),), "flat.jsonl", first + 1)


def pair(first: int = 0, prompt: int = 3, chosen: int = 2, rejected: int = 4) -> Example:
    """A prompt with two answers, tokens counting from `first`."""
    ids = iter(range(first, first + prompt + chosen + rejected))
    parts = [[next(ids) for _ in range(length)] for length in (prompt, chosen, rejected)]
    segments = (segment(parts[0], [0] * prompt), segment(parts[1], parent=0), segment(parts[2], parent=0))
    return Example(segments, "pair.jsonl", first + 1, pairs=((0, 1),))
