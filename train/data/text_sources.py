"""Where texts come from: JSONL, text files, folders of source and conversations, and which of them are held out.

Documents are read anew at every pass, so that none need lie in memory. Which are held out depends on their names alone:
it stays the same when documents are added. What is not used is among them and says why, so that it can be counted.
"""

import contextlib
import dataclasses
import fnmatch
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from models.errors import UserError
from models.formats.chat_template import Message
from models.formats.text_files import is_pointer, json_items, parse_json, refuse_dangling, shown, text_lines
from train.data import folders
from train.data.building import name_rank
from train.data.chats import LISTS, check_characters, conversation, may_hold_halves, other_fields

END_OF_TEXT = "<|endoftext|>"
BLANK_LINE = "blank-line"


@dataclasses.dataclass(frozen=True)
class RawDocument:
    """A document before tokenisation: a text, or a conversation.

    Attributes:
      name: where it came from, unique in its data set.
      text: the text, where it is no conversation.
      messages: `{'role', 'content'}` turns of a conversation, perhaps with more.
      tools: what its assistant may call.
      unused: fields of its row that say nothing to the model.
      where: file and line, for messages; `name` where that says it.
      refused: why it cannot be used, in a sentence that names its place; then it has neither text nor messages.
      left_out: why it is not wanted, in words that follow a number ("hidden files"); likewise.
    """

    name: str
    text: str = ""
    messages: tuple[Message, ...] = ()
    tools: tuple[Any, ...] = ()
    unused: tuple[str, ...] = ()
    where: str = ""
    refused: str = ""
    left_out: str = ""

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
    """One document per line of a (gzipped) JSONL file, or per item of a JSON array: its string `fields`, on lines.

    Reading raises `UserError`, with the line's number, for bad JSON and for a missing field.
    """

    def read() -> Iterator[RawDocument]:
        for name, where, row in records(path):
            row = fields_of(row, where)
            for field in fields:
                if not isinstance(row.get(field), str):
                    other = (
                        f"it is {'null' if row[field] is None else type(row[field]).__name__}" if field in row else ""
                    )
                    held = other or f"the line holds {', '.join(row) or 'nothing'}"
                    raise UserError(f"{where}: expected a string field {field!r}; {held}")
            yield RawDocument(name, "\n".join(row[field] for field in fields))

    return DocumentList(read)


def read_chat(path: str | Path) -> DocumentList:
    """One conversation per line of a (gzipped) JSONL file, or per item of a JSON array; see `train/data/chats.py`.

    A row that is no conversation becomes a document that says why it is refused.
    """

    def document(name: str, where: str, row: Any) -> RawDocument:
        try:
            row = fields_of(row, where)
        except UserError as error:
            return RawDocument(name, refused=str(error))
        try:
            messages, tools = conversation(row)
        except (UserError, RecursionError) as error:
            return RawDocument(name, refused=f"{where}: {error}")
        return RawDocument(name, messages=messages, tools=tools, unused=tuple(other_fields(row)), where=where)

    return DocumentList(lambda: (document(*record) for record in records(path)))


def read_prompts(path: str | Path) -> DocumentList:
    """One prompt per line of a (gzipped) JSONL file, or per item of a JSON array.

    A row is `{'prompt': text}`, or a conversation (`train/data/chats.py`) up to a user's turn; either may have a
    `system`. Reading raises `UserError`, with the line's number, for any other form.
    """

    def document(name: str, where: str, row: Any) -> RawDocument:
        fields = fields_of(row, where)
        text, lists = fields.get("prompt"), any(fields.get(key) is not None for key in LISTS)
        if isinstance(text, str) and not lists:
            fields = {**fields, "messages": [{"role": "user", "content": text}]}
        elif text is not None or not lists:
            raise UserError(f"{where}: expected a string 'prompt', or 'messages' that end with a user's turn")
        try:
            messages, tools = conversation(fields)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        if tools:
            raise UserError(f"{where}: the row offers tools, which prompts cannot have here")
        if messages[-1]["role"] != "user" or not messages[-1]["content"].strip():
            raise UserError(f"{where}: the last turn must be a user's, and say something")
        return RawDocument(name, messages=messages, where=where)

    return DocumentList(lambda: (document(*record) for record in records(path)))


def read_text(path: str | Path, separator: str = END_OF_TEXT) -> DocumentList:
    """The documents of one (gzipped) text file, which `separator` parts; `blank-line` parts at empty lines.

    Raises:
      UserError: the separator is empty.
    """
    if not separator:
        raise UserError(f"the separator of documents must not be empty; {BLANK_LINE!r} parts them at empty lines")

    def read() -> Iterator[RawDocument]:
        with _opened(Path(path)) as lines:
            text = "".join(lines)
        pieces = re.split(r"\n\s*\n", text) if separator == BLANK_LINE else text.split(separator)
        for number, piece in enumerate(pieces, 1):
            yield RawDocument(f"{shown(Path(path).name)}:{number}", piece.strip("\n"))

    return DocumentList(read)


def read_source(folder: str | Path, glob: str = "**/*", exclude: Sequence[str] = ()) -> DocumentList:
    """One document per file of a folder, in the order of their relative paths, which are their names.

    Links are followed. Files that are hidden (unless `glob` names a hidden part), not UTF-8, Git LFS pointers or
    repetitions of an earlier file become documents that say why they are left out.

    Args:
      folder: where to look.
      glob: which files, relative to `folder`.
      exclude: patterns; a file is left out when one matches its relative path or any single part of it.

    Raises:
      UserError: no such folder, or a pattern that leads out of it.
    """
    folder, pattern = Path(folder), folders.Glob(glob)
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: expected a folder of source files")

    def excluded(path: Path) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in exclude for name in (path.as_posix(), *path.parts))

    def read() -> Iterator[RawDocument]:
        seen: set[bytes] = set()
        for found in folders.files(folder):
            name = shown(found.path.as_posix())
            if not found.left_out and not pattern.matches(found.path):
                continue
            if excluded(found.path):
                yield RawDocument(name, left_out="excluded files")
            elif folders.is_hidden(found.path) and not pattern.names_hidden():
                yield RawDocument(name, left_out="hidden files")
            elif found.left_out:
                yield RawDocument(name, left_out=found.left_out)
            else:
                yield _source_file(folder / found.path, name, seen)

    return DocumentList(read)


def _source_file(path: Path, name: str, seen: set[bytes]) -> RawDocument:
    content = path.read_bytes()
    digest = hashlib.sha256(content).digest()
    if digest in seen:
        return RawDocument(name, left_out="repetitions of an earlier file")
    seen.add(digest)
    if is_pointer(content):
        return RawDocument(name, left_out="Git LFS pointers, which stand for files that were not fetched")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    return RawDocument(name, left_out="files that are not UTF-8 text") if "\0" in text else RawDocument(name, text)


def limited(documents: Iterable[RawDocument], max_documents: int | None) -> Iterable[RawDocument]:
    """The first `max_documents` documents that are not refused or left out, or all of them."""
    if max_documents is None:
        return documents
    if max_documents < 1:
        raise UserError(f"max_documents must be at least 1, got {max_documents}")

    def read() -> Iterator[RawDocument]:
        count = 0
        for document in documents:
            yield document
            count += not document.refused and not document.left_out
            if count == max_documents:
                break

    return DocumentList(read)


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


def records(path: str | Path) -> Iterator[tuple[str, str, Any]]:
    """The rows of a (gzipped) JSONL file, or of one that holds a JSON array.

    Yields:
      Name and place of each row, and the row, or the `UserError` that a single line is refused with.

    Raises:
      UserError: there is no such file, or it is damaged.
    """
    path = Path(path)
    with _opened(path) as lines:
        for number, line in enumerate(lines, 1):
            if number == 1 and line.lstrip().startswith("["):
                yield from _items(path, "".join([line, *lines]))
            elif line.strip():
                where = f"{path}, line {number}"
                yield f"{shown(path.name)}:{number}", where, _row(line, where)


def _row(line: str, where: str) -> Any:
    try:
        row = parse_json(line, where)
    except UserError as error:
        return error
    return _whole(row, where) if may_hold_halves(line) else row


def _whole(row: Any, where: str) -> Any:
    try:
        check_characters(row)
    except UserError as error:
        return UserError(f"{where}: {error}")
    return row


def _items(path: Path, text: str) -> Iterator[tuple[str, str, Any]]:
    halves = may_hold_halves(text)
    for number, (line, row) in enumerate(json_items(text, str(path)), 1):
        where = f"{path}, item {number} (line {line})"
        yield f"{shown(path.name)}:{number}", where, _whole(row, where) if halves else row


def fields_of(row: Any, where: str) -> dict[str, Any]:
    """A row of `records`, once it is known to be an object. Raises UserError otherwise."""
    if isinstance(row, UserError):
        raise row
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a JSON object, got {type(row).__name__}")
    return row


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Iterator[str]]:
    if not path.is_file():
        refuse_dangling(path)
        other = ", which is a folder" if path.is_dir() else ""
        raise UserError(f"no file {path}{other}: expected the file with the documents")
    with text_lines(path) as lines:
        yield lines
