"""The tokenizer that the rest of the project sees, and loading one from disk.

Three kinds of files: Llama-3's tiktoken ranks, SentencePiece models, and Hugging Face's tokenizer.json. All of them
encode plain text only: a user who writes "<|eot_id|>" gets the pieces of those characters, never the special id.
Special ids enter a token stream in one place, `render_chat`.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from umedtrain.text.specials import jinja_of


@runtime_checkable
class Tokenizer(Protocol):
    """Text to ids and back.

    bos_id: the id that starts a document, None if the vocabulary has none.
    eos_ids: every id that ends a turn or a document, the end of a turn first.
    vocab_size: one more than the largest id.
    chat_template: the template that `render_chat` uses by default: "llama3", "llama3.1", "chatml" or "plain".
    """

    bos_id: int | None
    eos_ids: tuple[int, ...]
    vocab_size: int
    chat_template: str

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, without begin or end tokens; text that spells a special token stays text.

        Raises ValueError for text with half a surrogate pair.
        """
        ...

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """Text of ids; special tokens are written by their names, or left out with `skip_special`.

        Bytes that are not UTF-8 become U+FFFD. Raises ValueError for an id outside the vocabulary.
        """
        ...

    def special_id(self, name: str) -> int | None:
        """Id of a special token by its name, for example "<|eot_id|>"; None if the vocabulary has it not."""
        ...


def encode_continued(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of text that follows other tokens: as `encode`, but without the space that some SentencePiece models put
    before a text's first word."""
    return getattr(tokenizer, "encode_continued", tokenizer.encode)(text)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer from a directory or from one file.

    A directory's tokenizer.json is taken when the `tokenizers` library is installed, else its tokenizer.model: ranks of
    Llama-3 or a SentencePiece model, which the content decides. The chat template's name comes from the
    tokenizer_config.json or chat_template.jinja beside it, else from the special tokens.

    Raises ValueError for an empty, cut or corrupt file and for a directory without a tokenizer, FileNotFoundError for
    a path that does not exist, ImportError (naming the extra) if only a tokenizer.json is there and `tokenizers` is not
    installed.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such tokenizer file or directory.")
    file = _choose(path) if path.is_dir() else path
    config = _read_config(file.parent)
    content = file.read_bytes()
    if not content.strip():
        raise ValueError(f"{file}: the tokenizer file is empty; copy or download it again.")
    if content.startswith(b"version https://git-lfs"):
        raise ValueError(f"{file}: this is a Git LFS pointer, not the tokenizer itself; run 'git lfs pull' first.")
    if content.lstrip()[:1] == b"{":
        from umedtrain.text.hf_json import HFTokenizer

        return HFTokenizer(content, file=file, config=config)
    from umedtrain.text import sentencepiece, tiktoken_bpe

    if tiktoken_bpe.looks_like_ranks(content):
        return tiktoken_bpe.TiktokenTokenizer(tiktoken_bpe.parse_ranks(content, file=file), jinja=jinja_of(config))
    return sentencepiece.SentencePieceTokenizer(content, file=file, jinja=jinja_of(config))


def _choose(directory: Path) -> Path:
    as_json, as_model = directory / "tokenizer.json", directory / "tokenizer.model"
    if as_json.is_file() and (importlib.util.find_spec("tokenizers") is not None or not as_model.is_file()):
        return as_json
    if as_model.is_file():
        return as_model
    raise ValueError(f"{directory}: neither tokenizer.json nor tokenizer.model is in this directory.")


def _read_config(directory: Path) -> dict[str, object]:
    """tokenizer_config.json, with the template of chat_template.jinja (where newer exports put it) in its place."""
    file, template = directory / "tokenizer_config.json", directory / "chat_template.jinja"
    config: dict[str, object] = {}
    if file.is_file():
        try:
            config = json.loads(file.read_text("utf-8"))
        except ValueError as error:
            raise ValueError(f"{file}: not valid JSON ({error}).") from None
        if not isinstance(config, dict):
            raise ValueError(f"{file}: holds {type(config).__name__}, not an object.")
    if template.is_file():
        config["chat_template"] = template.read_text("utf-8")
    return config
