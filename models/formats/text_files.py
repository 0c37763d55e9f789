"""Text and JSON from files, as people have them: byte order marks, gzip, Git LFS pointers, damage.

Everything that a person hands over as text is opened here, so that every reader takes and refuses the same files.
"""

import contextlib
import gzip
import io
import itertools
import json
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from models.errors import UserError

POINTER = "is a Git LFS pointer, not the file itself: fetch it with git lfs pull"
_LFS_POINTER = b"version https://git-lfs"
_GZIP = b"\x1f\x8b"
# What people store texts in that is not read here, by how it begins.
_OTHERS = {
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
    b"PAR1": "Parquet",
    b"ARROW1": "Arrow",
    b"Obj\x01": "Avro",
}
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")
_SPACE = re.compile(r"[ \t\n\r]*")
_HALF = re.compile(r"[\ud800-\udfff]")


def is_pointer(start: bytes) -> bool:
    """Whether a file that begins so is a Git LFS pointer."""
    return start.startswith(_LFS_POINTER)


def refuse_dangling(path: Path) -> None:
    """Raises `UserError` where `path` is a link whose end is gone, as in a cache of downloads that was cleared."""
    if path.is_symlink() and not path.exists():
        raise UserError(f"{path} is a link to {shown(os.readlink(path))}, which is not there")


def refuse_pointer(path: Path) -> None:
    """Raises `UserError` where `path` is a Git LFS pointer, which stands for a file that was never fetched."""
    with path.open("rb") as file:
        if is_pointer(file.read(len(_LFS_POINTER))):
            raise UserError(f"{path} {POINTER}")


@contextlib.contextmanager
def text_lines(path: Path) -> Iterator[Iterator[str]]:
    """The lines of a text file, plain or gzipped, with `\\n` at their ends; a byte order mark is no part of them.

    Raises:
      UserError: the file is no text (the message says what it is), is damaged, or holds a line that is not UTF-8.
    """
    with path.open("rb") as raw:
        start = raw.peek(len(_LFS_POINTER))  # Not read: what is opened may be a pipe.
        if is_pointer(start):
            raise UserError(f"{path} {POINTER}")
        if start and path.suffix == ".gz" and not start.startswith(_GZIP):
            raise UserError(f"{path} is not a gzip file: it begins with {start[:8]!r}")
        if kind := next((kind for magic, kind in _OTHERS.items() if start.startswith(magic)), None):
            raise UserError(f"{path} is a {kind} file, which is not read here: expected text, plain or gzipped")
        if start.startswith(_UTF_16):
            raise UserError(f"{path} is not UTF-8 text: it is UTF-16, as its byte order mark says")
        try:
            with contextlib.ExitStack() as stack:
                data = stack.enter_context(gzip.GzipFile(fileobj=raw)) if start.startswith(_GZIP) else raw
                # Escaped rather than strict: a strict decoder knows its buffer, not the line.
                text = stack.enter_context(io.TextIOWrapper(data, "utf-8-sig", errors="surrogateescape"))
                yield _checked_lines(text, path)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"{path} is damaged or cut short: {error}") from None


def read_text(path: str | Path) -> str:
    """A whole text file; see `text_lines`."""
    path = Path(path)
    with _named(path), text_lines(path) as lines:
        return "".join(lines)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
      UserError: there is no such file, it cannot be read, or it does not hold a JSON object.
    """
    content = parse_json(read_text(path), str(path))
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def parse_json(text: str, where: str) -> Any:
    """The JSON value that `text` holds; `where` names it in messages.

    Raises:
      UserError: it is no JSON, or is nested too deeply to be read.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise UserError(f"{where} is nested too deeply to be read as JSON") from None
    except ValueError as error:
        raise UserError(f"{where} is not valid JSON: {error}") from None


def json_items(text: str, where: str) -> Iterator[tuple[int, Any]]:
    """The items of a JSON array, one by one, each with the number of the line that it begins in.

    Raises:
      UserError: it is no JSON array; the items before the damage have been given.
    """
    decoder = json.JSONDecoder()
    at = _SPACE.match(text).end() + 1  # type: ignore[union-attr]  # Behind the bracket.
    line, counted = 1, 0
    for number in itertools.count(1):
        at = _SPACE.match(text, at).end()  # type: ignore[union-attr]
        if number == 1 and text[at : at + 1] == "]":
            break
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, at = decoder.raw_decode(text, at)
        except RecursionError:
            raise UserError(f"{where}, line {line}: nested too deeply to be read as JSON") from None
        except ValueError as error:
            raise UserError(f"{where}, line {line}: item {number} is not valid JSON ({error})") from None
        yield line, value
        at = _SPACE.match(text, at).end()  # type: ignore[union-attr]
        if text[at : at + 1] != ",":
            break
        at += 1
    if text[at:].rstrip() != "]":
        raise UserError(f"{where}, line {line}: expected a comma or the end of the file's list behind item {number}")


def half_character(text: str) -> int | None:
    """Where `text` has half of a surrogate pair, which is no character; or None."""
    if text.isascii():
        return None
    found = _HALF.search(text)
    return found and found.start()


def shown(name: str) -> str:
    """A name that may not be UTF-8, as Linux allows, with those of its bytes that are none as `\\xNN`."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def refuse_name(path: str | Path) -> None:
    """Raises `UserError` for a place whose name is not UTF-8: several libraries that write files cannot go there."""
    name = str(Path(path).absolute())
    if half_character(name) is not None:
        raise UserError(f"{shown(name)} is no name that is UTF-8: give one that is")


def _checked_lines(text: io.TextIOWrapper, path: Path) -> Iterator[str]:
    for number, line in enumerate(text, 1):
        at = half_character(line)
        if at is not None:
            byte = ord(line[at]) & 0xFF
            raise UserError(f"{path} is not UTF-8 text: line {number} has the byte 0x{byte:02x} at character {at}")
        if "\0" in line:
            raise UserError(f"{path} is not UTF-8 text: line {number} has the byte 0x00, as archives and UTF-16 have")
        yield line


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """What an operating system may say about a path, as one sentence."""
    try:
        yield
    except FileNotFoundError:
        refuse_dangling(path)
        missing = "" if path.parent.exists() else ", which does not exist"
        raise UserError(f"there is no {path.name} in {path.parent}{missing}") from None
    except NotADirectoryError:
        raise UserError(f"{path.parent} is not a directory") from None
    except (IsADirectoryError, PermissionError) as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
