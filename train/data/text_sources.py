"""Where texts come from: JSONL, text files, folders of source and conversations, and which of them are held out.

Documents are read anew at every pass, so that none need lie in memory. Which are held out depends on their names alone:
it stays the same when documents are added.
"""

import contextlib
import dataclasses
import fnmatch
import gzip
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from models.errors import UserError
from models.formats.tokenizer import Message
from train.data.building import name_rank

END_OF_TEXT = "<|endoftext|>"
BLANK_LINE = "blank-line"
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


@dataclasses.dataclass(frozen=True)
class RawDocument:
    """A document before tokenisation: a text, or a conversation.

    Attributes:
      name: where it came from, unique in its data set.
      text: the text, where it is no conversation.
      messages: `{'role', 'content'}` turns of a conversation.
    """

    name: str
    text: str = ""
    messages: tuple[Message, ...] = ()

    @property
    def content(self) -> str:
        """Everything that was said, which is what a tokenizer is trained on."""
        return self.text or "\n".join(message["content"] for message in self.messages)


class DocumentList(Iterable[RawDocument]):
    """Documents that can be read more than once: each pass calls `read` again."""

    def __init__(self, read: Callable[[], Iterable[RawDocument]]):
        self._read = read

    def __iter__(self) -> Iterator[RawDocument]:
        return iter(self._read())


def read_jsonl(path: str | Path, fields: Sequence[str] = ("text",)) -> DocumentList:
    """One document per line of a (gzipped) JSONL file: its string `fields`, joined by newlines.

    Reading raises `UserError`, with the line's number, for bad JSON and for a missing field.
    """

    def document(name: str, where: str, record: dict[str, Any]) -> RawDocument:
        for field in fields:
            if not isinstance(record.get(field), str):
                raise UserError(f"{where}: expected a string field {field!r}; the line holds {', '.join(record)}")
        return RawDocument(name, "\n".join(record[field] for field in fields))

    return DocumentList(lambda: _records(Path(path), document))


def read_chat(path: str | Path) -> DocumentList:
    """One conversation per line of a (gzipped) JSONL file.

    Either `{'messages': [{'role', 'content'}]}` or ShareGPT's `{'conversations': [{'from', 'value'}]}`, whose `human`
    and `gpt` are user and assistant. Reading raises `UserError`, with the line's number, for any other form.
    """

    def document(name: str, where: str, record: dict[str, Any]) -> RawDocument:
        keys = ("messages", "role", "content") if "messages" in record else ("conversations", "from", "value")
        turns = record.get(keys[0])
        if not isinstance(turns, list) or not turns:
            raise UserError(f"{where}: expected a list of turns in 'messages' or 'conversations'")
        messages = []
        for turn in turns:
            role, content = (turn.get(key) if isinstance(turn, dict) else None for key in keys[1:])
            if not isinstance(role, str) or not isinstance(content, str):
                raise UserError(f"{where}: expected every turn to hold the strings {keys[1]!r} and {keys[2]!r}")
            messages.append({"role": _SHAREGPT_ROLES.get(role, role), "content": content})
        return RawDocument(name, messages=tuple(messages))

    return DocumentList(lambda: _records(Path(path), document))


def read_prompts(path: str | Path) -> DocumentList:
    """One prompt per line of a (gzipped) JSONL file: `{'prompt': text}`, or `{'messages': [...]}` up to a user's turn.

    Reading raises `UserError`, with the line's number, for any other form.
    """

    def document(name: str, where: str, record: dict[str, Any]) -> RawDocument:
        turns = record.get("messages", [{"role": "user", "content": record.get("prompt")}])
        right = isinstance(turns, list) and all(
            isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
            for turn in turns
        )
        if not right or not turns or turns[-1]["role"] != "user" or not turns[-1]["content"].strip():
            raise UserError(f"{where}: expected a string 'prompt', or 'messages' that end with a user's turn")
        return RawDocument(name, messages=tuple({key: turn[key] for key in ("role", "content")} for turn in turns))

    return DocumentList(lambda: _records(Path(path), document))


def read_text(path: str | Path, separator: str = END_OF_TEXT) -> DocumentList:
    """The documents of one (gzipped) text file, which `separator` parts; `blank-line` parts at empty lines."""

    def read() -> Iterator[RawDocument]:
        with _opened(Path(path)) as file:
            text = file.read()
        pieces = re.split(r"\n\s*\n", text) if separator == BLANK_LINE else text.split(separator)
        for number, piece in enumerate(pieces, 1):
            yield RawDocument(f"{Path(path).name}:{number}", piece.strip("\n"))

    return DocumentList(read)


def read_source(folder: str | Path, glob: str = "**/*", exclude: Sequence[str] = ()) -> DocumentList:
    """One document per file of a folder, in the order of their relative paths, which are their names.

    Files that are not UTF-8 and repetitions of an earlier file are left out.

    Args:
      folder: where to look.
      glob: which files, relative to `folder`.
      exclude: patterns; a file is left out when one matches its relative path or any single part of it.

    Raises:
      UserError: no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: expected a folder of source files")

    def excluded(path: Path) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in exclude for name in (path.as_posix(), *path.parts))

    def read() -> Iterator[RawDocument]:
        seen: set[bytes] = set()
        paths = sorted(path.relative_to(folder) for path in folder.glob(glob) if path.is_file())
        for path in paths:
            if excluded(path):
                continue
            content = (folder / path).read_bytes()
            digest = hashlib.sha256(content).digest()
            if digest in seen:
                continue
            seen.add(digest)
            with contextlib.suppress(UnicodeDecodeError):
                yield RawDocument(path.as_posix(), content.decode())

    return DocumentList(read)


def limited(documents: Iterable[RawDocument], max_documents: int | None) -> Iterable[RawDocument]:
    """The first `max_documents` documents, or all of them."""
    if max_documents is None:
        return documents
    if max_documents < 1:
        raise UserError(f"max_documents must be at least 1, got {max_documents}")
    return DocumentList(lambda: itertools.islice(documents, max_documents))


def hold_out(
    documents: Iterable[RawDocument], *, fraction: float = 0.0, count: int = 0
) -> dict[str, Iterable[RawDocument]]:
    """Parts documents into `train` and `valid` by a hash of their names.

    Args:
      documents: kept in memory if they can be read only once.
      fraction: share of documents held out, about; 0 or less than 1.
      count: or their exact number.

    Returns:
      `{'train', 'valid'}`, or `{'train'}` alone when nothing is asked to be held out.

    Raises:
      UserError: both are given, one is out of range, or there are not more documents than `count`.
    """
    if fraction and count:
        raise UserError("hold out either a fraction of the documents or a number of them, not both")
    if not 0 <= fraction < 1 or count < 0:
        raise UserError(f"the held-out part must be a fraction in 0..1 or a positive number, got {fraction or count}")
    if not fraction and not count:
        return {"train": documents}
    if iter(documents) is documents:
        documents = list(documents)
    bound = int(fraction * 2**64)
    if count:
        ranks = sorted(name_rank(document.name) for document in documents if document.content.strip())
        if count >= len(ranks):
            raise UserError(f"cannot hold out {count} documents of {len(ranks)}: none would be left to train on")
        bound = ranks[count]
    return {
        "train": DocumentList(lambda: (document for document in documents if name_rank(document.name) >= bound)),
        "valid": DocumentList(lambda: (document for document in documents if name_rank(document.name) < bound)),
    }


def _records(path: Path, document: Callable[[str, str, dict[str, Any]], RawDocument]) -> Iterator[RawDocument]:
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                record = json.loads(line)
            except ValueError as error:
                raise UserError(f"{where}: not valid JSON ({error})") from error
            if not isinstance(record, dict):
                raise UserError(f"{where}: expected a JSON object, got {type(record).__name__}")
            yield document(f"{path.name}:{number}", where, record)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    if not path.is_file():
        raise UserError(f"no file {path}: expected the file with the documents")
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            yield file
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text") from error
    except gzip.BadGzipFile as error:
        raise UserError(f"{path} is not a gzip file ({error})") from error
