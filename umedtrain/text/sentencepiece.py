"""SentencePiece models: Llama-2's and small ones trained here with Llama-3's special tokens."""

from __future__ import annotations

import io
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from umedtrain.text import sentencepiece_proto as proto
from umedtrain.text.specials import DOCUMENT_STARTS, check_text, end_ids, looks_special, template_name

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

SPACE = "\u2581"  # what SentencePiece writes for a space
_LINE_BYTES = 4000  # SentencePiece skips longer training lines


class SentencePieceTokenizer:
    """A SentencePiece model (see `umedtrain.text.tokenizer.Tokenizer`).

    model: the file's bytes. file: its name, for messages. jinja: the chat template's text, if there is one.

    Special are all control symbols and those user-defined symbols that look like "<name>" or "[NAME]"; the latter are
    made control symbols in memory, so that text which spells them stays text. Raises ValueError for a damaged model.
    """

    def __init__(self, model: bytes, *, file: Path | str = "tokenizer.model", jinja: str | None = None) -> None:
        try:
            self.model = proto.read_model(model)
            special = {i for i, piece in enumerate(self.model.pieces) if _is_special(piece)}
            named = {i for i in special if self.model.pieces[i].type == proto.USER_DEFINED}
            self.serialized = model
            self._processor = _processor(proto.with_control(model, named))
            self._continued = self._processor
            if self.model.add_dummy_prefix:
                self._continued = _processor(proto.without_dummy_prefix(proto.with_control(model, named)))
        except (ValueError, RuntimeError, AssertionError, TypeError) as error:
            raise ValueError(
                f"{file}: neither Llama-3's ranks nor a whole SentencePiece model ({error}); copy or download it again."
            ) from None
        self.special_tokens = {self.model.pieces[i].text: i for i in sorted(special)}
        self._names = {i: name for name, i in self.special_tokens.items()}
        byte_ids = {piece.text: i for i, piece in enumerate(self.model.pieces) if piece.type == proto.BYTE}
        # A model that puts a space before each text cannot be exact anyway; see `encode`.
        self._space_bytes = None
        if not self.model.add_dummy_prefix and self.model.escape_whitespaces and len(byte_ids) == 256:
            self._space_bytes = [byte_ids[f"<0x{byte:02X}>"] for byte in SPACE.encode()]
        self.vocab_size = len(self.model.pieces)
        self.bos_id: int | None = next(
            (self.special_tokens[name] for name in DOCUMENT_STARTS if name in self.special_tokens),
            self.model.bos_id if self.model.bos_id >= 0 else None,
        )
        own_eos = self.model.eos_id if self.model.eos_id >= 0 else None
        self.eos_ids = end_ids(self.special_id, (own_eos,))
        self.chat_template = template_name(jinja, self.special_id, where=str(file))

    def encode(self, text: str) -> list[int]:
        """Ids of plain text."""
        check_text(text)
        if self._space_bytes is None or SPACE not in text:
            return self._processor.encode(text)
        # The character that stands for a space inside the model would come back as a space: spell it in bytes.
        ids: list[int] = []
        for n, part in enumerate(text.split(SPACE)):
            ids += (self._space_bytes if n else []) + self._processor.encode(part)
        return ids

    def encode_continued(self, text: str) -> list[int]:
        """Ids of text that follows other tokens: no space is put before its first word."""
        if self._continued is self._processor:
            return self.encode(text)
        check_text(text)
        return self._continued.encode(text)

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """Text of ids; see the protocol."""
        parts: list[str] = []
        run: list[int] = []
        processor = self._processor  # only a document's first run has the model's extra space before it
        for i in (int(i) for i in ids):
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"Id {i} is outside the vocabulary of {self.vocab_size}.")
            if i not in self._names:
                run.append(i)
                continue
            parts += [processor.decode(run), "" if skip_special else self._names[i]]
            run, processor = [], self._continued
        return "".join([*parts, processor.decode(run)])

    def special_id(self, name: str) -> int | None:
        """Id of a special token, or None."""
        return self.special_tokens.get(name)


def train_sentencepiece(
    texts: Iterable[str],
    path: str | Path,
    *,
    vocab_size: int,
    model_type: Literal["bpe", "unigram"] = "bpe",
    max_texts: int | None = None,
    seed: int = 0,
) -> SentencePieceTokenizer:
    """Train a small SentencePiece model with Llama-3's special tokens, write it to `path`, and load it.

    vocab_size counts everything: "<unk>", 6 special tokens, 256 bytes, the learned pieces. `max_texts` draws that many
    texts by `seed`; without it the seed has no effect. The same texts give the same file.

    Lossless: nothing is normalised, added or removed, and bytes stand for unseen characters, so that
    decode(encode(text)) == text. Line breaks are never joined to other characters.

    Raises ValueError if there is no text or if `vocab_size` is too small or too large for the texts.
    """
    import sentencepiece

    chosen = list(texts)
    if max_texts is not None and len(chosen) > max_texts:
        chosen = random.Random(seed).sample(chosen, max_texts)
    for text in chosen:
        check_text(text)
    lines = [piece for text in chosen for line in text.splitlines() for piece in _short(line) if piece.strip()]
    if not lines:
        raise ValueError("train_sentencepiece was given no text to train on.")
    out = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=out,
            model_type=model_type,
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            character_coverage=0.9995,
            max_sentence_length=4 * _LINE_BYTES,
            num_threads=1,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            bos_piece="<|begin_of_text|>",
            eos_piece="<|end_of_text|>",
            pad_piece="<|finetune_right_pad_id|>",
            control_symbols=["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"vocab_size={vocab_size} does not suit these {len(lines)} lines of text: {reason}") from None
    Path(path).write_bytes(out.getvalue())
    return SentencePieceTokenizer(out.getvalue(), file=path)


def _short(line: str) -> Iterable[str]:
    """Parts of a line that SentencePiece will not skip for their length, cut at spaces where there are any."""
    limit = _LINE_BYTES // 4  # characters; at most four bytes each
    while len(line) > limit:
        cut = line.rfind(" ", 1, limit)
        cut = limit if cut < 1 else cut
        yield line[:cut]
        line = line[cut:]
    yield line


def _is_special(piece: proto.Piece) -> bool:
    if piece.type == proto.USER_DEFINED:
        return looks_special(piece.text)
    return piece.type in (proto.CONTROL, proto.UNKNOWN)


def _processor(model: bytes) -> SentencePieceProcessor:
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_proto=model)
