"""Results on disk: directories, JSON and text, each file whole or not at all; of several processes the first writes."""

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models import processes
from models.errors import UserError


def make_directory(directory: str | Path) -> Path:
    """The directory for results, made where it does not exist.

    Raises:
      UserError: it cannot be made.
    """
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise UserError(f"cannot write results to {directory}: {error.strerror}") from None
    return directory


def write_json(content: Mapping[str, Any], path: Path) -> None:
    """Writes JSON, whole or not at all; raises as `write_text` does."""
    write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", path)


def write_text(text: str, path: Path) -> None:
    """Writes a file as UTF-8, whole or not at all; raises as `write_bytes` does."""
    # Names of files in it need not be UTF-8.
    write_bytes(text.encode("utf-8", errors="backslashreplace"), path)


def write_bytes(content: bytes, path: Path) -> None:
    """Writes a file, whole or not at all.

    Raises:
      UserError: the path is a directory, or lies where nothing can be written.
    """
    if not processes.is_first():
        return
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    except (IsADirectoryError, NotADirectoryError, FileNotFoundError, PermissionError) as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
