"""Hugging Face's tokenizer.json, by the `tokenizers` library (extra `hf`)."""

from __future__ import annotations

import copy
import json
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from umedtrain.text.specials import DOCUMENT_STARTS, check_text, end_ids, jinja_of, looks_special, template_name

SPACE = "\u2581"
_SECRET = secrets.token_hex(8)


class HFTokenizer:
    """A tokenizer.json (see `umedtrain.text.tokenizer.Tokenizer`).

    content: the file's bytes, or what it says as a dict. config: the parsed tokenizer_config.json beside it, or {}.

    Special are the added tokens that the file calls special, and others written like them ("<name>", "[NAME]"). Text is
    encoded so that nothing a user writes can become one of them.

    Raises ValueError for what is not a tokenizer.json.
    """

    def __init__(
        self,
        content: bytes | dict,
        *,
        config: Mapping[str, object] | None = None,
        file: Path | str = "tokenizer.json",
    ) -> None:
        tokenizers = _import()
        # Kept as bytes: as Python objects, Llama-3's file takes ten times its size.
        self._content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.config = dict(config or {})
        spec = _parse(self._content, file)
        try:
            self._full = tokenizers.Tokenizer.from_buffer(self._content)
            self._plain, self._continued = self._full, self._full
            if not _switch_suffices(spec):
                self._plain = self._continued = tokenizers.Tokenizer.from_str(json.dumps(_plain_text_spec(spec)))
            if continued := _without_first_prefix(spec):
                self._continued = tokenizers.Tokenizer.from_str(json.dumps(_plain_text_spec(continued)))
            for each in (self._plain, self._continued):
                each.encode_special_tokens = True
                each.no_truncation()
                each.no_padding()
        except Exception as error:  # the library raises bare Exception for whatever it cannot read
            raise ValueError(f"{file}: the tokenizers library cannot load it ({error}).") from None
        self.special_tokens = {name: self._full.token_to_id(name) for name in _special_names(spec)}
        self._special_ids = frozenset(self.special_tokens.values())
        self.vocab_size = max(self._full.get_vocab(with_added_tokens=True).values()) + 1
        self.bos_id = self._config_id("bos_token")
        if self.bos_id is None:
            self.bos_id = next((i for n in DOCUMENT_STARTS if (i := self.special_id(n)) is not None), None)
        self.eos_ids = end_ids(self.special_id, (self._config_id("eos_token"),))
        self.chat_template = template_name(jinja_of(self.config), self.special_id, where=str(file))
        self._space_bytes = self._find_space_bytes(spec)

    @property
    def spec(self) -> dict:
        """What the file says, parsed anew."""
        return json.loads(self._content)

    def encode(self, text: str) -> list[int]:
        """Ids of plain text."""
        return self._encode(self._plain, text)

    def encode_continued(self, text: str) -> list[int]:
        """Ids of text that follows other tokens: no space is put before its first word (where the file says so)."""
        return self._encode(self._continued, text)

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """Text of ids; see the protocol."""
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"Id {i} is outside the vocabulary of {self.vocab_size}.")
        kept = [int(i) for i in ids if not (skip_special and i in self._special_ids)]
        return self._full.decode(kept, skip_special_tokens=False)

    def special_id(self, name: str) -> int | None:
        """Id of a special token, or None."""
        return self.special_tokens.get(name)

    def _encode(self, tokenizer: Any, text: str) -> list[int]:
        check_text(text)
        if self._space_bytes is None or SPACE not in text:
            return tokenizer.encode(text, add_special_tokens=False).ids
        ids: list[int] = []
        for n, part in enumerate(text.split(SPACE)):
            ids += (self._space_bytes if n else []) + tokenizer.encode(part, add_special_tokens=False).ids
        return ids

    def _config_id(self, key: str) -> int | None:
        value = self.config.get(key)
        name = value.get("content") if isinstance(value, dict) else value
        return self._full.token_to_id(name) if isinstance(name, str) else None

    def _find_space_bytes(self, spec: dict) -> list[int] | None:
        """Byte ids that spell the character which stands for a space, when the model is otherwise exact on any text
        (as the SentencePiece models trained here are): as a character it would come back as a space."""
        exact = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
        if spec.get("normalizer") != exact or not spec["model"].get("byte_fallback"):
            return None
        ids = [self._full.token_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        return None if None in ids else ids


def _parse(content: bytes, file: Path | str) -> dict:
    try:
        spec = json.loads(content)
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON ({error}); the file is cut or damaged.") from None
    if not isinstance(spec, dict) or not isinstance(spec.get("model"), dict):
        raise ValueError(f"{file}: has no 'model' entry, so it is not a tokenizer.json.")
    return spec


def _special_names(spec: dict) -> dict[str, None]:
    added = spec.get("added_tokens") or []
    return {t["content"]: None for t in added if t.get("special") or looks_special(t["content"])}


def _switch_suffices(spec: dict) -> bool:
    """Whether the library's own `encode_special_tokens` keeps text from becoming a special token: all of them are
    marked special, and none stands in the model's vocabulary too (so in Llama-3's file, of which a copy takes seconds).
    """
    vocab = spec["model"].get("vocab") or {}
    names = set(vocab) if isinstance(vocab, dict) else {piece for piece, _ in vocab}
    flags = {token["content"]: token.get("special") for token in spec.get("added_tokens") or []}
    return all(flags[name] and name not in names for name in _special_names(spec))


def _plain_text_spec(spec: dict) -> dict:
    """The same tokenizer with nothing that text could spell but ordinary pieces."""
    plain = dict(spec)
    hidden = _special_names(spec)
    # They stay in the list, under names that no text holds, because the list's order gives the other tokens their ids.
    plain["added_tokens"] = [
        {**token, "content": _hide(token["content"]), "special": True} if token["content"] in hidden else token
        for token in spec.get("added_tokens") or []
    ]
    model = dict(spec["model"])
    vocab = model.get("vocab")
    # The names also stand in the vocabulary of some models, where a whole-word look-up (BPE with ignore_merges) or the
    # search for the best pieces (Unigram) would find them.
    if isinstance(vocab, dict):
        model["vocab"] = {_hide(name) if name in hidden else name: i for name, i in vocab.items()}
        if model.get("unk_token") in hidden:
            model["unk_token"] = _hide(model["unk_token"])
        if "merges" in model:
            model["merges"] = [merge for merge in model["merges"] if _merged(merge) not in hidden]
    elif isinstance(vocab, list):
        model["vocab"] = [[_hide(name) if name in hidden else name, score] for name, score in vocab]
    plain["model"] = model
    return plain


def _without_first_prefix(spec: dict) -> dict | None:
    """The tokenizer for text after other tokens, if the file puts a space before the first word of a text only."""
    spec = copy.deepcopy({**spec, "model": None}) | {"model": spec["model"]}
    pre = spec.get("pre_tokenizer") or {}
    found = [step for step in (pre, *pre.get("pretokenizers", [])) if step.get("prepend_scheme") == "first"]
    for step in found:
        step["prepend_scheme"] = "never"
    return spec if found else None


def _merged(merge: str | Sequence[str]) -> str:
    return "".join(merge.split(" ", 1) if isinstance(merge, str) else merge)


def _hide(name: str) -> str:
    return f"\ufdd0{_SECRET}{name}\ufdd0"  # U+FDD0 is no character, and the secret keeps a text from spelling it


def _import() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError("A tokenizer.json needs the tokenizers library: pip install 'umedtrain[hf]'.") from error
    return tokenizers
