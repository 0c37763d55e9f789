"""Released weights of Medusa and Hydra as parameters of our heads, and what all releases of draft networks share.

Each function takes the tensors of one kind of release (`models.formats.release`) and the base that it was trained
on. What a file implies (heads, blocks, draft vocabulary) is read off its names and shapes and checked against the base;
a tensor that is missing, misshapen or unknown is a `UserError`. A table from our parameter paths to the released names
does the rest; kernels are transposed, because torch keeps them as [out, in].

RoPE in these releases rotates halves (i, i + D/2), as ours does, so projections keep their rows.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from models.config import TransformerConfig
from models.errors import UserError
from models.formats.hf import tensor_names
from models.formats.release import Release
from models.formats.storage import leaves_by_path
from models.formats.target import Target
from models.heads.eagle import LayerShape
from models.heads.hydra import HydraHeads
from models.heads.medusa import MedusaHeads, vocab_kernel
from models.linear import whole_table
from models.transformer import Params, split_projections

# Buffers that follow from the configuration, at whatever depth.
ROTARY = r"(.*\.)?rotary_emb\.inv_freq"
_PREFIX = "prefix_embeding_layer."  # so spelled in the release


@dataclasses.dataclass(frozen=True)
class Converted:
    """What came out of a release.

    Attributes:
      heads: shape of the heads, as `MedusaHeads`.
      params: their parameters on the host, every tensor in the dtype in which it was released.
      format: the kind of release, as `medusa v0.1`.
      detected: what the file alone could tell, by name.
      compared: the release repeats a part of its base, which was compared with the base that was given; without one
        nothing tells heads of one target from those of another of the same shape.
    """

    heads: Any
    params: Params
    format: str
    detected: dict[str, Any]
    compared: bool


# Medusa


def medusa(release: Release, base: Target) -> Converted:
    """Medusa heads (FasterDecoding/Medusa).

    v0.1 holds the heads alone, `{i}.{l}.linear` for the blocks of head i and `{i}.{m}` for its vocabulary map. v1.0 has
    the prefix `medusa_head.` and may be a whole model; its target must then be the base. Legacy (v2) has blocks alone,
    and every head maps to the vocabulary as the target does.

    Raises:
      UserError: a tensor is missing, misshapen, unknown, or differs from the base's.
    """
    prefix = "medusa_head." if any(name.startswith("medusa_head.") for name in release.names) else ""
    num_heads = _count(release, prefix, ".", "Medusa head")
    num_layers = _count(release, f"{prefix}0.", ".linear.", "residual block")
    own = f"{prefix}0.{num_layers}.weight" in release
    names, given = {}, {}
    for i in range(num_heads):
        for l in range(num_layers):
            names[f"heads/{i}/blocks/{l}/linear/kernel"] = f"{prefix}{i}.{l}.linear.weight"
            names[f"heads/{i}/blocks/{l}/linear/bias"] = f"{prefix}{i}.{l}.linear.bias"
        if own:
            names[f"heads/{i}/vocab/kernel"] = f"{prefix}{i}.{num_layers}.weight"
        else:
            given[f"heads/{i}/vocab/kernel"] = np.asarray(vocab_kernel(base.params))
    heads = MedusaHeads(num_heads, num_layers)
    params = assemble(release, heads, base, names, given)
    compared = bool(prefix) and _check_same_target(release, base)
    release.finish(ROTARY, "Medusa")
    detected = {"vocabulary_maps": "of the heads" if own else "of the base", **_tied(params, first=0)}
    version = "v1.0" if prefix else "v0.1" if own else "legacy"
    return Converted(heads, params, f"medusa {version}", detected, compared)


def _check_same_target(release: Release, base: Target) -> bool:
    """A whole model carries its target, which Medusa-2 trains along: its heads serve no other. Whether there is any."""
    before = len(release.names)
    leaves = leaves_by_path(split_projections(base.config, base.params))
    for path, name in tensor_names(base.config).items():
        if name in release and not same(take(release, name, path, leaves[path].shape, base), leaves[path]):
            raise UserError(
                f"{release.source} is a whole model whose own {name} differs from that of the base {base.path}: its "
                "heads were trained with another target"
            )
    if base.config.tied_embeddings:
        check_copy(release, "lm_head.weight", base)
    return len(release.names) < before


# Hydra


def hydra(release: Release, base: Target) -> Converted:
    """Hydra and Hydra++ heads (zankner/Hydra), those that read their path ("grounded").

    Releases count the dropout modules between blocks (`hydra_mlp.{i}.1`, `.3`, ... and `hydra_lm_head.{i}.1`) or not
    (`hydra_mlp.{i}.0`, `.1`, ... and `hydra_lm_head.{i}`). A `prefix_embeding_layer` makes them Hydra++. The released
    Hydra++ repeats one block, under several names or as equal tensors; our heads get a copy of it for each place.

    Raises:
      UserError: a tensor is missing, misshapen, unknown, or differs from the base's; or `config.json` asks for another
        architecture.
    """
    num_heads = _count(release, "hydra_mlp.", ".", "Hydra head")
    dropout = "hydra_lm_head.0.1.weight" in release
    places = release.numbers("hydra_mlp.0.", ".linear.")
    wanted = [2 * l + 1 if dropout else l for l in range(len(places))]
    if not places or places != wanted:
        raise UserError(f"{release.source}: blocks of hydra_mlp.0 stand at {places}, expected them at {wanted or [0]}")
    prefix = any(name.startswith(_PREFIX) for name in release.names)
    _check_hydra_config(release, num_heads, len(places), prefix)
    names = {}
    for i in range(num_heads):
        for l, j in enumerate(places):
            for ours, theirs in {"linear": "linear", "residual": "res_connection"}.items():
                if ours == "linear" or l == 0:
                    names[f"heads/{i}/blocks/{l}/{ours}/kernel"] = f"hydra_mlp.{i}.{j}.{theirs}.weight"
                    names[f"heads/{i}/blocks/{l}/{ours}/bias"] = f"hydra_mlp.{i}.{j}.{theirs}.bias"
        vocab = f"hydra_lm_head.{i}.1" if dropout else f"hydra_lm_head.{i}"
        names |= {f"heads/{i}/vocab/kernel": f"{vocab}.weight", f"heads/{i}/vocab/bias": f"{vocab}.bias"}
    if prefix:
        names |= {f"prefix/block/{path}": f"{_PREFIX}layers.0.{name}" for path, name in layer_names(base).items()}
        names["prefix/norm/scale"] = f"{_PREFIX}norm.weight"
    heads = HydraHeads(num_heads, len(places), prefix, _hydra_dropout(release, prefix and dropout))
    params = assemble(release, heads, base, names, {})
    compared = check_copy(release, "input_embed_fn.weight", base)
    release.finish(rf"{re.escape(_PREFIX)}embed_tokens\.weight|{ROTARY}", "Hydra")
    detected = {"dropout_layout": dropout, **_tied(params, first=1)}
    return Converted(heads, params, "hydra++" if prefix else "hydra", detected, compared)


def _hydra_dropout(release: Release, published: bool) -> float:
    """The rate at which the heads were trained: what `config.json` says, or, where they drop at all, the published."""
    rate = release.config.get("dropout_rate", 0.2 if published else 0.0)
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < 1:
        raise UserError(f"{release.source}: config.json says dropout_rate = {json.dumps(rate)}, expected 0 to 1")
    return float(rate)


def _check_hydra_config(release: Release, num_heads: int, num_layers: int, prefix: bool) -> None:
    implied = {
        "hydra_head_arch": "prefix-mlp" if prefix else "mlp",
        "hydra_num_heads": num_heads,
        "hydra_num_layers": num_layers,
        "grounded_heads": True,
        "hidden_state_offset": 0,
    }
    for key, value in implied.items():
        if release.config.get(key, value) != value:
            raise UserError(
                f"{release.source}: config.json says {key} = {json.dumps(release.config[key])}, where only "
                f"{json.dumps(value)} fits what can be read from its tensors"
            )


# What they share


def assemble(release: Release, heads: Any, base: Target, names: Mapping[str, str], given: Mapping[str, Any]) -> Params:
    """Parameters of `heads`: from `given`, or from the tensor that `names` has for their path."""
    shapes = _shapes(heads, base.config, *_abstract(base.params))
    leaves = []
    for path, shape in leaves_by_path(shapes).items():
        leaves.append(given[path] if path in given else take(release, names[path], path, shape.shape, base))
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def _abstract(params: Params) -> tuple[Any, tuple[jax.ShapeDtypeStruct, ...]]:
    """A tree's structure and the shapes of its leaves, which hash."""
    leaves, structure = jax.tree.flatten(params)
    return structure, tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves)


@functools.lru_cache(maxsize=64)
def _shapes(heads: Any, config: TransformerConfig, structure: Any, leaves: tuple[jax.ShapeDtypeStruct, ...]) -> Any:
    """Shapes of the parameters of `heads`, which take long to trace."""
    target = jax.tree.unflatten(structure, leaves)
    return jax.eval_shape(functools.partial(heads.init, config), target, jax.eval_shape(lambda: jax.random.key(0)))


def take(release: Release, name: str, path: str, shape: tuple[int, ...], base: Target) -> np.ndarray:
    """The tensor of a parameter, in our layout."""
    because = f"a base of width {base.config.width} and {base.config.vocab_size} tokens"
    if path.endswith("/kernel"):
        return release.take(name, shape[::-1], because).T
    return release.take(name, shape, because)


def layer_names(base: Target, layer: LayerShape | None = None) -> dict[str, str]:
    """Paths in one of our blocks -> names in a released one, of the base's kind or of that shape."""
    first, config = "layers/0/", base.config if layer is None else layer.of(base.config)
    names = tensor_names(dataclasses.replace(config, num_layers=1, windows=()))
    return {p.removeprefix(first): n.removeprefix("model.layers.0.") for p, n in names.items() if p.startswith(first)}


def check_copy(release: Release, name: str, base: Target) -> bool:
    """Some releases repeat the base's embedding. Ours read the base's own, so the copy may differ by rounding only.

    Returns:
      Whether this one does.
    """
    if name not in release:
        return False
    embedding = whole_table(base.params["embed"]["embedding"])
    if not same(take(release, name, "", embedding.shape, base), embedding):
        raise UserError(
            f"{release.source} was made for another target: its {name} is not the embedding of the base {base.path}"
        )
    return True


def same(a: Any, b: Any) -> bool:
    """Equal but for roundings to bfloat16 or float16."""
    return np.allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=2.0**-7, atol=1e-6)


def _tied(params: Params, first: int) -> dict[str, bool]:
    """Whether the blocks of every head from `first` on are equal; nothing where there is one such block."""
    repeated = [head["blocks"][first:] for head in params["heads"]]
    if len(repeated[0]) < 2:
        return {}
    equal = [
        all(jax.tree.leaves(jax.tree.map(np.array_equal, blocks[0], other)))
        for blocks in repeated
        for other in blocks[1:]
    ]
    return {"tied_blocks": all(equal)}


def _count(release: Release, before: str, after: str, what: str) -> int:
    """How many `what` there are: tensors are named by number, 0, 1, 2, ... without gaps."""
    numbers = release.numbers(before, after)
    if not numbers:
        found = f"it begins with {release.names[0]}" if release.names else "it holds no tensors"
        raise UserError(f"{release.source} holds no {what}, whose tensors would be named {before}0{after}...; {found}")
    if numbers[-1] >= len(numbers):
        gap = min(set(range(len(numbers))) - set(numbers))
        raise UserError(f"{release.source}: {what} {gap} is missing, although there is one numbered {numbers[-1]}")
    return len(numbers)
