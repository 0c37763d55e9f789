"""The KV cache: per layer, keys `k` of shape [B, K, D, S] and values `v` of shape [B, K, S, D].

Committed rows fill the slots from 0, and nothing else is ever written below their number. A forward reads the cache and
returns fresh rows beside it; `commit` writes those that became text. What lies in later slots is never read.
"""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int, Shaped

from models.attention import Rows, StackedRows
from models.config import TransformerConfig
from models.sharding import fitted
from models.transformer import Cache

# Batch on `data`, heads on `tensor`: attention never needs another device's slots.
CACHE_SPEC = PartitionSpec("data", "tensor", None, None)


# The axis of slots in each buffer.
SLOTS = {"k": 3, "v": 2}


def init_cache(
    config: TransformerConfig, batch: int, capacity: int, dtype, layers: int | None = None, mesh: Mesh | None = None
) -> Cache:
    """An empty cache of `capacity` slots, sharded over `mesh` if there is one.

    Batch and heads are split as far as the mesh divides them; an axis that it does not divide is kept whole.
    """
    heads, dim = config.num_kv_heads, config.head_dim
    shapes = {"k": (batch, heads, dim, capacity), "v": (batch, heads, capacity, dim)}
    places = {name: None if mesh is None else fitted(mesh, CACHE_SPEC, shape) for name, shape in shapes.items()}
    count = config.num_layers if layers is None else layers
    # Keys and values in separate buffers: donating one buffer twice is an error.
    return [
        {name: jnp.zeros(shape, dtype, device=places[name]) for name, shape in shapes.items()} for _ in range(count)
    ]


def commit(
    cache: Cache,
    rows: list[Rows] | StackedRows,
    path: Int[Array, "B R"] | None,
    slots: Int[Array, "B"],
    after: Shaped[Array, "B *_"] | None = None,
) -> Cache:
    """Appends to each layer the fresh rows named by `path` (all of them, in order, when None), from slot `slots`.

    Rows past the accepted ones may follow; they land beyond what is in use, where nothing looks. The caller leaves room
    for all of them.

    Args:
      cache: one entry per layer.
      rows: fresh keys and values of each layer.
      path: which of them to write.
      slots: where to begin.
      after: something that could only be computed after every layer had read the cache: finite floats, or integers that
        are never negative. XLA then sees that all reads come first, and updates the buffers in place.
    """
    assert isinstance(rows, list), "caches in motion are lists of layers"
    if after is not None:
        slots = behind(slots, after)

    def append(name, buffer, fresh):
        axis = SLOTS[name]
        if path is not None:
            shape = [path.shape[0], 1, 1, 1]
            shape[axis] = path.shape[1]
            fresh = jnp.take_along_axis(fresh, path.reshape(shape), axis=axis)
        return _write(buffer, fresh.astype(buffer.dtype), slots, axis)

    return [
        {name: append(name, layer[name], fresh[name]) for name in SLOTS}
        for layer, fresh in zip(cache, rows, strict=True)
    ]


def behind(slots: Int[Array, "B *S"], after: Shaped[Array, "B *_"]) -> Int[Array, "B *S"]:
    """`slots`, computed from `after` in a way that no compiler sees through: see `commit`."""
    flat = after.reshape(after.shape[0], -1)
    if jnp.issubdtype(flat.dtype, jnp.floating):
        nothing = jnp.any(flat > jnp.inf, axis=1).astype(slots.dtype)
    else:
        nothing = jnp.minimum(flat[:, 0], 0).astype(slots.dtype)
    return slots + nothing.reshape(-1, *(1,) * (slots.ndim - 1))


def _write(buffer: Float[Array, "B K _ _"], rows: Float[Array, "B K _ _"], start: Int[Array, "B"], axis: int):
    if buffer.shape[0] == 1:
        return jax.lax.dynamic_update_slice_in_dim(buffer, rows, start[0], axis=axis)
    return jax.vmap(lambda b, r, s: jax.lax.dynamic_update_slice_in_dim(b, r, s, axis=axis - 1))(buffer, rows, start)
