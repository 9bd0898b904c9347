"""Text of an answer as it grows, and the strings that end it."""

from collections.abc import Sequence

from umedtrain.text.tokenizer import Tokenizer

_INCOMPLETE = "\ufffd"
# More tokens than a character has bytes, so the one that these begin in is whole.
_LATEST = 8


class GrowingText:
    """Decodes an answer token by token; characters that span tokens appear with their last one.

    Attributes:
        text: what is decoded so far.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._shown = self._context = 0  # tokens in `text`; tokens before the window that is decoded anew
        self.text = ""

    def push(self, token: int) -> str:
        """Add a token; returns the new text, which may be empty."""
        self._tokens.append(token)
        # The window keeps what was shown last: a token's text can depend on the one before (leading spaces).
        shown = self._tokenizer.decode(self._tokens[self._context : self._shown])
        grown = self._tokenizer.decode(self._tokens[self._context :])
        end = len(self._tokens)
        if len(grown) <= len(shown) or grown.endswith(_INCOMPLETE):
            # Bytes that never become a character must not be decoded anew with each token to come.
            end -= _LATEST
            if end <= self._shown:
                return ""
            earlier = self._tokenizer.decode(self._tokens[self._context : end])
            if earlier + self._tokenizer.decode(self._tokens[end:]) != grown:
                return ""
            grown = earlier
        self._context, self._shown = self._shown, end
        new = grown[len(shown) :]
        self.text += new
        return new

    def flush(self) -> str:
        """The text of tokens that are still incomplete, at an answer's end."""
        shown = self._tokenizer.decode(self._tokens[self._context : self._shown])
        new = self._tokenizer.decode(self._tokens[self._context :])[len(shown) :]
        self.text, self._context, self._shown = self.text + new, self._shown, len(self._tokens)
        return new


def find_stop(text: str, stops: Sequence[str], known: int = 0) -> tuple[int, str] | None:
    """Place and string of the first match that ends after `known` characters; of several at that place, the longest."""
    found = [(at, -len(s), s) for s in stops if (at := text.find(s, max(0, known - len(s) + 1))) >= 0]
    if not found:
        return None
    at, _, stop = min(found)
    return at, stop


def held_back(text: str, stops: Sequence[str]) -> int:
    """Characters at the text's end that a stop string might begin with, and that must not be shown yet."""
    longest = max((len(stop) for stop in stops), default=1) - 1
    return next(
        (size for size in range(min(longest, len(text)), 0, -1) if any(s.startswith(text[-size:]) for s in stops)), 0
    )
