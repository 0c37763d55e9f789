"""Whole-or-nothing directories of JSON and safetensors, the only formats that models are kept in.

Tensors are read one at a time from memory-mapped files and go straight to their sharding; nothing appears under its
final name before it is complete.
"""

import contextlib
import errno
import json
import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from models.errors import UserError
from models.formats.weights import Stored, find_weights, open_weights

FLOATS = ("F64", "F32", "F16", "BF16")


@contextlib.contextmanager
def new_directory(directory: str | Path, marker: str, overwrite: bool = False) -> Iterator[Path]:
    """A directory that appears under its name only when the `with` block ends well.

    The block fills a hidden sibling, which is renamed at the end and removed after any failure. With `overwrite`, a
    directory already there stays until the new one is complete; it must be empty or hold a file called `marker`, so
    that a mistyped path cannot cost anybody their files.

    Raises:
      UserError: the directory exists and may not be replaced.
    """
    final = Path(directory).absolute()
    if final.exists() and not overwrite:
        raise UserError(f"{directory} already exists")
    if final.exists() and not (final.is_dir() and ((final / marker).exists() or not any(final.iterdir()))):
        raise UserError(f"{directory} exists and holds no {marker}, so it is not overwritten")
    tag = uuid.uuid4().hex[:8]
    partial, old = (final.with_name(f".{final.name}.{tag}.{kind}") for kind in ("partial", "old"))
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot write {directory}: {error.strerror}: {error.filename}") from None
    try:
        yield partial
        if final.exists():
            final.rename(old)
        try:
            partial.rename(final)
        except OSError:
            if old.exists():
                old.rename(final)
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def leaves_by_path(tree) -> dict[str, Any]:
    """Leaves by path (`layers/0/attention/q/kernel`), in tree order."""
    flat, _ = jax.tree.flatten_with_path(tree)
    return {"/".join(str(getattr(k, "key", getattr(k, "idx", k))) for k in path): leaf for path, leaf in flat}


def open_tensors(directory: Path, stack: contextlib.ExitStack) -> dict[str, Stored]:
    """The tensors of a directory by name, whatever files hold them; the files stay open as long as `stack`.

    Raises:
      UserError: a file is missing, damaged or of another format.
    """
    return open_weights(find_weights(directory), stack)[0]


def read_tensor(
    tensor: Stored, name: str, directory: Path, transpose: bool, kinds: Sequence[str] = FLOATS
) -> np.ndarray:
    """One tensor on the host, transposed on request (torch keeps kernels as [out, in]).

    Raises:
      UserError: the tensor is stored as something else than `kinds`, floating point by default; the message names it.
    """
    if tensor.kind not in kinds:
        raise UserError(f"{directory}: tensor {name} is stored as {tensor.kind}, expected one of {', '.join(kinds)}")
    host = tensor.read()
    return host.T if transpose else host


def refuse_non_finite(host: np.ndarray, name: str, where: str | Path) -> None:
    """Raises UserError where a floating-point tensor holds NaN or infinity, which would spoil all that is made of it.

    The bits of the exponents tell, at the speed of memory; NumPy's own test of bfloat16 is many times slower.
    """
    mask = exponent_bits(host.dtype)
    # As it lies in memory, whatever its axes; in pieces that stay in a processor's cache.
    flat = host.ravel(order="K").view(mask.dtype)
    for start in range(0, len(flat), 1 << 18):
        if np.any(flat[start : start + (1 << 18)] & mask == mask):
            first = np.argwhere(~np.isfinite(host.astype(np.float64)))[0].tolist()
            raise UserError(f"{where}: tensor {name} holds NaN or infinite values, the first of them at {first}")


def exponent_bits(dtype: np.dtype) -> np.ndarray:
    """The bits of a floating-point number that are all set in NaN and infinity alone, as an unsigned scalar."""
    bits = {"float16": 0x7C00, "bfloat16": 0x7F80, "float32": 0x7F800000, "float64": 0x7FF0000000000000}
    return np.array(bits[dtype.name], f"u{dtype.itemsize}")


def place_tensor(host: np.ndarray, sharding) -> jax.Array:
    """Moves a host array to its `NamedSharding`, or to the default device when that is None."""
    if sharding is None:
        return jax.device_put(host)
    # Every process hands over its own shards alone; device_put would first compare the whole array across processes.
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def save_tensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes one safetensors file.

    Raises:
      OSError: the disk is full, whichever way the library reports it.
    """
    try:
        # transformers refuses files that do not name the framework whose layout they follow.
        save_file(tensors, path, metadata={"format": "pt"})
        # The library leaves files that their owner alone can read; these get what any new file here would.
        path.chmod(path.parent.stat().st_mode & 0o666)
    except SafetensorError as error:
        if f"os error {errno.ENOSPC}" in str(error):
            raise OSError(errno.ENOSPC, "No space left on device", str(path)) from None
        raise


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes indented UTF-8 JSON; names of files that are not UTF-8 are escaped as JSON escapes them."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8", errors="backslashreplace")
