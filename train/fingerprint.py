"""What tells one input of a run from another that lies at the same path: a hash of its files.

Small files are read whole. Of large ones, which the weights of a target are, evenly spaced pieces are: another model,
another data set, another version differ everywhere.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path

_PIECES = 64
_PIECE = 1 << 20
_PROSE = (".md", ".txt")  # What is said about an input changes nothing.


def fingerprint(paths: Iterable[Path]) -> str:
    """16 hexadecimal digits for the names and contents of files, in the order of their names.

    A directory stands for the files right in it, without hidden ones and prose.
    """
    digest = hashlib.sha256()
    for path in sorted(_files(paths), key=lambda path: path.name):
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode("utf-8", "surrogateescape"))
        with path.open("rb") as file:
            if size <= _PIECES * _PIECE:
                digest.update(file.read())
                continue
            for piece in range(_PIECES):
                file.seek(piece * (size - _PIECE) // (_PIECES - 1))
                digest.update(file.read(_PIECE))
    return digest.hexdigest()[:16]


def _files(paths: Iterable[Path]) -> Iterable[Path]:
    for path in paths:
        if not path.is_dir():
            yield path
            continue
        for below in path.iterdir():
            if below.is_file() and not below.name.startswith(".") and below.suffix not in _PROSE:
                yield below
