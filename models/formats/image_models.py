"""Directories of image models: `config.json`, which names the kind of model, and `model.safetensors`.

    save(directory, config, params)                      whole or not at all
    load(directory, VQVAEConfig) -> (config, params)     or VARConfig, or ClassifierConfig

Tensors are named by their path in the parameter tree (`decoder.conv_in.kernel`, in our own layout: [in, out] and HWIO).
"""

import contextlib
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from models.errors import UserError
from models.formats.storage import (
    leaves_by_path,
    new_directory,
    open_tensors,
    place_tensor,
    read_tensor,
    refuse_non_finite,
    save_tensors,
    write_json,
)
from models.formats.text_files import read_json
from models.images import classifier, var, vqvae
from models.images.classifier import ClassifierConfig
from models.images.config import VARConfig, VQVAEConfig
from models.schema import parse, resolved
from models.transformer import Params, unstack_layers

Config = TypeVar("Config", VQVAEConfig, VARConfig, ClassifierConfig)
AnyConfig = VQVAEConfig | VARConfig | ClassifierConfig

_KINDS: dict[type, str] = {VQVAEConfig: "vqvae", VARConfig: "var", ClassifierConfig: "classifier"}
_MODULES: dict[type, ModuleType] = {VQVAEConfig: vqvae, VARConfig: var, ClassifierConfig: classifier}


def param_shapes(config: AnyConfig, dtype=jnp.float32) -> Params:
    """The tree of `ShapeDtypeStruct`s of a model's parameters, layers as a list."""
    return _MODULES[type(config)].param_shapes(config, dtype)


def save(
    directory: str | Path,
    config: AnyConfig,
    params: Params,
    *,
    overwrite: bool = False,
    provenance: dict[str, Any] | None = None,
) -> None:
    """Writes a model's directory; reading it back is bit-equal.

    Args:
      directory: to be made. It appears only when it is complete.
      config: the shape of the model.
      params: its parameters, stored in their own dtypes; layers as a list or stacked.
      overwrite: replace a model directory that is already there.
      provenance: what it was made from, for people; nothing depends on it.

    Raises:
      UserError: the directory exists, or `params` does not fit the config.
      OSError: the disk is full or not writable; nothing is left behind.
    """
    if "layers" in params and not isinstance(params["layers"], list):
        params = unstack_layers(jax.device_get(params))  # On the host, where a slice is no program.
    leaves = leaves_by_path(params)
    shapes = leaves_by_path(param_shapes(config))
    _check_names("params", set(leaves), set(shapes), "parameter")
    for path, shape in shapes.items():
        if leaves[path].shape != shape.shape:
            raise UserError(f"params: {path} has shape {list(leaves[path].shape)}, expected {list(shape.shape)}")
    origin = {} if provenance is None else {"provenance": provenance}
    with new_directory(directory, "config.json", overwrite) as partial:
        tensors = {path.replace("/", "."): np.ascontiguousarray(leaf) for path, leaf in leaves.items()}
        save_tensors(partial / "model.safetensors", tensors)
        write_json(partial / "config.json", {"kind": _KINDS[type(config)], **resolved(config), **origin})


def load(directory: str | Path, kind: type[Config], dtype=jnp.float32) -> tuple[Config, Params]:
    """Reads a model's directory.

    Args:
      directory: what `save` wrote.
      kind: the config of the model that it must hold.
      dtype: of the returned parameters, whatever the file holds.

    Raises:
      UserError: a file is missing or damaged, the directory holds another kind of model, its config is broken, or a
        tensor is missing, unknown, misshapen, not floating point or not finite; the message names it.
    """
    directory = Path(directory)
    config = read_config(directory, kind)
    shapes = param_shapes(config, dtype)
    wanted = {path.replace("/", "."): shape for path, shape in leaves_by_path(shapes).items()}
    with contextlib.ExitStack() as stack:
        files = open_tensors(directory, stack)
        _check_names(str(directory), set(files), set(wanted), "tensor")
        leaves = []
        for name, shape in wanted.items():
            host = read_tensor(files[name], name, directory, transpose=False)
            if host.shape != shape.shape:
                raise UserError(
                    f"{directory}: tensor {name} has shape {list(host.shape)}, config.json implies {list(shape.shape)}"
                )
            refuse_non_finite(host, name, directory)
            leaves.append(place_tensor(np.asarray(host, dtype=shape.dtype), None))
    return config, jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def read_config(directory: str | Path, kind: type[Config]) -> Config:
    """The config of a model's directory.

    Raises:
      UserError: there is none, it belongs to another kind of model, or it is broken.
    """
    path = Path(directory) / "config.json"
    record = read_json(path)
    if record.get("kind") != _KINDS[kind]:
        raise UserError(f"{path} has kind {record.get('kind')!r}, expected {_KINDS[kind]!r}")
    fields = {name: value for name, value in record.items() if name not in ("kind", "provenance")}
    return parse(kind, {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}, place=str(path))


def _check_names(where: str, present: set[str], wanted: set[str], what: str) -> None:
    for complaint, names in (("is missing", wanted - present), ("is unknown to this model", present - wanted)):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise UserError(f"{where}: {what} {min(names)} {complaint}{more}")
