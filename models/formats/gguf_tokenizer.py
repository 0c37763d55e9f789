"""The tokenizer of a GGUF file, from its metadata: byte-level BPE (`gpt2`) or SentencePiece BPE (`llama`)."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing

from models.errors import UserError
from models.formats.gguf_metadata import Metadata
from models.formats.sentencepiece import merges
from models.formats.tokenizer import Tokenizer

_UNKNOWN, CONTROL, _USER_DEFINED = 2, 3, 4  # llama.cpp's token types, as far as they matter here.
_SPACE = "\u2581"
PREFIX, _TEMPLATE = "tokenizer.ggml.", "tokenizer.chat_template"

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), behavior="isolated"), whole])


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


# tokenizer.ggml.pre -> how a text is cut before the merges.
PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "gpt-2": _gpt2,
    "smollm": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()]),
    "llama-bpe": lambda: _split(_LLAMA3),
    "qwen2": lambda: _split(_QWEN2),
}


def read_gguf_tokenizer(metadata: Mapping[str, Any], path: Path) -> Tokenizer:
    """The tokenizer that a file's metadata describe.

    Args:
      metadata: keys and values of the file.
      path: the file, for messages.

    Raises:
      UserError: there is none, it is of a kind or has a pre-tokenizer that is not supported, or it contradicts itself.
    """
    told = Metadata(path, metadata)
    kind, pieces = told.text(f"{PREFIX}model"), told.list_of(str, f"{PREFIX}tokens")
    if kind not in ("gpt2", "llama"):
        told.refuse(f"the tokenizer model {kind!r} is not supported, only gpt2 and llama")
    types = told.list_of(int, f"{PREFIX}token_type", [1] * len(pieces))
    if len(types) != len(pieces):
        told.refuse(f"it has {len(pieces)} tokens but {len(types)} {PREFIX}token_type")
    # SentencePiece's runs of spaces are written with plain spaces where they are defined by the user.
    spelled = [_SPACE * len(piece) if kind == "llama" and piece and not piece.strip(" ") else piece for piece in pieces]
    if len(set(spelled)) < len(spelled):
        twice = next(piece for i, piece in enumerate(spelled) if piece in spelled[:i])
        told.refuse(f"the token {twice!r} occurs twice")
    config = _settings(told, spelled)
    core = _byte_level(told, spelled) if kind == "gpt2" else _sentence_piece(told, spelled, types)
    for i, piece in enumerate(spelled):
        if types[i] in (_UNKNOWN, CONTROL):
            core.add_special_tokens([AddedToken(piece, normalized=False, special=True)])
        elif types[i] == _USER_DEFINED and piece == pieces[i]:
            core.add_tokens([AddedToken(piece, normalized=False, special=False)])
    begins = kind == "llama" or metadata.get(f"{PREFIX}pre") == "llama-bpe"
    config["add_bos_token"] = told.flag(f"{PREFIX}add_bos_token", begins) and "bos_token" in config
    if config["add_bos_token"]:
        # Other readers of the directory begin a text as ours does.
        bos = config["bos_token"]
        core.post_processor = TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, spelled.index(bos))]
        )
    return Tokenizer(core, config)


def _settings(told: Metadata, pieces: list[str]) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        if (index := told.token_id(key, len(pieces))) is not None:
            settings[f"{name}_token"] = pieces[index]
    if _TEMPLATE in told.metadata:
        settings["chat_template"] = told.text(_TEMPLATE)
    return settings


def _byte_level(told: Metadata, pieces: list[str]) -> tokenizers.Tokenizer:
    pre = told.text(f"{PREFIX}pre")
    if pre not in PRE_TOKENIZERS:
        told.refuse(f"the pre-tokenizer {pre!r} is not supported, only {', '.join(PRE_TOKENIZERS)}")
    pairs = [tuple(merge.split(" ")) for merge in told.list_of(str, f"{PREFIX}merges", [])]
    try:
        # Llama 3 takes a word that is a token as it is, whatever its merges make of it.
        model = BPE({piece: i for i, piece in enumerate(pieces)}, pairs, ignore_merges=pre == "llama-bpe")
    except Exception as error:  # The library raises bare Exceptions.
        raise UserError(f"{told.path}: {PREFIX}merges do not fit its tokens ({error})") from None
    core = tokenizers.Tokenizer(model)
    if pre == "qwen2":
        core.normalizer = normalizers.NFC()
    core.pre_tokenizer = PRE_TOKENIZERS[pre]()
    core.decoder = decoders.ByteLevel()
    return core


def _sentence_piece(told: Metadata, pieces: list[str], types: list[int]) -> tokenizers.Tokenizer:
    scores = told.list_of(float, f"{PREFIX}scores")
    if len(scores) != len(pieces) or not all(map(math.isfinite, scores)):
        told.refuse(f"{PREFIX}scores must have one finite number for each of its {len(pieces)} tokens")
    unknown = told.token_id("unknown", len(pieces)) or 0
    # SentencePiece takes what its user defined before it merges anything; specials never come from merges.
    best = max(scores, default=0.0) + 1
    ranks = [best if kind == _USER_DEFINED else score for kind, score in zip(types, scores, strict=True)]
    specials = {piece for piece, kind in zip(pieces, types, strict=True) if kind in (_UNKNOWN, CONTROL)}
    definition: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "model": {
            "type": "BPE",
            "unk_token": pieces[unknown] if pieces else None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "merges": [pair for pair in merges(pieces, ranks) if "".join(pair) not in specials],
        },
    }
    core = tokenizers.Tokenizer.from_str(json.dumps(definition))
    prefix = told.flag(f"{PREFIX}add_space_prefix", True)
    to_marks, to_spaces = normalizers.Replace(" ", _SPACE), decoders.Replace(_SPACE, " ")
    core.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), to_marks] if prefix else [to_marks])
    steps = [to_spaces, decoders.ByteFallback(), decoders.Fuse()]
    core.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return core
