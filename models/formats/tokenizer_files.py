"""The files of a tokenizer directory: which of them say what, and what holds where several speak of one thing.

Tokens come from `tokenizer.json` or, where there is none, from SentencePiece's `tokenizer.model`. Tokens that other
files add to them and the names of special tokens are taken as transformers takes them; where two files contradict each
other about an id, the directory is refused.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from models.errors import UserError
from models.formats.sentencepiece import read_sentencepiece
from models.formats.text_files import parse_json, read_json, read_text, refuse_dangling, refuse_pointer

_OURS = _DEFINITION, _SENTENCEPIECE = "tokenizer.json", "tokenizer.model"
_BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")
# What holds a tokenizer in a form that is not read here.
_OTHERS = ("vocab.json", "vocab.txt", "tekken.json", "tiktoken.model", "spiece.model", "tokenizer.bin")


def holds_tokenizer(directory: str | Path) -> bool:
    """Whether a directory has a file that a tokenizer can be read from, be it a link that leads nowhere."""
    return any((Path(directory) / name).is_file() or (Path(directory) / name).is_symlink() for name in _OURS)


def read_tokenizer(directory: Path) -> tuple[tokenizers.Tokenizer, dict[str, Any], str]:
    """The tokenizer, the contents of `tokenizer_config.json` (chat template included) and the text of a definition.

    Raises:
      UserError: there is none, a file cannot be read, or two of them contradict each other.
    """
    path = directory / _DEFINITION
    for name in (*_OURS, *_BESIDE):
        refuse_dangling(directory / name)
    config = _read_config(directory)
    if path.is_file():
        definition = read_text(path)
        core = _parsed(definition, path)
        _check_ids(core, definition, path)
    elif (path := directory / _SENTENCEPIECE).is_file():
        refuse_pointer(path)
        core, defaults = read_sentencepiece(path, config)
        config = {**defaults, **config}
        definition = core.to_str()
    else:
        others = [name for name in _OTHERS if (directory / name).exists()]
        hint = f"; {others[0]} is not read here, save the tokenizer with transformers first" if others else ""
        raise UserError(
            f"no tokenizer in {directory}: expected the file {_DEFINITION} or {_SENTENCEPIECE} of a Hugging Face "
            f"directory{hint}"
        )
    if _add_outside(core, directory, config):
        definition = core.to_str()
    return core, config, definition


def token_text(token: Any) -> str | None:
    """The text of a token that a config names, a string or `{'content': ...}`; None for anything else."""
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) else None


def _read_config(directory: Path) -> dict[str, Any]:
    path, special = directory / "tokenizer_config.json", directory / "special_tokens_map.json"
    config = read_json(path) if path.is_file() else {}
    # The older file holds only where the newer does not list the added tokens itself.
    if "added_tokens_decoder" not in config and special.is_file():
        config |= read_json(special)
    for key in NAMED_TOKENS:
        if config.get(key) is not None and token_text(config[key]) is None:
            raise UserError(f"{path}: {key} must be a text or an object with 'content', got {_short(config[key])}")
    template = directory / "chat_template.jinja"
    if template.is_file():
        config["chat_template"] = read_text(template)
    _check_template(config.get("chat_template"), path)
    return config


def _check_template(template: Any, path: Path) -> None:
    if template is None:
        return
    named = template if isinstance(template, list) else [{"name": "default", "template": template}]
    for entry in named:
        if not isinstance(entry, Mapping) or not all(isinstance(entry.get(key), str) for key in ("name", "template")):
            raise UserError(f"{path}: chat_template must be a text or a list of named ones, got {_short(template)}")


def _parsed(definition: str, path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(definition)
    except BaseException as error:  # The library raises bare Exceptions, and panics, which are none.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{path} is not a tokenizer definition ({error})") from error


def _check_ids(core: tokenizers.Tokenizer, definition: str, path: Path) -> None:
    """The library numbers added tokens itself; what the file says must be what it did."""
    for entry in parse_json(definition, str(path)).get("added_tokens") or []:
        found = core.token_to_id(entry["content"])
        if found != entry["id"]:
            raise UserError(
                f"{path} gives the added token {entry['content']!r} the id {entry['id']}, but by its vocabulary it has "
                f"the id {found}"
            )


def _add_outside(core: tokenizers.Tokenizer, directory: Path, config: Mapping[str, Any]) -> bool:
    """Adds the tokens that stand in other files than the tokenizer's own; returns whether there were any."""
    # As text: it holds the flags, which decide where a token is found.
    known = {index: repr(token) for index, token in core.get_added_tokens_decoder().items()}
    wanted = _outside(directory, config)
    new = False
    for index, (token, where) in sorted(wanted.items()):
        if known.get(index) == repr(token):
            continue
        here, there = core.token_to_id(token.content), core.id_to_token(index)
        if here not in (None, index) or there not in (None, token.content):
            held = f"the id {here}" if here is not None else f"{there!r} under that id"
            raise UserError(f"{where} gives {token.content!r} the id {index}, but the tokenizer has {held}")
        core.add_tokens([token])
        if core.token_to_id(token.content) != index:
            raise UserError(
                f"{where} gives {token.content!r} the id {index}, but the next free id is "
                f"{core.token_to_id(token.content)}"
            )
        new = True
    added = {token.content for token in core.get_added_tokens_decoder().values()}
    for text in _named(config):
        # `Tokenizer` refuses a begin or end token without an id: no model could have learnt it.
        unknown = core.token_to_id(text) is None and text in (token_text(config.get(key)) for key in NAMED_TOKENS[:2])
        if text not in added and not unknown:
            core.add_tokens([tokenizers.AddedToken(text, special=True, normalized=False)])
            new = True
    return new


def _outside(directory: Path, config: Mapping[str, Any]) -> dict[int, tuple[tokenizers.AddedToken, str]]:
    """Tokens by id, with the file that names them, from `tokenizer_config.json` and `added_tokens.json`."""
    path, older = directory / "tokenizer_config.json", directory / "added_tokens.json"
    tokens = {}
    decoder = config.get("added_tokens_decoder")
    if decoder is not None:
        if not isinstance(decoder, Mapping):
            raise UserError(f"{path}: added_tokens_decoder must be an object, got {_short(decoder)}")
        for index, entry in decoder.items():
            flags = {key: entry[key] for key in _FLAGS if key in entry} if isinstance(entry, Mapping) else {}
            text = token_text(entry)
            if not index.isdecimal() or not text:
                raise UserError(f"{path}: added_tokens_decoder maps ids to tokens, got {_short({index: entry})}")
            if not all(isinstance(flag, bool) for flag in flags.values()):
                raise UserError(f"{path}: the flags of the added token {text!r} must be true or false")
            tokens[int(index)] = (tokenizers.AddedToken(text, **flags), str(path))
    if not older.is_file():
        return tokens
    special = set(_named(config))
    named = {token.content: index for index, (token, _) in tokens.items()}
    for text, index in read_json(older).items():
        if type(index) is not int or index < 0 or not text:
            raise UserError(f"{older} maps tokens to ids, got {_short({text: index})}")
        if decoder is None:
            is_special = text in special
            tokens[index] = (tokenizers.AddedToken(text, normalized=not is_special, special=is_special), str(older))
        elif named.get(text, index) != index or (index in tokens and tokens[index][0].content != text):
            raise UserError(f"{older} gives {text!r} the id {index}, which {path} does not")
    return tokens


def _named(config: Mapping[str, Any]) -> Iterator[str]:
    """Texts of the special tokens that a config names, in the order in which transformers adds them."""
    for key in NAMED_TOKENS:
        yield from filter(None, [token_text(config.get(key))])
    more = config.get("extra_special_tokens") or config.get("additional_special_tokens") or ()
    for token in more.values() if isinstance(more, Mapping) else more if isinstance(more, list) else ():
        yield from filter(None, [token_text(token)])


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
