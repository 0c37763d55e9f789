"""Meshes, and where every parameter lives on them.

Three axes: `data` splits the batch, `fsdp` splits parameters (and, in training, the batch too), `tensor` splits heads,
MLP channels and the vocabulary. A parameter's place follows from its path alone, by the first rule that matches. What
belongs to a batch row lies where the row does.
"""

import contextlib
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from models.errors import UserError

AXES = ("data", "fsdp", "tensor")
T = TypeVar("T")

# The axes that split the batch in training.
BATCH = ("data", "fsdp")

# The first axis of everything that there is once per batch row in decoding.
ROWS = PartitionSpec("data")

# Kernels are [in, out]: column-parallel products split `out` on `tensor`, the row-parallel ones after them split `in`.
RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"(embed/embedding|selector/(predecessor|successor))$", PartitionSpec("tensor", "fsdp")),
    (r"(head|vocab)/kernel$", PartitionSpec("fsdp", "tensor")),
    (r"attention/[qkv]/kernel$", PartitionSpec("fsdp", "tensor")),
    (r"attention/[qkv]/bias$", PartitionSpec("tensor")),
    (r"attention/o/kernel$", PartitionSpec("tensor", "fsdp")),
    (r"mlp/(gate|up)/kernel$", PartitionSpec("fsdp", "tensor")),
    (r"mlp/down/kernel$", PartitionSpec("tensor", "fsdp")),
    (r"blocks/\d+/(linear|residual)/kernel$", PartitionSpec("fsdp", None)),
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
    types = (AxisType.Auto,) * 3
    try:
        mesh = jax.make_mesh(tuple(sizes), AXES, axis_types=types, devices=devices)
    except NotImplementedError:  # Of a network of chips on which these axes cannot be laid.
        mesh = None
    if mesh is None or owners_of_a_row(mesh.devices) > 1:
        # `tensor` may have been laid across processes, though it would fit into each.
        mesh = Mesh(by_process(devices).reshape(sizes), AXES, axis_types=types)
    return mesh


def by_process(devices: Sequence[Any]) -> np.ndarray:
    """Devices, those of a process side by side."""
    return np.array(sorted(devices, key=lambda device: (device.process_index, device.id)))


def with_whole_rows(mesh: Mesh) -> Mesh:
    """The mesh. Raises UserError where a batch row lies on several processes: each would read another one for it."""
    if (owners := owners_of_a_row(mesh.devices)) > 1:
        size = mesh.devices.shape[-1]
        raise UserError(
            f"mesh.tensor ({size}) spreads a row of the batch over {owners} processes, and each reads rows of its own: "
            "it must divide the number of a process's devices"
        )
    return mesh


def owners_of_a_row(devices: np.ndarray) -> int:
    """On how many processes a batch row of a mesh's devices `[data, fsdp, tensor]` lies at most."""
    rows = devices.reshape(-1, devices.shape[-1])
    return max(len({device.process_index for device in of_row}) for of_row in rows)


def parse_mesh(text: str) -> Mesh:
    """A mesh from `data=2,tensor=4`: over as many of this process's devices as the axes multiply to; -1 takes what is
    left.

    Raises:
      UserError: an axis that does not exist, a size that is no number, or more devices than there are.
    """
    sizes = {"data": 1} | mesh_sizes(text)
    devices = jax.local_devices()
    if -1 not in sizes.values():
        devices = devices[: int(np.prod(list(sizes.values())))]
    return make_mesh(**sizes, devices=devices)


def mesh_sizes(text: str) -> dict[str, int]:
    """Axis -> size of `data=2,tensor=4`, whatever devices there are. Raises UserError as `parse_mesh` does."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = part.strip().partition("=")
        if axis not in AXES or axis in sizes or not re.fullmatch(r"-1|[1-9]\d*", size):
            raise UserError(f"mesh {text!r} is not a list of sizes of {', '.join(AXES)}, such as data=2,tensor=4")
        sizes[axis] = int(size)
    return sizes


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


def place_params(mesh: Mesh, params: T) -> T:
    """Parameters moved to where `RULES` put them; a target's must not be joined (`models.transformer`)."""
    return jax.device_put(params, param_shardings(mesh, params))


def place_rows(mesh: Mesh, tree: T) -> T:
    """Arrays whose first axis is the batch, moved to the devices of their rows; what is split over the mesh stays.

    What `jnp.zeros` makes while a mesh is set lies whole on each of its devices, and programs are compiled for where
    their arguments lie: it is moved too, to where programs leave it.
    """

    def place(leaf):
        where = getattr(leaf, "sharding", None)
        if isinstance(where, NamedSharding) and where.mesh == mesh and not where.is_fully_replicated:
            return leaf
        return jax.device_put(leaf, fitted(mesh, ROWS, leaf.shape))

    return jax.tree.map(place, tree)


def mesh_of(params: Any) -> Mesh | None:
    """The mesh that parameters were placed on, None for a single device."""
    places = [leaf.sharding for leaf in jax.tree.leaves(params) if isinstance(leaf, jax.Array)]
    found = [place.mesh for place in places if isinstance(place, NamedSharding) and isinstance(place.mesh, Mesh)]
    return found[0] if found and found[0].size > 1 else None


def check_placed(mesh: Mesh, params: Any, what: str) -> None:
    """Raises UserError when an array of `what` does not lie on exactly the devices of `mesh`."""
    devices = set(mesh.devices.flat)
    for leaf in jax.tree.leaves(params):
        if isinstance(leaf, jax.Array) and leaf.sharding.device_set != devices:
            raise UserError(
                f"{what} are not on the mesh of {mesh.size} devices: load them with this mesh, or move them there with "
                "models.sharding.place_params"
            )


def on_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    """Within it, what is compiled knows its mesh, so that `row_wise` splits; without a mesh, nothing changes."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def keep_rows(tree: T) -> T:
    """In a jitted function: arrays whose first axis is the batch, held to the devices of their rows.

    Left alone, XLA may hand back what went in split as copies on all devices, and the next call compiles anew.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return tree

    def keep(leaf):
        rest = [PartitionSpec.UNCONSTRAINED] * (leaf.ndim - 1)
        rows = ROWS[0] if leaf.shape[0] % mesh.shape[ROWS[0]] == 0 else None
        return jax.lax.with_sharding_constraint(leaf, PartitionSpec(rows, *rest))

    return jax.tree.map(keep, tree)


def keep_batch(x: jax.Array) -> jax.Array:
    """In a jitted training step: an array whose first axis is the batch, held to the devices of its rows.

    Parameters that are split over `fsdp` are then gathered to where the rows are. Left alone, XLA may gather the rows
    instead, and every device would compute the whole batch.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or AxisType.Manual in mesh.axis_types or x.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]):
        return x
    rest = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH, *rest))


def split_vocabulary(logits: jax.Array) -> jax.Array:
    """In a jitted function: what a head split over `tensor` scores `[..., V]`, held split in the same way.

    Where all scores are wanted, XLA might else copy all of the head to every device to compute them there.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or AxisType.Manual in mesh.axis_types or logits.shape[-1] % mesh.shape["tensor"]:
        return logits
    before = [PartitionSpec.UNCONSTRAINED] * (logits.ndim - 1)
    return jax.lax.with_sharding_constraint(logits, PartitionSpec(*before, "tensor"))


def gather_rows(x: jax.Array) -> jax.Array:
    """In a jitted function: an array whose first axis is the batch, whole on each of the devices of its rows."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or AxisType.Manual in mesh.axis_types:
        return x
    rows = ROWS[0] if x.shape[0] % mesh.shape[ROWS[0]] == 0 else None
    return jax.lax.with_sharding_constraint(x, PartitionSpec(rows))


def head_wise(function: Callable[..., jax.Array], by_head: Sequence[jax.Array], by_row: jax.Array) -> jax.Array:
    """In a jitted training step: `function(*by_head, by_row)`, run by every device on its own rows and heads.

    Args:
      function: takes and returns arrays `[B, K, ...]` of independent rows and heads, and what rows have once.
      by_head: `[B, K, ...]`, rows split over `data` and `fsdp` and heads over `tensor`, where these divide them.
      by_row: `[B, ...]`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or AxisType.Manual in mesh.axis_types:
        return function(*by_head, by_row)
    rows, heads = by_head[0].shape[:2]
    whole = rows % (mesh.shape["data"] * mesh.shape["fsdp"])
    place = PartitionSpec(None if whole else BATCH, None if heads % mesh.shape["tensor"] else "tensor")
    specs = (*[place] * len(by_head), PartitionSpec(place[0]))
    return jax.shard_map(function, in_specs=specs, out_specs=place, check_vma=False)(*by_head, by_row)


def row_wise(function: Callable[..., T], *arrays: Any) -> T:
    """`function(*arrays)`, run by every device on its own batch rows: nothing in it talks to another device.

    For what XLA does not keep apart by itself, though no batch row depends on another: `top_k` gathers the batch, sorts
    and scans over a split vocabulary take a collective each. Here an axis that is split over `tensor` is gathered once,
    on the way in. Outside `on_mesh`, or already inside another `row_wise`, it is a plain call.

    Args:
      function: takes and returns arrays whose first axis is the batch, or 1 for what all rows share.
      arrays: pytrees of them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or AxisType.Manual in mesh.axis_types:
        return function(*arrays)
    batch = max(leaf.shape[0] for leaf in jax.tree.leaves(arrays))
    rows = ROWS if batch % mesh.shape[ROWS[0]] == 0 else PartitionSpec()
    shared = PartitionSpec()
    specs = jax.tree.map(lambda leaf: rows if leaf.shape[0] == batch else shared, arrays)
    return jax.shard_map(function, in_specs=specs, out_specs=rows, check_vma=False)(*arrays)
