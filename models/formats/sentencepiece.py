"""SentencePiece's `tokenizer.model` as a `tokenizers` model: what targets of Llama's first years are released with.

The file is a protobuf message; the few fields that matter are read here, without the library. Byte-pair models with
byte fallback become what transformers makes of them.
"""

import dataclasses
import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from models.errors import UserError

_UNIGRAM, _BPE = 1, 2
_UNKNOWN, _CONTROL, _USER = 2, 3, 4
_KINDS = {_UNIGRAM: "a unigram", 3: "a word", 4: "a character"}
_SPACE = "▁"


@dataclasses.dataclass(frozen=True)
class SentencePiece:
    """What a `tokenizer.model` holds.

    Attributes:
      pieces: texts by id.
      scores: of the pieces; the best is merged first.
      kinds: 1 a text, 2 unknown, 3 control, 4 the user's, 5 unused, 6 a byte.
      model: 1 unigram, 2 byte pairs, 3 words, 4 characters.
      specials: ids of `unk`, `bos` and `eos`, below 0 where there is none.
      prefix: a space is put before texts.
      charsmap: the compiled normalisation; empty for none.
    """

    pieces: list[str]
    scores: list[float]
    kinds: list[int]
    model: int
    specials: dict[str, int]
    prefix: bool
    charsmap: bytes


def read_sentencepiece(path: Path, config: Mapping[str, Any]) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """The tokenizer of a `tokenizer.model`, and what `tokenizer_config.json` says of it where that is silent.

    Args:
      path: the file.
      config: contents of `tokenizer_config.json`, whose `legacy`, `add_prefix_space` and `add_bos_token` count.

    Raises:
      UserError: it is no SentencePiece model, is damaged, or of a kind that is not supported.
    """
    model = parse(path.read_bytes(), path)
    if model.model != _BPE:
        raise UserError(f"{path} is {_KINDS.get(model.model, 'an unknown')} model of SentencePiece; BPE is supported")
    if model.charsmap:
        raise UserError(f"{path} normalises texts by a compiled table, which is not supported")
    vocab = {piece: i for i, piece in enumerate(model.pieces)}
    if len(vocab) < len(model.pieces):
        raise UserError(f"{path} is damaged: some of its pieces occur twice")
    names = {name: model.pieces[i] for name, i in model.specials.items() if 0 <= i < len(model.pieces)}
    unknown = [piece for piece, kind in zip(model.pieces, model.kinds, strict=True) if kind == _UNKNOWN]
    defaults = {f"{name}_token": piece for name, piece in names.items()} | {"add_bos_token": True}
    settings = {**defaults, "add_prefix_space": model.prefix, "legacy": False, **config}
    prefix, legacy = settings["add_prefix_space"] is not False, bool(settings["legacy"])
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    content = {
        "version": "1.0",
        "added_tokens": [
            {**dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)}
            | {"id": i, "content": model.pieces[i], "special": kind != _USER}
            for i, kind in enumerate(model.kinds)
            if kind in (_UNKNOWN, _CONTROL, _USER)
        ],
        "pre_tokenizer": {
            "type": "Metaspace",
            "replacement": _SPACE,
            "prepend_scheme": ("always" if legacy else "first") if prefix else "never",
            "split": False,
        },
        "post_processor": _begins(names.get("bos"), vocab) if settings["add_bos_token"] else None,
        "decoder": {
            "type": "Sequence",
            "decoders": [*decoders, {"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else decoders,
        },
        "model": {
            "type": "BPE",
            "unk_token": next(iter(unknown), None),
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocab,
            "merges": merges(model.pieces, model.scores),
        },
    }
    return tokenizers.Tokenizer.from_str(json.dumps(content)), {"tokenizer_class": "LlamaTokenizer", **defaults}


def merges(pieces: Sequence[str], scores: Sequence[float], first: int = 0) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third from `first` on, best score first: SentencePiece's rule as ranks."""
    known = set(pieces)
    ranked = []
    for i in range(first, len(pieces)):
        for cut in range(1, len(pieces[i])):
            pair = (pieces[i][:cut], pieces[i][cut:])
            if pair[0] in known and pair[1] in known:
                ranked.append((-scores[i], i, cut, pair))
    return [pair for *_, pair in sorted(ranked)]


def is_sentencepiece(start: bytes) -> bool:
    """Whether a file that begins so may be a SentencePiece model: its first field is a piece with a text."""
    return len(start) > 3 and start[0] == 0x0A and start[2] == 0x0A


def parse(data: bytes, path: Path) -> SentencePiece:
    """The message of a `tokenizer.model`. Raises UserError, naming `path`, where it is none."""
    try:
        pieces, scores, kinds = [], [], []
        trainer: dict[int, Any] = {}
        normalizer: dict[int, Any] = {}
        for field, value in _fields(data):
            if field == 1:
                entry = dict(_fields(value))
                pieces.append(entry[1].decode("utf-8"))
                scores.append(struct.unpack("<f", entry.get(2, bytes(4)))[0])
                kinds.append(entry.get(3, 1))
            elif field in (2, 3):
                (trainer if field == 2 else normalizer).update(_fields(value))
        if not pieces:
            raise ValueError
        numbers = [trainer.get(field, default) for field, default in ((3, _UNIGRAM), (40, 0), (41, 1), (42, 2))]
        # Numbers are signed, and -1 is written as the 64 bits that it has.
        kind, *ids = (number - 2**64 if number >= 2**63 else number for number in numbers)
        specials = dict(zip(("unk", "bos", "eos"), ids, strict=True))
        charsmap, prefix = bytes(normalizer.get(2, b"")), bool(normalizer.get(3, 1))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, struct.error):
        hint = ""
        if data[:64].isascii() and b" " in data[:64]:
            hint = " (it looks like a tiktoken vocabulary, which is not read here)"
        raise UserError(f"{path} is damaged or not a SentencePiece model{hint}") from None
    return SentencePiece(pieces, scores, kinds, kind, specials, prefix, charsmap)


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protobuf message: numbers as int, the rest as bytes. Raises ValueError or IndexError."""
    at = 0
    while at < len(data):
        tag, at = _number(data, at)
        if tag & 7 == 0:
            value, at = _number(data, at)
            yield tag >> 3, value
            continue
        if tag & 7 == 2:
            size, at = _number(data, at)
        else:
            size = {1: 8, 5: 4}[tag & 7]
        if at + size > len(data):
            raise ValueError
        yield tag >> 3, data[at : at + size]
        at += size


def _number(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        value |= (data[at] & 0x7F) << shift
        at += 1
        if not data[at - 1] & 0x80:
            return value, at
    raise ValueError


def _begins(bos: str | None, vocab: Mapping[str, int]) -> dict[str, Any] | None:
    """The post-processor that puts the begin token before every text."""
    if bos is None:
        return None

    def part(letter: str, kind: int) -> list[dict[str, Any]]:
        return [{"SpecialToken": {"id": bos, "type_id": kind}}, {"Sequence": {"id": letter, "type_id": kind}}]

    return {
        "type": "TemplateProcessing",
        "single": part("A", 0),
        "pair": part("A", 0) + part("B", 1),
        "special_tokens": {bos: {"id": bos, "ids": [vocab[bos]], "tokens": [bos]}},
    }
