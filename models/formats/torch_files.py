"""Tensors out of files that torch saved, read without torch and without running anything that they contain.

Since torch 1.6 `torch.save` writes a zip archive: one record of bytes per storage, and `data.pkl`, a pickle that says
which tensors look at which storage. Before, it wrote one stream, as public weights of those years still are: pickles of
a magic number, a version, facts about the machine, the object and the list of its storages' keys, and then each
storage, its length before its values. `models.formats.pickles` interprets the pickles of both and knows nothing but
tensors and plain containers; whatever else a file asks for ends in a `UserError`.
"""

import contextlib
import errno
import mmap
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from models.errors import UserError
from models.formats import pickles
from models.formats.pickles import Damaged
from models.formats.text_files import POINTER, is_pointer

_STREAM_MAGIC, _STREAM_VERSION = 0x1950A86A20F9469CFC6C, 1001
_STREAM_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"  # the pickle of the magic number, as torch writes it
# Files of other kinds that people give in the place of torch's, by how they begin.
_OTHERS = {
    b"GGUF": "a GGUF file",
    b"\x89HDF": "an HDF5 file (weights of Keras)",
    b"\x93NUMPY": "an array of NumPy",
    b"\x1f\x8b": "a gzip file",
}


def read_torch_file(path: str | Path) -> Any:
    """What `torch.save` was given, with NumPy arrays in place of tensors.

    Args:
      path: a `.pt`, `.pth` or `.bin` file: a zip archive, the default since torch 1.6, or a stream from before.

    Returns:
      Tensors as read-only arrays in their stored dtype (bfloat16 as `jnp.bfloat16`), parameters likewise, in the dicts,
      lists and tuples that held them, beside numbers, strings, booleans and None. An OrderedDict becomes a dict.
      Tensors that share a storage share memory.

    Raises:
      UserError: there is no such file; it is damaged, truncated or of another format; or it asks for anything but
        tensors and plain containers, which the message names. Nothing of the file is executed in any case.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    with path.open("rb") as file:
        start = file.read(512)
    try:
        return _read_stream(path) if start.startswith(_STREAM_START) else _read_archive(path, start)
    except pickles.Refused as error:
        raise UserError(
            f"{path} asks for {_shown(str(error))}, which is neither a tensor nor a plain container; "
            "nothing in it was executed"
        ) from None
    except Damaged as error:
        raise UserError(f"{path} is damaged: {_shown(str(error))}") from None


def _shown(text: str) -> str:
    """Text of a file as a message can carry it: one short line."""
    line = "".join(c if c.isprintable() else "?" for c in text)
    return line if len(line) <= 150 else f"{line[:150]}..."


def _values(content: bytes, dtype: np.dtype, key: str, count: int) -> np.ndarray:
    """The values of a storage, of which nothing may be missing or wrong."""
    if len(content) != count * dtype.itemsize:
        raise Damaged(f"storage {key} has {len(content)} bytes, not {count} values of {dtype.name}")
    if dtype == np.bool_ and not set(content) <= {0, 1}:
        raise Damaged(f"storage {key} holds bytes that are neither true nor false")
    return np.frombuffer(content, dtype)


# Archives


def _read_archive(path: Path, start: bytes) -> Any:
    with contextlib.ExitStack() as stack:
        with _zip_errors(path):
            if not zipfile.is_zipfile(path):
                raise UserError(f"{path} {_what_is_wrong(start)}")
            zip_file = stack.enter_context(zipfile.ZipFile(path))
        archive = _Archive(zip_file, path)
        content = archive.record("data.pkl")
        try:
            return pickles.read_pickle(content, archive.storage)
        except Damaged as error:
            raise Damaged(f"data.pkl: {error}") from None


@contextlib.contextmanager
def _zip_errors(path: Path) -> Iterator[None]:
    """The zip library has many ways to say that an archive is damaged, truncated or encrypted."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        if error.errno != errno.EINVAL:  # of a place before the file's beginning, which a damaged directory names
            raise
        raise UserError(f"{path} is damaged: its directory leads nowhere") from None
    except (zipfile.BadZipFile, EOFError, RuntimeError, ValueError, OverflowError, struct.error) as error:
        raise UserError(f"{path} is damaged: {_shown(str(error)) or 'it ends early'}") from None


def _what_is_wrong(start: bytes) -> str:
    """Of a file that is neither an archive nor a stream."""
    if start[257:262] == b"ustar":
        return "was written in a format of torch before 1.6: load it and save it again with a newer torch"
    if is_pointer(start):
        return POINTER
    if start.startswith(b"PK"):
        return "is truncated: it begins as a zip archive but has no directory at its end"
    if not start:
        return "is empty, not a torch file"
    if kind := next((kind for magic, kind in _OTHERS.items() if start.startswith(magic)), None):
        return f"is {kind}, not a torch file"
    if start[8:10] == b'{"':
        return "is a safetensors file by another name: give it the ending .safetensors"
    return "is not a torch file: torch writes zip archives"


class _Archive:
    """The records of one file."""

    def __init__(self, archive: zipfile.ZipFile, path: Path):
        self._path, self._archive = path, archive
        if sum(info.file_size for info in archive.infolist()) > path.stat().st_size:
            raise UserError(f"{path} is damaged: its records are larger than the file")
        roots = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(roots) != 1:
            first = next(iter(archive.namelist()), None)
            held = f"it holds {_shown(first)}" if first else "it is empty"
            more = f" and {len(archive.namelist()) - 1} more" if len(archive.namelist()) > 1 else ""
            raise UserError(
                f"{path} is a zip archive, but not one that torch wrote: {held}{more}, and {len(roots)} data.pkl "
                "records, where torch writes one"
            )
        self._root = roots[0].removesuffix("data.pkl")
        if f"{self._root}byteorder" in archive.namelist() and self.record("byteorder") != b"little":
            raise UserError(f"{path} was written on a big-endian machine, which is not supported")

    def record(self, name: str) -> bytes:
        """The bytes of one record, checked against their CRC; torch never compresses, so a file cannot swell."""
        try:
            info = self._archive.getinfo(self._root + name)
        except KeyError:
            raise UserError(f"{self._path} is damaged: the record {_shown(name)} is missing") from None
        if info.compress_type != zipfile.ZIP_STORED:
            raise UserError(f"{self._path} is not a torch file: the record {_shown(name)} is compressed")
        with _zip_errors(self._path):
            return self._archive.read(info)

    def storage(self, dtype: np.dtype, key: str, count: int) -> np.ndarray:
        """The values in the record of one storage."""
        return _values(self.record(f"data/{key}"), dtype, key, count)


# Streams


def _read_stream(path: Path) -> Any:
    # A mapped file, unlike an open one, allocates no more than it has, whatever length a pickle names.
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        stream = cast(BinaryIO, mapped)
        magic, version, facts = (pickles.read_pickle(stream) for _ in range(3))
        if (magic, version) != (_STREAM_MAGIC, _STREAM_VERSION) or not isinstance(facts, dict):
            raise UserError(f"{path} is not a torch file: its first pickles are not those of torch before 1.6")
        if facts.get("little_endian") is not True:
            raise UserError(f"{path} was written on a big-endian machine, which is not supported")
        promised = _Promised(len(mapped))
        content = pickles.read_pickle(stream, promised.storage)
        promised.fill(stream, pickles.read_pickle(stream))
        return content


class _Promised:
    """The storages of a stream: tensors are built on them, as torch does, before their values have been read."""

    def __init__(self, size: int):
        self._left = size
        self._storages: dict[str, np.ndarray] = {}

    def storage(self, dtype: np.dtype, key: str, count: int) -> np.ndarray:
        """Zeros, no more in all than the file is large."""
        if key in self._storages:
            raise Damaged(f"storage {key} is of two kinds")
        if count < 0 or count * dtype.itemsize > self._left:
            raise Damaged("storages larger than the file")
        self._left -= count * dtype.itemsize
        self._storages[key] = np.zeros(count, dtype)
        return self._storages[key]

    def fill(self, stream: BinaryIO | mmap.mmap, keys: Any) -> None:
        """Reads the values, which follow in the order of `keys`, up to the end of the stream."""
        if not isinstance(keys, list) or not all(type(key) is str for key in keys):
            raise Damaged("its list of storages is none")
        if sorted(keys) != sorted(self._storages):
            raise Damaged("its storages are not those of its tensors")
        for key in keys:
            values = self._storages[key]
            length, content = stream.read(8), stream.read(values.nbytes)
            if int.from_bytes(length, "little") != len(values):
                raise Damaged(f"storage {key} is not {len(values)} values of {values.dtype.name}")
            values[:] = _values(content, values.dtype, key, len(values))
        if stream.read(1):
            raise Damaged("it goes on after its last storage")
