"""The files under a folder: links followed once, hidden ones left out, and whatever is left out told.

A folder that two paths lead to is read at one of them, so that links in a circle end.
"""

import dataclasses
import fnmatch
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from models.errors import UserError


@dataclasses.dataclass(frozen=True)
class Found:
    """A path under a folder.

    Attributes:
      path: relative to the folder.
      left_out: why it is no input, in the plural ("hidden files and folders"); empty for a file to read.
    """

    path: Path
    left_out: str = ""


def files(folder: Path) -> list[Found]:
    """Every file under `folder`, hidden ones too, and what is left out, in the order of their paths.

    Raises:
      OSError: a folder cannot be read.
    """
    found: list[Found] = []
    seen: set[tuple[int, int]] = set()
    linked = list(_walk(folder, folder, seen, found))
    while linked:  # Folders proper come first: a linked one is read under its own name where it has one here.
        linked = [more for path in linked for more in _walk(folder, path, seen, found)]
    return sorted(found, key=lambda one: one.path)


def _walk(root: Path, start: Path, seen: set[tuple[int, int]], found: list[Found]) -> Iterator[Path]:
    """Adds what is under `start` to `found`; yields the linked folders, into which it does not go."""
    rest = [start]
    while rest:
        place = rest.pop()
        status = place.stat()
        if (status.st_dev, status.st_ino) in seen:
            found.append(Found(place.relative_to(root), "links to folders that are read already"))
            continue
        seen.add((status.st_dev, status.st_ino))
        for entry in sorted(os.scandir(place), key=lambda entry: entry.name):
            path = Path(entry.path)
            # os.path's questions, unlike the entry's, have an answer for every link.
            if os.path.isdir(path):
                if entry.is_symlink():
                    yield path
                else:
                    rest.append(path)
            elif os.path.isfile(path):
                found.append(Found(path.relative_to(root)))
            else:
                kind = "links that lead nowhere" if entry.is_symlink() else "things that are no files"
                found.append(Found(path.relative_to(root), kind))


class Glob:
    """A pattern of relative paths, as pathlib has them: `**` is any number of folders, case counts."""

    def __init__(self, pattern: str):
        """Raises `UserError` for a pattern that is empty, absolute or leads out of the folder."""
        parts = Path(pattern).parts
        if not parts or Path(pattern).is_absolute() or ".." in parts:
            raise UserError(f"the pattern of files must be relative to their folder, such as **/*.py, got {pattern!r}")
        # A run of `**` says no more than one of them.
        self._parts = tuple(part for i, part in enumerate(parts) if part != "**" or i == 0 or parts[i - 1] != "**")

    def matches(self, path: Path) -> bool:
        """Whether the whole of a relative path fits."""
        return _fits(path.parts, self._parts)

    def names_hidden(self) -> bool:
        """Whether the pattern itself asks for hidden files or folders."""
        return any(part.startswith(".") for part in self._parts)


def is_hidden(path: Path) -> bool:
    """Whether any part of a relative path begins with a dot."""
    return any(part.startswith(".") for part in path.parts)


def _fits(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_fits(parts[skip:], pattern[1:]) for skip in range(len(parts) + 1)) or len(pattern) == 1
    return bool(parts) and fnmatch.fnmatchcase(parts[0], pattern[0]) and _fits(parts[1:], pattern[1:])
