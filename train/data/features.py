"""Arrays kept on disk beside the packed rows of a split, written once and read by any number of jobs.

A directory holds `manifest.json` and array_record files. Record i belongs to row i of `PackedRows`: the bytes of the
row's arrays, one after the other in the order of the manifest, so that every record has one size, known before anything
is written. Nothing is compressed, because features hardly can be.

What an interrupted job has finished stays in a hidden sibling, from which the next one goes on; the directory appears
under its name when it is whole.
"""

import contextlib
import dataclasses
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from models.errors import UserError
from models.formats.storage import write_json
from models.formats.text_files import read_json, refuse_name
from train.provenance import locked

if TYPE_CHECKING:  # Training steps are timed where TFDS is not installed.
    from train.data.texts import PackedRows

KIND = "features"
_DTYPES = {name: np.dtype(name) for name in ("int32", "float32")} | {"bfloat16": np.dtype(ml_dtypes.bfloat16)}
_FILE_BYTES = 256_000_000  # What an interrupted job may lose.

Arrays = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Array:
    """Dtype, by its name, and shape of an array of one row."""

    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"

    @property
    def size(self) -> int:
        """In bytes."""
        return _DTYPES[self.dtype].itemsize * math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a directory of features is of.

    Attributes:
      arrays: of each row, by name, in the order in which they lie.
      origin: what the arrays were made from, as a person would call it -> what tells it from others.
      rows: how many there are.
    """

    arrays: Mapping[str, Array]
    origin: Mapping[str, Any]
    rows: int

    @property
    def row_size(self) -> int:
        """Bytes of a record."""
        return sum(array.size for array in self.arrays.values())

    @property
    def size(self) -> int:
        """Bytes of all records."""
        return self.rows * self.row_size

    def to_json(self) -> dict[str, Any]:
        """As `manifest.json` holds it."""
        arrays = {name: {"dtype": array.dtype, "shape": list(array.shape)} for name, array in self.arrays.items()}
        order = "rows of the packed split, in its order"
        return {"kind": KIND, "order": order, "rows": self.rows, "origin": dict(self.origin), "arrays": arrays}

    def check_holds(self, wanted: "Manifest", directory: Path) -> None:
        """Raises UserError unless what is `wanted` can be read from the directory that this is the manifest of."""
        instead = "name another directory in data.features, or remove that one to write it anew"
        for name, ours in {**wanted.origin, "number of rows": wanted.rows}.items():
            theirs = {**self.origin, "number of rows": self.rows}.get(name)
            if theirs != ours:
                raise UserError(
                    f"{directory} holds features of another {name} ({theirs}; this job's is {ours}): {instead}"
                )
        for name, array in wanted.arrays.items():
            if (held := self.arrays.get(name)) != array:
                there = "has no" if held is None else f"has {held} as"
                raise UserError(f"{directory} {there} {name}, of which this job reads {array}: {instead}")


class FeatureRows:
    """Packed rows with their arrays beside them: some or all of those that a directory holds."""

    def __init__(self, rows: "PackedRows", directory: Path, names: tuple[str, ...]):
        """Raises UserError where files are missing or damaged."""
        self._rows, self._directory = rows, directory
        manifest = read_manifest(directory)
        self._arrays, self._names, self._size = manifest.arrays, names, manifest.row_size
        with _damage(directory):
            if (count := _count(directory)) != len(rows):
                raise ValueError(f"they hold {count} rows, not {len(rows)}")
            self._records = _open(directory)

    @property
    def padding(self) -> dict[str, np.ndarray]:
        """A row of padding, with zeros beside it."""
        arrays = {name: self._arrays[name] for name in self._names}
        return {**self._rows.padding, **{n: np.zeros(a.shape, _DTYPES[a.dtype]) for n, a in arrays.items()}}

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Row `index`: what `PackedRows` says of it, and its arrays by name."""
        with _damage(self._directory):
            record = self._records[index]
            if len(record) != self._size:
                raise ValueError(f"record {index} has {len(record)} bytes, not {self._size}")
        found, start = self._rows[index], 0
        for name, array in self._arrays.items():
            if name in self._names:
                piece = np.frombuffer(record, np.uint8, array.size, start)
                found[name] = piece.view(_DTYPES[array.dtype]).reshape(array.shape)
            start += array.size
        return found


def read_manifest(directory: Path) -> Manifest:
    """What a directory says that it holds. Raises UserError if it is no directory of features."""
    refuse_name(directory)
    path = directory / "manifest.json"
    if not path.is_file() or (content := read_json(path)).get("kind") != KIND:
        raise UserError(f"{directory} exists and holds no features: data.features must name them, or a new directory")
    try:
        arrays = {name: Array(str(a["dtype"]), tuple(a["shape"])) for name, a in content["arrays"].items()}
        manifest = Manifest(arrays, dict(content["origin"]), int(content["rows"]))
        if not arrays.keys() or manifest.size <= 0:
            raise ValueError("it holds nothing")
        return manifest
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error})") from None


def files_in(directory: Path) -> list[Path]:
    """The finished files of records, in order."""
    return sorted(directory.glob(f"{KIND}-*.array_record"))


def write_features(
    directory: Path, manifest: Manifest, step: int, make: Callable[[int], Iterator[Arrays]], say: Callable[[str], None]
) -> None:
    """Writes a directory of features, from where an interrupted job has come.

    Args:
      directory: to be made; where another job has made it in the meantime, it stays.
      manifest: what it will hold.
      step: rows are made so many at a time.
      make: from the row to begin with to the arrays, `[step, ...]` each, of that row and those that follow; what is
        beyond the last row is left out.
      say: told what is taken up.

    Raises:
      UserError: another job writes the same, an unfinished one wrote others, or there is no room on the disk.
    """
    partial = directory.absolute().with_name(f".{directory.absolute().name}.partial")
    per_file = step * max(1, _FILE_BYTES // (step * manifest.row_size))
    _check_room(partial, manifest)
    with locked(partial, "data.features"):
        if (directory / "manifest.json").exists():
            shutil.rmtree(partial)
            return
        if (partial / "manifest.json").exists() and read_manifest(partial) != manifest:
            raise UserError(
                f"{partial} holds unfinished features of another job: remove it, or name another directory in "
                "data.features"
            )
        write_json(partial / "manifest.json", manifest.to_json())
        with _damage(partial):
            done = _count(partial)
        if done:
            say(f"going on with the features in {partial}: {done:,} rows are there")
        records = _records(manifest, make, done)
        for first in range(done, manifest.rows, per_file):
            _write_file(partial, records, min(per_file, manifest.rows - first))
        (partial / ".lock").unlink()
        partial.rename(directory)


def _check_room(partial: Path, manifest: Manifest) -> None:
    """Raises UserError where the disk has less room than what is still to be written."""
    there = next(path for path in (partial, *partial.parents) if path.exists())
    left = manifest.size - sum(path.stat().st_size for path in files_in(partial))
    if (free := shutil.disk_usage(there).free) < left:
        raise UserError(f"the features need {left / 1e9:.3g} GB in {there}, whose disk has {free / 1e9:.3g} GB left")


def _records(manifest: Manifest, make: Callable[[int], Iterator[Arrays]], start: int) -> Iterator[bytes]:
    """Those from row `start` on."""
    for arrays in make(start):
        columns = [np.asarray(arrays[name], _DTYPES[array.dtype]) for name, array in manifest.arrays.items()]
        for row in zip(*columns, strict=True):
            yield b"".join(array.tobytes() for array in row)


def _write_file(directory: Path, records: Iterator[bytes], count: int) -> None:
    """One more file, under its name when it is whole."""
    from array_record.python import array_record_module

    temporary, final = directory / ".writing", directory / f"{KIND}-{len(files_in(directory)):05d}.array_record"
    try:
        writer = array_record_module.ArrayRecordWriter(os.fspath(temporary), "group_size:1,uncompressed")
        for _ in range(count):
            writer.write(next(records))
        writer.close()
    except RuntimeError as error:
        raise UserError(f"could not write the features in {directory} ({_first_line(error)})") from error
    temporary.rename(final)


def _open(directory: Path) -> Sequence[bytes]:
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    return ArrayRecordDataSource([os.fspath(path) for path in files_in(directory)])


def _count(directory: Path) -> int:
    return len(_open(directory)) if files_in(directory) else 0


@contextlib.contextmanager
def _damage(directory: Path) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except (RuntimeError, ValueError, IndexError) as error:
        raise UserError(f"the features in {directory} are damaged ({_first_line(error)})") from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]
