"""SentencePiece models for tests, written field by field."""

import struct
from collections.abc import Sequence

BYTES = [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
SPECIALS = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
WORDS = [("▁t", -0.0), ("he", -1.0), ("▁the", -2.0), ("in", -3.0), ("▁", -4.0), *((c, -5.0) for c in "the▁inworld")]
PIECES = [*SPECIALS, *BYTES, *((word, score, 1) for word, score in dict(WORDS).items())]


def number(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def field(index: int, value: int | float | bytes) -> bytes:
    if isinstance(value, float):
        return number(index << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return number(index << 3) + number(value % 2**64)
    return number(index << 3 | 2) + number(len(value)) + value


def model(
    pieces: Sequence[tuple[str, float, int]] = PIECES,
    kind: int = 2,
    prefix: int = 1,
    charsmap: bytes = b"",
    more: bytes = b"",
) -> bytes:
    """The content of a `tokenizer.model`; `kind` 2 is byte pairs, `more` follows in the trainer's part."""
    parts = [
        field(1, field(1, text.encode()) + field(2, score) + (field(3, kind) if kind != 1 else b""))
        for text, score, kind in pieces
    ]
    trainer = field(3, kind) + field(35, 1) + more
    normalizer = field(1, b"identity") + (field(2, charsmap) if charsmap else b"") + field(3, prefix)
    return b"".join(parts) + field(2, trainer) + field(3, normalizer)
