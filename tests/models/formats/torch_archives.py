"""Writes torch's zip archives without torch, honest ones and hostile ones."""

import dataclasses
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

STORAGES = {
    "float64": "Double",
    "float32": "Float",
    "float16": "Half",
    "bfloat16": "BFloat16",
    "int64": "Long",
    "int32": "Int",
    "int16": "Short",
    "int8": "Char",
    "uint8": "Byte",
    "bool": "Bool",
    "complex64": "ComplexFloat",
    "complex128": "ComplexDouble",
}


@dataclasses.dataclass(frozen=True)
class Global:
    """A name that the pickle asks for, as `os.system`."""

    name: str


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of a global."""

    function: Any
    arguments: Any


@dataclasses.dataclass(frozen=True)
class Storage:
    """A reference to the bytes in the record `data/{key}`."""

    kind: Any
    key: Any
    count: Any


@dataclasses.dataclass(frozen=True)
class Raw:
    """Pickle operations as they are."""

    code: bytes


EMPTY = Call(Global("collections.OrderedDict"), ())


def tensor(storage: Any, size: Any, stride: Any, offset: Any = 0, hooks: Any = EMPTY) -> Call:
    """What torch writes for a tensor."""
    return Call(Global("torch._utils._rebuild_tensor_v2"), (storage, offset, size, stride, False, hooks))


def emit(value: Any, storages: dict[str, bytes]) -> bytes:
    """Pickle operations (protocol 2) that make `value`; the bytes of arrays in it are added to `storages`."""

    def of(value: Any) -> bytes:
        return emit(value, storages)

    match value:
        case None:
            return b"N"
        case bool():
            return b"\x88" if value else b"\x89"
        case int():
            content = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            return b"\x8b" + struct.pack("<i", len(content)) + content
        case float():
            return b"G" + struct.pack(">d", value)
        case str():
            return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
        case list():
            return b"](" + b"".join(map(of, value)) + b"e"
        case tuple():
            return b"(" + b"".join(map(of, value)) + b"t"
        case Mapping():
            return of(EMPTY) + b"(" + b"".join(of(k) + of(v) for k, v in value.items()) + b"u"
        case Global():
            return b"c" + b"\n".join(part.encode() for part in value.name.rsplit(".", 1)) + b"\n"
        case Call():
            return of(value.function) + of(value.arguments) + b"R"
        case Storage():
            return of(("storage", value.kind, value.key, "cpu", value.count)) + b"Q"
        case Raw():
            return value.code
    assert isinstance(value, np.ndarray)
    key = str(len(storages))
    storages[key] = value.tobytes()
    storage = Storage(Global(f"torch.{STORAGES[value.dtype.name]}Storage"), key, value.size)
    # An array that is not contiguous in memory is written as a view, as torch does.
    flipped = value.ndim == 2 and value.flags.f_contiguous
    if flipped:
        storages[key] = value.T.tobytes()
    size, steps = value.shape, np.cumprod([1, *value.shape[:0:-1]])[::-1]
    stride = (1, value.shape[0]) if flipped else tuple(int(step) for step in steps[: value.ndim])
    return of(tensor(storage, size, stride))


def write_archive(path: Path, code: bytes, records: Mapping[str, bytes], root: str = "archive", **zip_options) -> Path:
    """A zip archive of the pickle `code` (without its ends) and further records."""
    with zipfile.ZipFile(path, "w", **zip_options) as archive:
        archive.writestr(f"{root}/data.pkl", b"\x80\x02" + code + b".")
        for name, content in records.items():
            archive.writestr(f"{root}/{name}", content)
    return path


def write_torch(path: Path, value: Any, records: Mapping[str, bytes] | None = None) -> Path:
    """What `torch.save(value, path)` would write, with arrays in place of tensors; `records` are added or replaced."""
    storages: dict[str, bytes] = {}
    code = emit(value, storages)
    data = {f"data/{key}": content for key, content in storages.items()}
    return write_archive(path, code, {"byteorder": b"little", "version": b"3\n", **data, **(records or {})})
