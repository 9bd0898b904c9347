"""Tokenizers of models that have more embeddings than there are tokens."""

from collections.abc import Sequence

from umedtrain.text.tokenizer import Tokenizer


class Padded(Tokenizer):
    """A tokenizer for which ids beyond its vocabulary, which a model may draw all the same, are no text at all.

    Args:
        tokenizer: of which everything else is taken.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.bos_id, self.eos_ids = tokenizer.bos_id, tokenizer.eos_ids
        self.vocab_size, self.chat_template = tokenizer.vocab_size, tokenizer.chat_template

    def __getattr__(self, name: str) -> object:
        return getattr(self._tokenizer, name)

    def encode(self, text: str) -> list[int]:
        """Ids of plain text."""
        return self._tokenizer.encode(text)

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """Text of the ids that have any."""
        return self._tokenizer.decode([i for i in ids if i < self.vocab_size], skip_special=skip_special)

    def special_id(self, name: str) -> int | None:
        """Id of a special token."""
        return self._tokenizer.special_id(name)
