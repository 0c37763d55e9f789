"""Directories of what was trained for a target: a JSON record, which names its base, and `model.safetensors`.

Tensors are named by their path in the parameter tree (`heads.0.vocab.kernel`, as [in, out]); kernels may be kept as
small integers (`models/formats/scaled.py`).
"""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from models.errors import UserError
from models.formats.scaled import read_scaled, whole_tensors
from models.formats.storage import (
    FLOATS,
    leaves_by_path,
    new_directory,
    open_tensors,
    place_tensor,
    save_tensors,
    write_json,
)
from models.formats.target import Target
from models.sharding import param_shardings


def save_beside(directory: str | Path, name: str, record: dict[str, Any], params: Any, overwrite: bool = False) -> None:
    """Writes a directory, whole or not at all.

    Args:
      directory: to be made.
      name: of the record's file.
      record: its content; `base` is `Target.fingerprint()` of the base.
      params: parameters; None, or an empty tree, where there are none.
      overwrite: replace a directory that is already there and holds such a file.
    """
    tensors = {path.replace("/", "."): np.ascontiguousarray(leaf) for path, leaf in leaves_by_path(params).items()}
    with new_directory(directory, name, overwrite) as partial:
        if tensors:
            save_tensors(partial / "model.safetensors", tensors)
        write_json(partial / name, record)


def read_beside(
    directory: Path, name: str, shapes: Any, mesh: Mesh | None, renamed: Callable[[str], str] = lambda tensor: tensor
) -> Any:
    """The parameters in a directory.

    Args:
      directory: as `save_beside` makes it.
      name: of the record's file, which `shapes` follow from.
      shapes: tree of `ShapeDtypeStruct`s.
      mesh: shards them by `models.sharding.RULES`; None puts them on the default device.
      renamed: from a tensor's name in the file to its present one.

    Raises:
      UserError: a tensor is missing, unknown, misshapen or of another kind, or a file is damaged.
    """
    wanted = {path.replace("/", "."): shape for path, shape in leaves_by_path(shapes).items()}
    places = [None] * len(wanted) if mesh is None else jax.tree.leaves(param_shardings(mesh, shapes))
    with contextlib.ExitStack() as stack:
        files = open_tensors(directory, stack) if wanted else {}
        stored = {renamed(tensor): tensor for tensor in whole_tensors(files)}
        if wrong := sorted(set(stored) ^ set(wanted)):
            complaint = "is missing" if wrong[0] in wanted else f"is unknown to its {name}"
            raise UserError(f"{directory}: tensor {wrong[0]} {complaint}")
        leaves = []
        for (tensor, shape), place in zip(wanted.items(), places, strict=True):
            kinds = ("I32",) if np.issubdtype(shape.dtype, np.integer) else FLOATS
            host = read_scaled(files, stored[tensor], directory, kinds)
            if host.shape != shape.shape:
                raise UserError(
                    f"{directory}: tensor {tensor} has shape {list(host.shape)}, {name} implies {list(shape.shape)}"
                )
            leaves.append(place_tensor(np.asarray(host, dtype=shape.dtype), place))
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def check_base(path: Path, record: dict[str, Any], target: Target) -> None:
    """Raises UserError unless the record at `path` names `target` as its base."""
    base, present = record.get("base"), target.fingerprint()
    if not isinstance(base, dict) or set(base) != set(present):
        raise UserError(f"{path} does not name its base: expected 'base' with {', '.join(present)}")
    for key, was in base.items():
        if present[key] != was:
            what = {"tokenizer": "tokenizer hash", "embedding": "embedding hash"}.get(key, key)
            raise UserError(
                f"{path.parent} was made for another target: its base had {what} {was}, "
                f"{target.path or 'this target'} has {present[key]}"
            )
