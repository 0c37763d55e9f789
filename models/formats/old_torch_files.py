"""Tensors out of files that torch saved before 1.6, as harmlessly as `models/formats/torch_files.py` reads the newer
ones.

Public weights of those years are such files. Instead of a zip archive they are one stream: pickles of a magic number, a
version, facts about the machine, the object and the list of its storages' keys, and then each storage, its length
before its values. The object's tensors are built before the storages that they look at have been read, as torch does.
"""

import pickletools
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from models.errors import UserError
from models.formats.torch_files import _STORAGES, _Archive, _Arguments, _Global, _Interpreter, _shown, _Storage

_MAGIC = 0x1950A86A20F9469CFC6C
_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"  # the pickle of the magic number, as torch writes it
_VERSION = 1001


def is_old_torch_file(path: str | Path) -> bool:
    """Whether a file begins as torch before 1.6 began its files."""
    path = Path(path)
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(_START)) == _START


def read_old_torch_file(path: str | Path) -> Any:
    """What `torch.save` was given, with NumPy arrays in place of tensors; see
    `models.formats.torch_files.read_torch_file`.

    Raises:
      UserError: it is damaged, truncated or no such file, or it asks for anything but tensors and plain containers,
        which the message names. Nothing of the file is executed in any case.
    """
    path = Path(path)
    with path.open("rb") as file:
        stream = _Stream(file, path)
        facts = [_StreamInterpreter(stream).run() for _ in range(3)]
        if facts[:2] != [_MAGIC, _VERSION] or not isinstance(facts[2], dict):
            raise UserError(f"{path} is not a torch file: its first pickles are not those of torch before 1.6")
        if facts[2].get("little_endian") is not True:
            raise UserError(f"{path} was written on a big-endian machine, which is not supported")
        reader = _StreamInterpreter(stream)
        content = reader.run()
        reader.fill(_StreamInterpreter(stream).run())
        return content


class _Stream(_Archive):
    """The pickles of one file, in their order."""

    def __init__(self, file: BinaryIO, path: Path):
        self.path, self.size = path, path.stat().st_size
        self.file = file

    def record(self, name: str) -> bytes:
        """The next pickle, whatever its name; the file stands behind it afterwards."""
        start = self.file.tell()
        try:
            for opcode, _, _ in pickletools.genops(self.file):
                if opcode.name == "STOP":
                    break
        except ValueError as error:
            raise UserError(f"{self.path} is damaged: {_shown(str(error))}") from None
        end = self.file.tell()
        self.file.seek(start)
        return self.file.read(end - start)


class _StreamInterpreter(_Interpreter):
    """The same machine, but for storages, which come after the tensors."""

    def __init__(self, stream: _Stream):
        super().__init__(stream)
        self._stream = stream
        self._promised = 0

    def _damaged(self, reason: str) -> UserError:
        return UserError(f"{self._stream.path} is damaged: {_shown(reason)}")

    def _storage(self) -> None:
        """A reference as of old: it has a sixth part, which tells of views of storages; there were none since 0.4."""
        reference = self._pop()
        kinds = [str, _Global, str, str, int, type(None)]
        if not isinstance(reference, _Arguments) or [type(part) for part in reference] != kinds:
            raise self._damaged("a reference to something other than a storage")
        self._push(_Arguments(reference[:5]))
        super()._storage()

    def _load(self, kind: str, key: str, count: int) -> _Storage:
        if (kind, key) not in self._storages:
            dtype = np.dtype(_STORAGES[kind])
            self._promised += max(0, count) * dtype.itemsize
            if count < 0 or self._promised > self._stream.size:
                raise self._damaged("storages larger than the file")
            self._storages[kind, key] = _Storage(np.zeros(count, dtype))
        return self._storages[kind, key]

    def fill(self, keys: Any) -> None:
        """Reads the storages, which follow in the order of `keys`."""
        promised = {key: storage.values for (_, key), storage in self._storages.items()}
        if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(promised):
            raise self._damaged("its storages are not those of its tensors")
        if len(promised) != len(self._storages):
            raise self._damaged("a storage of two kinds")
        for key in keys:
            values = promised[key]
            length, content = self._stream.file.read(8), self._stream.file.read(values.nbytes)
            if len(content) != values.nbytes or int.from_bytes(length, "little") != len(values):
                raise self._damaged(f"storage {key} is not {len(values)} values of {values.dtype.name}")
            if values.dtype == np.bool_ and not set(content) <= {0, 1}:
                raise self._damaged(f"storage {key} holds bytes that are neither true nor false")
            values[:] = np.frombuffer(content, values.dtype)
        if self._stream.file.read(1):
            raise self._damaged("it goes on after its last storage")
