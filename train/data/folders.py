"""What lies below a folder: links followed, nothing read twice, what is left out counted."""

import collections
import os
from collections.abc import Iterable
from pathlib import Path

HIDDEN = "hidden"
DANGLING = "links that lead nowhere"
REPEATED = "links to folders that are read already"
SPECIAL = "neither files nor folders"
FOLDER, FILE = "folder", "file"


def files_below(folder: Path, left_out: collections.Counter[str], read: Iterable[Path] = ()) -> list[Path]:
    """The files of a folder, at whatever depth, as sorted relative paths.

    Links are followed, after everything that really lies in the folder; a folder that is reached again, by a link that
    leads back for instance, is left out, and so is what is hidden (its name begins with a dot).

    Args:
      folder: where to look.
      left_out: counts, under the names above, what was left out.
      read: folders that count as read before.
    """
    seen = {_identity(path) for path in read}
    found: list[Path] = []
    folders, links = [Path()], collections.deque[Path]()
    while folders or links:
        below = folders.pop() if folders else links.popleft()
        identity = _identity(folder / below)
        if identity in seen:
            left_out[REPEATED] += 1
            continue
        seen.add(identity)
        for entry in sorted(os.scandir(folder / below), key=lambda entry: entry.name):
            kind = kind_of(entry)
            if kind == FOLDER:
                (links if entry.is_symlink() else folders).append(below / entry.name)
            elif kind == FILE:
                found.append(below / entry.name)
            else:
                left_out[kind] += 1
    return sorted(found)


def printable(name: str | Path) -> str:
    """A path as text that can be stored and shown: bytes that are no UTF-8 as `\\xNN`, control characters escaped."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def kind_of(entry: os.DirEntry[str]) -> str:
    """`FOLDER` or `FILE`, links followed, or the reason why it is left out."""
    if entry.name.startswith("."):
        return HIDDEN
    try:
        if entry.is_dir():
            return FOLDER
        if entry.is_file():
            return FILE
    except OSError:  # A link that leads to itself.
        return DANGLING
    return DANGLING if entry.is_symlink() else SPECIAL


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino
