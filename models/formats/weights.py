"""Where people keep weights: safetensors or torch's files, whole or in shards with an index, in one order for all.

    main = find_weights(directory)
    tensors = open_weights(main, stack)         name -> Stored, read one at a time

A directory often holds the same weights twice, and sometimes other weights of an earlier day; transformers decides
which it loads by an order, and so does this: `model.safetensors`, the index of its shards, `pytorch_model.bin`, the
index of its shards.
"""

import contextlib
import dataclasses
import fnmatch
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from models.errors import UserError
from models.formats.text_files import read_json, refuse_dangling, refuse_pointer
from models.formats.torch_files import read_torch_file

INDEX = "model.safetensors.index.json"
_INDEX_ENDING = ".index.json"
WEIGHTS = ("model.safetensors", INDEX, "pytorch_model.bin", f"pytorch_model.bin{_INDEX_ENDING}")

# Weights that are known and not read here, by the names that their files have.
_ELSEWHERE = {
    "*.msgpack": "weights of Flax",
    "*.h5": "weights of TensorFlow or Keras",
    "*.ckpt.index": "weights of TensorFlow",
    "*.onnx": "an ONNX graph",
    "consolidated*.pth": "weights in Meta's own format",
    "consolidated*.safetensors": "weights in Mistral's own format",
    "adapter_model.*": "an adapter (LoRA), not a model: merge it into its base",
    "*.gguf": "a GGUF file, of which scripts.convert makes a target",
    "*.npz": "arrays of NumPy or MLX",
    "*.tflite": "a model of TensorFlow Lite",
    "*.nemo": "a model of NeMo",
    "*.engine": "a TensorRT engine",
    "*.mlpackage": "a model of Core ML",
}
_KINDS = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor in a file: its kind, as safetensors calls it (`F32`, `BF16`, `I64`), and how to read it."""

    kind: str
    read: Callable[[], np.ndarray]


def find_weights(directory: Path, names: Sequence[str] = ()) -> Path:
    """The file, or the index of the files, that holds the weights of a directory.

    Args:
      directory: where they are.
      names: names to try before the usual ones, first choice first.

    Raises:
      UserError: there is none; the message says so of files in formats that are known and not read.
    """
    choices = list(dict.fromkeys((*names, *WEIGHTS)))
    for name in choices:
        refuse_dangling(directory / name)
        if (directory / name).is_file():
            return directory / name
    wanted = choices[0] if not names else f"released file, {' or '.join(choices)},"
    raise UserError(f"there is no {wanted} in {directory}{held_instead(directory)}")


def held_instead(directory: Path) -> str:
    """What a directory holds in formats that are not read, for messages; empty where it holds none."""
    for path in sorted(directory.iterdir()) if directory.is_dir() else []:
        if what := _elsewhere(path.name):
            return f" (it holds {path.name}, {what}; only safetensors and torch's files are read)"
    return ""


def open_weights(main: Path, stack: contextlib.ExitStack) -> tuple[dict[str, Stored], list[Path]]:
    """The tensors of a file or an index by name, and the files that hold them.

    Safetensors stay open, and mapped into memory, as long as `stack`; of torch's files all is read at once.

    Raises:
      UserError: a file is missing, damaged or of another format, or an index does not fit its shards.
    """
    shards = _shards(main) if main.name.endswith(_INDEX_ENDING) else {main: None}
    tensors: dict[str, Stored] = {}
    for path, expected in shards.items():
        if not path.is_file():
            raise UserError(f"there is no {path.name} in {path.parent}" + (f", which {main} names" * (path != main)))
        if what := _elsewhere(path.name):
            raise UserError(f"{path} holds {what}; only safetensors and torch's files are read")
        refuse_pointer(path)
        found = _open_safetensors(path, stack) if path.suffix == ".safetensors" else _read_torch(path)
        if wrong := sorted(set(found) ^ expected if expected is not None else set(found) & set(tensors)):
            raise UserError(f"{main} and {path.name} disagree about where tensor {wrong[0]} is")
        tensors |= found
    return tensors, list(shards)


def as_stored(content: Mapping[Any, Any], path: Path) -> dict[str, Stored]:
    """A dict out of a torch file as tensors by name.

    Raises:
      UserError: it holds something other than tensors by their names.
    """
    for name, array in content.items():
        if not isinstance(name, str):
            raise UserError(f"{path}: one of its tensors goes by a {type(name).__name__}, expected a string")
        if not isinstance(array, np.ndarray):
            raise UserError(f"{path}: entry {name[:100]!r} is not a tensor but a {type(array).__name__}")
    kinds = {name: _KINDS.get(array.dtype.name, array.dtype.name) for name, array in content.items()}
    return {name: Stored(kinds[name], functools.partial(np.asarray, array)) for name, array in content.items()}


def _elsewhere(name: str) -> str | None:
    return next((what for pattern, what in _ELSEWHERE.items() if fnmatch.fnmatch(name, pattern)), None)


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


def _open_safetensors(path: Path, stack: contextlib.ExitStack) -> dict[str, Stored]:
    try:
        file: Any = stack.enter_context(safe_open(path, framework="numpy"))
        kinds = {name: file.get_slice(name).get_dtype() for name in list(file.keys())}
    except SafetensorError as error:
        raise UserError(f"{path} is damaged or not a safetensors file: {error}") from None
    return {name: Stored(kind, functools.partial(_read, file, path, name, kind)) for name, kind in kinds.items()}


def _read(file: Any, path: Path, name: str, kind: str) -> np.ndarray:
    if kind not in _KINDS.values():
        raise UserError(f"{path}: tensor {name} is stored as {kind}, which is not supported")
    return file.get_tensor(name)


def _read_torch(path: Path) -> dict[str, Stored]:
    content = read_torch_file(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, expected a dict of tensors")
    return as_stored(content, path)
