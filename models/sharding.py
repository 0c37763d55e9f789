"""Meshes, and where every parameter lives on them.

Three axes: `data` splits the batch, `fsdp` splits parameters (and, in training, the batch too), `tensor` splits heads,
MLP channels and the vocabulary. A parameter's place follows from its path alone, by the first rule that matches.
"""

import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from models.errors import UserError

AXES = ("data", "fsdp", "tensor")

# Kernels are [in, out]: column-parallel products split `out` on `tensor`, the row-parallel ones after them split `in`.
RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"embed/embedding$", PartitionSpec("tensor", "fsdp")),
    (r"(head|vocab)/kernel$", PartitionSpec("fsdp", "tensor")),
    (r"attention/[qkv]/kernel$", PartitionSpec("fsdp", "tensor")),
    (r"attention/[qkv]/bias$", PartitionSpec("tensor")),
    (r"attention/o/kernel$", PartitionSpec("tensor", "fsdp")),
    (r"mlp/(gate|up)/kernel$", PartitionSpec("fsdp", "tensor")),
    (r"mlp/down/kernel$", PartitionSpec("tensor", "fsdp")),
    (r"", PartitionSpec()),
)


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices=None) -> Mesh:
    """A mesh over `devices` (default: all); one axis may be -1 and takes what is left.

    Raises:
      UserError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor]
    if sizes.count(-1) > 1:
        raise UserError(f"at most one mesh axis may be -1, got data={data}, fsdp={fsdp}, tensor={tensor}")
    if -1 in sizes:
        known = int(np.prod([size for size in sizes if size != -1]))
        sizes[sizes.index(-1)] = max(len(devices) // known, 1)
    if int(np.prod(sizes)) != len(devices):
        shape = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, (data, fsdp, tensor), strict=True))
        raise UserError(f"mesh {shape} does not cover the {len(devices)} devices present")
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def param_specs(params: Any) -> Any:
    """The PartitionSpec of every leaf, from its path; a leading axis of stacked layers stays whole."""

    def spec(path, leaf):
        name = "/".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path)
        found = next(rule for pattern, rule in RULES if re.search(pattern, name))
        return PartitionSpec(*(None,) * (leaf.ndim - len(found)), *found) if found else found

    return jax.tree_util.tree_map_with_path(spec, params)


def param_shardings(mesh: Mesh, params: Any) -> Any:
    """NamedShardings for a tree of arrays or ShapeDtypeStructs.

    An axis of a parameter that its mesh axis does not divide is kept whole.
    """
    specs = param_specs(params)

    def place(spec, leaf):
        return fitted(mesh, spec, leaf.shape)

    return jax.tree.map(place, specs, params, is_leaf=lambda x: isinstance(x, PartitionSpec))


def fitted(mesh: Mesh, spec: PartitionSpec, shape: Sequence[int]) -> NamedSharding:
    """The place that `spec` gives an array of `shape`, but an axis that its mesh axis does not divide is kept whole."""
    kept = [axis if axis and shape[i] % mesh.shape[axis] == 0 else None for i, axis in enumerate(spec)]
    return NamedSharding(mesh, PartitionSpec(*kept))
