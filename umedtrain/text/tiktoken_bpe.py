"""Llama-3's own tokenizer: a file of byte ranks for tiktoken, its split pattern, 256 special tokens after the ranks."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from umedtrain.text.specials import check_text, end_ids, llama3_specials, template_name

# How Llama-3 splits text before merging bytes; part of the format, ids depend on each character of it.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# tiktoken's regex engine overflows on huge texts and on huge runs of one kind; Meta cuts at these lengths, so do we.
MAX_CHARS = 400_000
MAX_RUN = 25_000
_RUNS = re.compile(r"\s+|\S+")


def looks_like_ranks(content: bytes) -> bool:
    """Whether a file's content is text of lines "base64 rank" (and not a SentencePiece protocol buffer)."""
    return re.match(rb"\s*[A-Za-z0-9+/]+={0,2} \d+\s", content[:4096] + b"\n") is not None


def parse_ranks(content: bytes, *, file: Path | str = "tokenizer.model") -> dict[bytes, int]:
    """Byte string -> rank. Raises ValueError naming the line for a line that is not "base64 rank", a repeated token,
    ranks that are not 0..n-1, or a missing single byte."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            token_base64, rank = line.split()
            token = base64.b64decode(token_base64, validate=True)
            value = int(rank)
        except (ValueError, binascii.Error):
            raise ValueError(f"{file}:{number}: not 'base64 rank': {line[:60]!r}; the file is damaged.") from None
        if token in ranks or value != len(ranks):
            raise ValueError(
                f"{file}:{number}: rank {value} where {len(ranks)} was due, or a repeated token; the file is damaged."
            )
        ranks[token] = value
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ValueError(
            f"{file}: {len(missing)} single bytes have no rank (first 0x{missing[0]:02X}); the file is cut."
        )
    return ranks


def dump_ranks(ranks: dict[bytes, int]) -> bytes:
    """The file that `parse_ranks` reads."""
    return b"".join(
        base64.b64encode(token) + b" %d\n" % rank for token, rank in sorted(ranks.items(), key=lambda e: e[1])
    )


def cut_long_runs(text: str) -> Iterator[str]:
    """Cut text every 400,000 characters, and each run of white or of non-white characters every 25,000.

    The same places as Meta's tokenizer, so that ids are the same for any text.
    """
    if len(text) <= MAX_RUN:
        yield text
        return
    for first in range(0, len(text), MAX_CHARS):
        part = text[first : first + MAX_CHARS]
        start = 0
        for run in _RUNS.finditer(part):
            for cut in range(run.start() + MAX_RUN, run.end(), MAX_RUN):
                yield part[start:cut]
                start = cut
        yield part[start:]


class TiktokenTokenizer:
    """Llama-3's tokenizer (see `umedtrain.text.tokenizer.Tokenizer`).

    ranks: byte string -> rank, ranks 0..n-1. jinja: the chat template's text, if a tokenizer_config.json gave one.
    """

    def __init__(self, ranks: dict[bytes, int], *, jinja: str | None = None) -> None:
        import tiktoken

        self.ranks = ranks
        self.special_tokens = {name: len(ranks) + i for i, name in enumerate(llama3_specials())}
        self._encoding = tiktoken.Encoding(
            "llama3", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=self.special_tokens
        )
        self.vocab_size = len(ranks) + len(self.special_tokens)
        self.bos_id: int | None = self.special_tokens["<|begin_of_text|>"]
        self.eos_ids = end_ids(self.special_id)
        self.chat_template = template_name(jinja, self.special_id)

    def encode(self, text: str) -> list[int]:
        """Ids of plain text."""
        check_text(text)
        return [i for part in cut_long_runs(text) for i in self._encoding.encode_ordinary(part)]

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """Text of ids; see the protocol."""
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"Id {i} is outside the vocabulary of {self.vocab_size}.")
        first_special = len(self.ranks)
        return self._encoding.decode([int(i) for i in ids if not skip_special or i < first_special])

    def special_id(self, name: str) -> int | None:
        """Id of a special token, or None."""
        return self.special_tokens.get(name)
