"""Writes the files of torch before 1.6 without torch, honest ones and hostile ones."""

import pickle
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.models.formats.torch_archives import STORAGES, Global, Raw, emit, tensor

MAGIC = 0x1950A86A20F9469CFC6C
FACTS = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}


def storage(kind: str, key: Any, count: Any, view: Any = None) -> Raw:
    """A reference to the storage `key`, in six parts."""
    return Raw(emit(("storage", Global(f"torch.{kind}Storage"), key, "cpu", count, view), {}) + b"Q")


def with_references(value: Any, arrays: dict[str, np.ndarray]) -> Any:
    """`value` with tensors of `torch_archives` in place of its arrays, which are added to `arrays`."""
    if isinstance(value, dict):
        return {key: with_references(part, arrays) for key, part in value.items()}
    if not isinstance(value, np.ndarray):
        return value
    key = str(1000 - len(arrays))
    arrays[key] = np.array(value, order="C")
    steps = [step // value.itemsize for step in arrays[key].strides]
    return tensor(storage(STORAGES[value.dtype.name], key, value.size), value.shape, tuple(steps))


def write_old_torch(
    path: Path,
    value: Any,
    *,
    facts: Any = FACTS,
    version: int = 1001,
    keys: Sequence[str] | None = None,
    after: bytes = b"",
) -> Path:
    """What `torch.save(value, path)` wrote then, with arrays in place of tensors (in dicts alone)."""
    arrays: dict[str, np.ndarray] = {}
    code = b"\x80\x02" + emit(with_references(value, arrays), {}) + b"."
    heads = [pickle.dumps(part, 2) for part in (MAGIC, version, facts)]
    order = sorted(arrays) if keys is None else keys
    stored = [struct.pack("<q", arrays[key].size) + arrays[key].tobytes() for key in order if key in arrays]
    path.write_bytes(b"".join([*heads, code, pickle.dumps(list(order), 2), *stored, after]))
    return path
