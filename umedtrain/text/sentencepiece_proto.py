"""The few fields of a SentencePiece model file that we need, read and changed without a protocol-buffer library.

The wire format is Google's protocol buffers (proto2); field numbers are those of sentencepiece_model.proto.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
UNIGRAM, BPE = 1, 2


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary; its id is its place in the list."""

    text: str
    score: float
    type: int


@dataclass(frozen=True)
class Model:
    """What a model file says of itself: pieces in id order, algorithm (UNIGRAM or BPE), normalisation."""

    pieces: tuple[Piece, ...]
    algorithm: int
    byte_fallback: bool
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    escape_whitespaces: bool
    charsmap: bytes
    unk_id: int
    bos_id: int
    eos_id: int
    pad_id: int


def read_model(content: bytes) -> Model:
    """Parse a model file. Raises ValueError if it is not one."""
    pieces: list[Piece] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for number, value in _fields(content):
        if number == 1:
            pieces.append(_piece(_message(value)))
        elif number == 2:
            trainer.update(_fields(_message(value)))
        elif number == 3:
            normalizer.update(_fields(_message(value)))
    if not pieces:
        raise ValueError("no pieces")
    return Model(
        pieces=tuple(pieces),
        algorithm=int(trainer.get(3, UNIGRAM)),
        byte_fallback=bool(trainer.get(35, 0)),
        add_dummy_prefix=bool(normalizer.get(3, 1)),
        remove_extra_whitespaces=bool(normalizer.get(4, 1)),
        escape_whitespaces=bool(normalizer.get(5, 1)),
        charsmap=_message(normalizer.get(2, b"")),
        unk_id=_signed(trainer.get(40, 0)),
        bos_id=_signed(trainer.get(41, 1)),
        eos_id=_signed(trainer.get(42, 2)),
        pad_id=_signed(trainer.get(43, -1)),
    )


def with_control(content: bytes, ids: set[int]) -> bytes:
    """The same model with the pieces `ids` made control symbols, which no text can spell."""
    out, next_id = bytearray(), 0
    for number, value in _fields(content):
        assert isinstance(value, bytes)  # the top level of a model holds messages only
        if number == 1:
            # A later value of a field replaces an earlier one, so the new type is simply appended.
            value = value + bytes([3 << 3, CONTROL]) if next_id in ids else value
            next_id += 1
        out += _varint(number << 3 | 2) + _varint(len(value)) + value
    return bytes(out)


def without_dummy_prefix(content: bytes) -> bytes:
    """The same model, not putting a space before a text's first word (a second normalizer message is merged in)."""
    return content + bytes([3 << 3 | 2, 2, 3 << 3, 0])


def _piece(content: bytes) -> Piece:
    fields = dict(_fields(content))
    score = struct.unpack("<f", _message(fields.get(2, bytes(4))))[0]
    return Piece(_message(fields.get(1, b"")).decode("utf-8"), score, int(fields.get(3, NORMAL)))


def _fields(content: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value): an int for varints, bytes for all else."""
    at = 0
    while at < len(content):
        key, at = _read_varint(content, at)
        wire = key & 7
        if wire == 0:
            value, at = _read_varint(content, at)
            yield key >> 3, value
            continue
        if wire == 2:
            size, at = _read_varint(content, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire} at byte {at}")
        if at + size > len(content):
            raise ValueError(f"cut at byte {len(content)}")
        yield key >> 3, content[at : at + size]
        at += size


def _message(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a number where a message was due")
    return value


def _read_varint(content: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(content) or shift > 63:
            raise ValueError(f"cut at byte {at}")
        byte = content[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _signed(value: int | bytes) -> int:
    assert isinstance(value, int)
    return value - 2**64 if value >= 2**63 else value
