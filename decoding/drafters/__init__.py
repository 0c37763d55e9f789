"""Every drafter by name, and drafter directories.

A drafter directory is `drafter.json` (method, hyper-parameters, tree, fingerprint of its base) and, where the method
has parameters, `model.safetensors`, whose tensors are named by their path in the parameter tree
(`heads.0.vocab.kernel`, as [in, out]).
"""

import contextlib
import dataclasses
import functools
import typing
from pathlib import Path

import jax
import numpy as np

from decoding.drafter import Drafter
from decoding.drafters.hydra import Hydra
from decoding.drafters.medusa import Medusa
from decoding.drafters.plain import Plain
from decoding.trees import Topology, load_topology
from models.errors import UserError
from models.hf_config import read_json
from models.storage import (
    leaves_by_path,
    new_directory,
    open_tensors,
    place_tensor,
    read_tensor,
    save_tensors,
    write_json,
)
from models.target import Target

DRAFTERS: dict[str, type[Drafter]] = {
    "none": Plain,
    "medusa": Medusa,
    "hydra": Hydra,
}

# Those that a bare name on a command line means: nothing to load.
WITHOUT_PARAMETERS = ("none",)


def save_drafter(directory: str | Path, drafter: Drafter, params, base: dict, *, overwrite: bool = False) -> None:
    """Writes a drafter directory, whole or not at all.

    Args:
      directory: to be made.
      drafter: its static part.
      params: its parameters.
      base: `Target.fingerprint()` of the target it was made for.
      overwrite: replace a drafter directory that is already there.
    """
    tensors = {path.replace("/", "."): np.ascontiguousarray(leaf) for path, leaf in leaves_by_path(params).items()}
    with new_directory(directory, "drafter.json", overwrite) as partial:
        save_tensors(partial / "model.safetensors", tensors)
        write_json(partial / "drafter.json", {**describe(drafter), "base": base})


def load_drafter(spec: str | Path, target: Target) -> tuple[Drafter, typing.Any]:
    """A drafter and its parameters, from a directory or from the bare name of one that has no parameters.

    Args:
      spec: the directory or the name.
      target: what it will draft for; it must be the base that the drafter was trained on.

    Raises:
      UserError: no such drafter, a damaged directory, or another base, tokenizer, or vocabulary.
    """
    if str(spec) in WITHOUT_PARAMETERS:
        return DRAFTERS[str(spec)](), None
    directory = Path(spec)
    if not (directory / "drafter.json").is_file():
        raise UserError(
            f"{str(spec)!r} is neither a drafter directory (there is no {directory / 'drafter.json'}) nor one of "
            f"{', '.join(WITHOUT_PARAMETERS)}"
        )
    record = read_json(directory / "drafter.json")
    drafter = build(record, str(directory / "drafter.json"))
    _check_base(directory, record.get("base"), target)
    drafter.check(target.config)
    shapes = jax.eval_shape(functools.partial(drafter.init_params, target.config), target.params, jax.random.key(0))
    wanted = {path.replace("/", "."): shape for path, shape in leaves_by_path(shapes).items()}
    with contextlib.ExitStack() as stack:
        files = open_tensors(directory, stack)
        if wrong := sorted(set(files) ^ set(wanted)):
            complaint = "is missing" if wrong[0] in wanted else "is unknown to its drafter.json"
            raise UserError(f"{directory}: tensor {wrong[0]} {complaint}")
        leaves = []
        for name, shape in wanted.items():
            host = read_tensor(files[name], name, directory, transpose=False)
            if host.shape != shape.shape:
                raise UserError(
                    f"{directory}: tensor {name} has shape {list(host.shape)}, drafter.json implies {list(shape.shape)}"
                )
            leaves.append(place_tensor(np.asarray(host, dtype=shape.dtype), None))
    return drafter, jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def write_tree(directory: str | Path, tree: Topology) -> None:
    """Replaces the tree of a drafter directory."""
    path = Path(directory) / "drafter.json"
    record = {**read_json(path), "tree": [list(p) for p in tree.paths]}
    partial = path.with_name(".drafter.json.partial")
    try:
        write_json(partial, record)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def describe(drafter: Drafter) -> dict:
    """The JSON record of a drafter's static part; `build` is its inverse."""
    record: dict = {"method": drafter.name}
    for field in dataclasses.fields(typing.cast(typing.Any, drafter)):
        value = getattr(drafter, field.name)
        record[field.name] = (
            [list(p) for p in value.paths] if isinstance(value, Topology) else dataclasses.asdict(value)
        )
    return record


def build(record: dict, where: str) -> Drafter:
    """A drafter from its JSON record, which may also hold `base`.

    Raises:
      UserError: an unknown method, an unknown or missing entry, a hyper-parameter that the method does not have or of
        the wrong type, or a tree that is not closed.
    """
    method = record.get("method")
    if not isinstance(method, str) or method not in DRAFTERS:
        raise UserError(f"{where} names the method {method!r}; known are {', '.join(DRAFTERS)}")
    kind = DRAFTERS[method]
    types = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(typing.cast(typing.Any, kind))]
    if unknown := sorted(set(record) - {"method", "base", *names}):
        raise UserError(f"{where} has the unknown entry {unknown[0]!r}")
    arguments = {}
    for name in names:
        if name not in record:
            raise UserError(f"{where} has no entry {name!r}")
        if types[name] is Topology:
            arguments[name] = load_topology(record[name], f"tree in {where}")
        else:
            arguments[name] = _hyper_parameters(types[name], record[name], f"{where}: {name} does not fit {method}")
    return kind(**arguments)


def _hyper_parameters(kind: type, content: typing.Any, complaint: str) -> typing.Any:
    """A dataclass of numbers and switches; JSON's `2` is also a float, but its `true` is no number."""
    if not isinstance(content, dict):
        raise UserError(f"{complaint}: expected an object, got {content!r}")
    types = typing.get_type_hints(kind)
    for key, value in content.items():
        if key not in types:
            raise UserError(f"{complaint}: there is no {key!r}, only {', '.join(types)}")
        if type(value) is not types[key] and (type(value), types[key]) != (int, float):
            raise UserError(f"{complaint}: {key} must be {types[key].__name__}, got {value!r}")
    return kind(**content)


def _check_base(directory: Path, base: typing.Any, target: Target) -> None:
    present = target.fingerprint()
    if not isinstance(base, dict) or set(base) != set(present):
        raise UserError(
            f"{directory / 'drafter.json'} does not name its base: expected 'base' with {', '.join(present)}"
        )
    for key, was in base.items():
        if present[key] != was:
            what = {"tokenizer": "tokenizer hash", "embedding": "embedding hash"}.get(key, key)
            raise UserError(
                f"{directory} was made for another target: its base had {what} {was}, "
                f"{target.path or 'this target'} has {present[key]}"
            )
