"""Kernels kept as small integers with scales beside them, in safetensors.

Two tensors stand for the kernel NAME `[in, out]`: NAME holds integers and NAME.scale `[in / G, out]` what to multiply
them by, row g of it for the G rows of the kernel from g G on. Integers are int8 `[in, out]`, or of 4 bits, two to a
byte: uint8 `[in / 2, out]` whose byte i holds row 2 i in its low half and row 2 i + 1 in its high half, each plus 8.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from models.errors import UserError
from models.formats.storage import FLOATS, read_tensor

SUFFIX = ".scale"
INTEGERS = ("I8", "U8")


def whole_tensors(names: Collection[str]) -> list[str]:
    """The names among `names` that stand for a parameter each: all but scales of others."""
    return [name for name in names if not (name.endswith(SUFFIX) and name.removesuffix(SUFFIX) in names)]


def read_scaled(files: Mapping[str, Any], name: str, directory: Path, kinds: Sequence[str] = FLOATS) -> np.ndarray:
    """One tensor on the host, as `read_tensor` reads it; where a scale stands beside it, its float32 product with that.

    Raises:
      UserError: a tensor, or its scale, is stored as something else than `kinds`, or as integers are; or the shapes of
        the two do not belong together.
    """
    beside = name + SUFFIX
    if beside not in files:
        return read_tensor(files[name], name, directory, transpose=False, kinds=kinds)
    integers = read_tensor(files[name], name, directory, transpose=False, kinds=INTEGERS)
    scale = read_tensor(files[beside], beside, directory, transpose=False).astype(np.float32)
    if integers.dtype == np.uint8:
        integers = unpack(integers)
    fits = integers.ndim == scale.ndim == 2 and integers.shape[1] == scale.shape[1] and len(scale) > 0
    if not fits or len(integers) % len(scale):
        raise UserError(
            f"{directory}: the scale of {name} has shape {list(scale.shape)}, which does not divide "
            f"{list(integers.shape)}"
        )
    return integers * np.repeat(scale, len(integers) // len(scale), axis=0)


def unpack(packed: np.ndarray) -> np.ndarray:
    """The 4-bit integers -8..7, int8 `[2 N, ...]`, of bytes `[N, ...]`."""
    halves = np.stack([packed & 15, packed >> 4], axis=1).astype(np.int8) - 8
    return halves.reshape(-1, *packed.shape[1:])


def quantise(kernel: np.ndarray, bits: int, group: int) -> tuple[np.ndarray, np.ndarray]:
    """The integers and the float16 scales that stand for a kernel `[in, out]`; the inverse of `read_scaled`.

    Args:
      kernel: floating point.
      bits: 8 or 4.
      group: rows that share a scale, G; it divides the rows.

    Returns:
      Integers as they are stored, and scales `[in / G, out]`: of 15 around the one that just covers a group's largest
      entry, the one with the least squared error.
    """
    rows, columns = kernel.shape
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    groups = np.asarray(kernel, np.float32).reshape(-1, group, columns)
    # The largest entry takes the end of the range that reaches further, so scales may be negative.
    largest = np.take_along_axis(groups, np.abs(groups).argmax(axis=1, keepdims=True), axis=1)

    def rounded(factor: float) -> tuple[np.ndarray, ...]:
        scale = (factor * largest / low).astype(np.float16).astype(np.float32)
        scale = np.where(scale == 0, np.float32(1), scale)
        integers = np.clip(np.rint(groups / scale), low, high)
        return integers, scale, np.square(integers * scale - groups).sum(axis=1, keepdims=True)

    factors = np.linspace(0.7, 1.05, 15)
    best = rounded(factors[0])
    for factor in factors[1:]:
        other = rounded(factor)
        better = other[2] < best[2]
        best = tuple(np.where(better, new, old) for new, old in zip(other, best, strict=True))
    integers, scale = best[0].reshape(rows, columns).astype(np.int8), best[1][:, 0].astype(np.float16)
    if bits == 4:
        halves = (integers + 8).astype(np.uint8)
        integers = halves[::2] | halves[1::2] << 4
    return integers, scale
