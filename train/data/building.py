"""What all data sets are made with: a directory that appears whole or not at all, and a fixed rule of holding out."""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from models.errors import UserError
from models.formats.text_files import refuse_name


def name_rank(name: str) -> int:
    """A number below 2^64 that hangs on a name alone; what ranks lowest is held out."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def check_out(out: Path, overwrite: bool) -> None:
    """Raises `UserError` if `out` holds something that must not be lost, or cannot be written to by its name."""
    refuse_name(out)
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / "manifest.json").is_file():
        raise UserError(f"{out} exists and is no data set: expected a new directory or one to replace")
    if not overwrite:
        raise UserError(f"{out} already holds a data set: give another directory, or --overwrite to replace it")


@contextlib.contextmanager
def new_dataset(out: str | Path, overwrite: bool) -> Iterator[Path]:
    """An empty directory that takes the name `out` when the `with` block ends well, and vanishes otherwise.

    Raises:
      UserError: `out` holds something that must not be lost, or no directory can be made there.
    """
    out = Path(out)
    check_out(out, overwrite)
    temporary = out.absolute().with_name(f".{out.absolute().name}.{os.getpid()}.partial")
    try:
        _make_directory(temporary)
        yield temporary
        _put_in_place(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot make a directory in {path.parent} ({error.strerror})") from error


def _put_in_place(temporary: Path, out: Path) -> None:
    """Renames; a data set that was there is moved aside first and removed once the new one stands."""
    old = temporary.with_suffix(".old")
    if out.exists():
        os.replace(out, old)
    try:
        os.replace(temporary, out)
    except OSError:
        if old.exists():
            os.replace(old, out)
        raise
    shutil.rmtree(old, ignore_errors=True)
