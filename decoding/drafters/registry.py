"""Every drafter by name, and drafter directories.

A drafter directory is `drafter.json` (method, hyper-parameters, tree, fingerprint of its base) and, where the method
has parameters, `model.safetensors`, whose tensors are named by their path in the parameter tree
(`heads.0.vocab.kernel`, as [in, out]). On a command line a drafter is its directory, the bare name of one that has no
parameters, `early_exit:LAYERS`, `prompt_lookup:SHORTEST`, or several of these joined by `+`: each is asked where those
before it find nothing.
"""

import contextlib
import functools
import typing
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from decoding.drafter import Drafter
from decoding.drafters.draft_model import DraftModel
from decoding.drafters.eagle import Eagle, Eagle3
from decoding.drafters.early_exit import EarlyExit
from decoding.drafters.first_of import FirstOf
from decoding.drafters.hydra import Hydra
from decoding.drafters.lookahead import Lookahead
from decoding.drafters.medusa import Medusa
from decoding.drafters.plain import Plain
from decoding.drafters.prompt_lookup import PromptLookup
from decoding.drafters.token_recycling import TokenRecycling
from decoding.policies import TreePolicy
from decoding.trees import Topology
from models.errors import UserError
from models.formats.hf_config import read_json
from models.formats.storage import (
    FLOATS,
    leaves_by_path,
    new_directory,
    open_tensors,
    place_tensor,
    read_tensor,
    save_tensors,
    write_json,
)
from models.formats.target import Target
from models.sharding import mesh_of, param_shardings

DRAFTERS: dict[str, type[Drafter]] = {
    "none": Plain,
    "draft_model": DraftModel,
    "medusa": Medusa,
    "hydra": Hydra,
    "eagle": Eagle,
    "eagle3": Eagle3,
    "token_recycling": TokenRecycling,
    "prompt_lookup": PromptLookup,
    "lookahead": Lookahead,
    "early_exit": EarlyExit,
    "first_of": FirstOf,
}
Drafter.known = DRAFTERS

# What a record holds beside the drafter itself: the fingerprint of its base, and where converted weights came from.
BESIDES = ("base", "provenance")

# Those that a bare name on a command line means: nothing to load.
WITHOUT_PARAMETERS = ("none", "token_recycling", "prompt_lookup", "lookahead")

# The hyper-parameter that a number behind a name, `early_exit:2`, stands for.
WITH_NUMBER = {"early_exit": "layers", "prompt_lookup": "shortest"}


def save_drafter(
    directory: str | Path,
    drafter: Drafter,
    params,
    base: dict,
    *,
    overwrite: bool = False,
    provenance: dict | None = None,
) -> None:
    """Writes a drafter directory, whole or not at all.

    Args:
      directory: to be made.
      drafter: its static part.
      params: its parameters.
      base: `Target.fingerprint()` of the target it was made for.
      overwrite: replace a drafter directory that is already there.
      provenance: what it was made from, for people; kept in `drafter.json`, and nothing depends on it.
    """
    tensors = {path.replace("/", "."): np.ascontiguousarray(leaf) for path, leaf in leaves_by_path(params).items()}
    with new_directory(directory, "drafter.json", overwrite) as partial:
        if tensors:
            save_tensors(partial / "model.safetensors", tensors)
        origin = {} if provenance is None else {"provenance": provenance}
        write_json(partial / "drafter.json", {**describe(drafter), "base": base, **origin})


def load_drafter(spec: str | Path, target: Target, mesh: Mesh | None = None) -> tuple[Drafter, typing.Any]:
    """A drafter and its parameters, from what a command line says.

    Args:
      spec: a directory, a bare name, `NAME:NUMBER`, or several of these joined by `+` (see above).
      target: what it will draft for; it must be the base that the drafter was trained on.
      mesh: shards the parameters over it by `models.sharding.RULES`; None is the mesh that the target was loaded on, or
        the default device.

    Raises:
      UserError: no such drafter, a damaged directory, or another base, tokenizer, or vocabulary.
    """
    name, directory = str(spec), Path(spec)
    if name in WITHOUT_PARAMETERS:
        return DRAFTERS[name](), None
    if not (directory / "drafter.json").is_file():
        method, _, number = name.partition(":")
        if "+" in name:
            parts = [load_drafter(part, target, mesh) for part in name.rsplit("+", 1)]
            (first, first_params), (second, second_params) = parts
            return FirstOf(first, second), {"first": first_params, "second": second_params}
        if method in WITH_NUMBER and number.isdecimal():
            return DRAFTERS[method](**{WITH_NUMBER[method]: int(number)}), None
        numbered = [f"{method}:{field.upper()}" for method, field in WITH_NUMBER.items()]
        raise UserError(
            f"{name!r} is neither a drafter directory (there is no {directory / 'drafter.json'}) nor one of "
            f"{', '.join([*WITHOUT_PARAMETERS, *numbered])}, or several of these joined by +"
        )
    record = read_json(directory / "drafter.json")
    drafter = build(record, str(directory / "drafter.json"))
    _check_base(directory, record.get("base"), target)
    drafter.check(target.config)
    shapes = jax.eval_shape(functools.partial(drafter.init_params, target.config), target.params, jax.random.key(0))
    wanted = {path.replace("/", "."): shape for path, shape in leaves_by_path(shapes).items()}
    mesh = mesh_of(target.params) if mesh is None else mesh
    places = [None] * len(wanted) if mesh is None else jax.tree.leaves(param_shardings(mesh, shapes))
    with contextlib.ExitStack() as stack:
        files = open_tensors(directory, stack) if wanted else {}
        if wrong := sorted(set(files) ^ set(wanted)):
            complaint = "is missing" if wrong[0] in wanted else "is unknown to its drafter.json"
            raise UserError(f"{directory}: tensor {wrong[0]} {complaint}")
        leaves = []
        for (name, shape), place in zip(wanted.items(), places, strict=True):
            kinds = ("I32",) if np.issubdtype(shape.dtype, np.integer) else FLOATS
            host = read_tensor(files[name], name, directory, transpose=False, kinds=kinds)
            if host.shape != shape.shape:
                raise UserError(
                    f"{directory}: tensor {name} has shape {list(host.shape)}, drafter.json implies {list(shape.shape)}"
                )
            leaves.append(place_tensor(np.asarray(host, dtype=shape.dtype), place))
    params = jax.tree.unflatten(jax.tree.structure(shapes), leaves)
    return drafter, drafter.fuse(params) if mesh is None else params


def write_tree(directory: str | Path, tree: Topology | TreePolicy) -> None:
    """Replaces the tree of a drafter directory, or the policy that makes its trees."""
    path = Path(directory) / "drafter.json"
    name = "tree" if isinstance(tree, Topology) else "policy"
    record = {**read_json(path), name: tree.to_record()}
    partial = path.with_name(".drafter.json.partial")
    try:
        write_json(partial, record)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def describe(drafter: Drafter) -> dict:
    """The JSON record of a drafter's static part; `build` is its inverse."""
    return drafter.to_record()


def build(record: dict, where: str) -> Drafter:
    """A drafter from its JSON record, which may also hold `base` and `provenance`.

    Raises:
      UserError: an unknown method, an unknown or missing entry, a hyper-parameter that the method does not have or of
        the wrong type, or a tree that is not closed.
    """
    return Drafter.from_record({key: value for key, value in record.items() if key not in BESIDES}, "", where)


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
