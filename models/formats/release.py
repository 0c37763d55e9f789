"""Files of a released drafter: found, read whatever their format, and used up to the last tensor.

A release is a directory or one file, in safetensors or torch's own formats (read by `models.formats.torch_files`), in
one piece or in shards with an index. `take` hands out a tensor once, after its shape and kind were checked; `finish`
complains about any that nobody took. So a converter cannot miss a tensor that changes what a drafter computes.
"""

import functools
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from models.errors import UserError
from models.formats.text_files import read_json
from models.formats.torch_files import read_torch_file

_INDEX = ".index.json"
# Where a directory keeps the tensors, first choice first.
_WHOLE_MODELS = (
    f"model.safetensors{_INDEX}",
    f"pytorch_model.bin{_INDEX}",
    "model.safetensors",
    "pytorch_model.bin",
)
_SAFETENSORS_KINDS = {"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"}


class Release:
    """The tensors of a released drafter, each to be taken once.

    Attributes:
      source: the file or directory it came from, for messages.
      config: its `config.json`; empty if there is none.
      digests: file name -> SHA-256 of every file that was read.
    """

    def __init__(
        self, source: Path, tensors: Mapping[str, Callable[[], np.ndarray]], config: dict, digests: dict[str, str]
    ):
        self.source, self.config, self.digests = source, config, digests
        self._tensors = dict(tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    @property
    def names(self) -> list[str]:
        """Names of the tensors not taken yet, sorted."""
        return sorted(self._tensors)

    def take(self, name: str, shape: Sequence[int], because: str) -> np.ndarray:
        """A floating-point tensor in torch's own layout, and no longer among `names`.

        Raises:
          UserError: it is missing, not floating point, or of another shape; `because` tells what implies the right one.
        """
        array = self.take_any(name)
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise UserError(f"{self.source}: tensor {name} holds {array.dtype.name} values, expected floating point")
        if array.shape != tuple(shape):
            raise UserError(
                f"{self.source}: tensor {name} has shape {list(array.shape)}, {because} implies {list(shape)}"
            )
        return array

    def take_any(self, name: str) -> np.ndarray:
        """A tensor of any kind and shape, and no longer among `names`."""
        if name not in self._tensors:
            raise UserError(f"{self.source}: tensor {name} is missing")
        return self._tensors.pop(name)()

    def numbers(self, before: str, after: str) -> list[int]:
        """The numbers n, sorted, for which the name of a tensor not taken yet begins with `before` + n + `after`."""
        pattern = re.compile(f"{re.escape(before)}([0-9]{{1,3}}){re.escape(after)}")
        return sorted({int(match[1]) for name in self._tensors if (match := pattern.match(name))})

    def finish(self, ignored: str, what: str) -> None:
        """Checks that every tensor was taken or matches `ignored`.

        Raises:
          UserError: one is left; the message names it and `what` it does not belong to.
        """
        if left := [name for name in self.names if not re.fullmatch(ignored, name)]:
            more = f" (and {len(left) - 1} more)" if len(left) > 1 else ""
            raise UserError(f"{self.source}: tensor {left[0]} is unknown to {what}{more}")


def read_release(source: str | Path, names: Sequence[str] = ()) -> Release:
    """Opens a release.

    Args:
      source: a file, or a directory that holds one of `names`, or `model.safetensors`, `pytorch_model.bin` or the
        index of their shards.
      names: the files that this kind of drafter is usually released in, first choice first.

    Raises:
      UserError: there is none, or one is damaged, or an index does not fit its shards.
    """
    source = Path(source)
    choices = [source / name for name in (*names, *_WHOLE_MODELS)] if source.is_dir() else [source]
    main = next((path for path in choices if path.is_file()), None)
    if main is None:
        wanted = f" with {' or '.join(path.name for path in choices)}" if source.is_dir() else ""
        raise UserError(f"there is no released file {source}{wanted}")
    shards = _shards(main) if main.name.endswith(_INDEX) else {main: None}
    tensors: dict[str, Callable[[], np.ndarray]] = {}
    for path, expected in shards.items():
        found = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
        if wrong := sorted(set(found) ^ expected if expected is not None else set(found) & set(tensors)):
            raise UserError(f"{main} and {path.name} disagree about where tensor {wrong[0]} is")
        tensors |= found
    beside = main.with_name("config.json")
    config = read_json(beside) if beside.is_file() else {}
    read = dict.fromkeys([main, *shards, *([beside] if beside.is_file() else [])])
    return Release(source, tensors, config, {path.name: digest(path) for path in read})


def _shards(index: Path) -> dict[Path, set[str]]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map")
    shards: dict[Path, set[str]] = {}
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(f"{index} names {name!r}, which is not a file beside it")
        shards.setdefault(index.with_name(name), set()).add(tensor)
    return shards


def _read_safetensors(path: Path) -> dict[str, Callable[[], np.ndarray]]:
    if not path.is_file():
        raise UserError(f"there is no file {path}")

    def load(name: str) -> Callable[[], np.ndarray]:
        def read() -> np.ndarray:
            with safe_open(path, framework="numpy") as file:
                return file.get_tensor(name)

        return read

    try:
        with safe_open(path, framework="numpy") as file:
            names = list(file.keys())
            kinds = {name: file.get_slice(name).get_dtype() for name in names}
    except SafetensorError as error:
        raise UserError(f"{path} is damaged or not a safetensors file: {error}") from None
    for name, kind in kinds.items():
        if kind not in _SAFETENSORS_KINDS:
            raise UserError(f"{path}: tensor {name} is stored as {kind}, which is not supported")
    return {name: load(name) for name in names}


def _read_torch(path: Path) -> dict[str, Callable[[], np.ndarray]]:
    content = read_torch_file(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, expected a dict of tensors")
    return as_tensors(content, path)


def as_tensors(content: Mapping[Any, Any], path: Path) -> dict[str, Callable[[], np.ndarray]]:
    """A dict out of a torch file as a `Release` takes it.

    Raises:
      UserError: it holds something other than tensors by their names.
    """
    for name, array in content.items():
        if not isinstance(name, str):
            raise UserError(f"{path}: one of its tensors goes by a {type(name).__name__}, expected a string")
        if not isinstance(array, np.ndarray):
            raise UserError(f"{path}: entry {name[:100]!r} is not a tensor but a {type(array).__name__}")
    return {name: functools.partial(np.asarray, array) for name, array in content.items()}


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
