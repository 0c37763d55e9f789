"""The KV cache: per layer, `k` and `v` of shape [B, K, S, D], heads before slots.

Slot s holds the committed token at position s and nothing else is ever written below `length`. A forward reads the cache
and returns fresh rows beside it; `commit` writes those that became text. What lies at or beyond `length` is never read.
"""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from models.config import TransformerConfig
from models.transformer import Cache, Rows

# Batch on `data`, heads on `tensor`: attention never needs another device's slots.
CACHE_SPEC = PartitionSpec("data", "tensor", None, None)


def init_cache(
    config: TransformerConfig, batch: int, capacity: int, dtype, layers: int | None = None, mesh: Mesh | None = None
) -> Cache:
    """An empty cache of `capacity` slots, sharded over `mesh` if there is one."""
    shape = (batch, config.num_kv_heads, capacity, config.head_dim)
    sharding = None if mesh is None else NamedSharding(mesh, CACHE_SPEC)
    count = config.num_layers if layers is None else layers
    # Keys and values in separate buffers: donating one buffer twice is an error.
    return [{name: jnp.zeros(shape, dtype, device=sharding) for name in ("k", "v")} for _ in range(count)]


def write_rows(
    buffer: Float[Array, "B K S D"], rows: Float[Array, "B K R D"], start: Int[Array, "B"]
) -> Float[Array, "B K S D"]:
    """Writes R rows from slot `start[b]` on, in place inside a jitted loop; the caller leaves R slots of room."""
    rows = rows.astype(buffer.dtype)
    if buffer.shape[0] == 1:
        return jax.lax.dynamic_update_slice_in_dim(buffer, rows, start[0], axis=2)
    return jax.vmap(lambda b, r, s: jax.lax.dynamic_update_slice_in_dim(b, r, s, axis=1))(buffer, rows, start)


def commit(cache: Cache, rows: list[Rows], path: Int[Array, "B R"] | None, length: Int[Array, "B"]) -> Cache:
    """Appends to each layer the fresh rows named by `path` (all of them, in order, when None), from slot `length`.

    Rows past the accepted ones may follow; they land beyond the new length, where nothing looks.
    """

    def pick(fresh):
        return fresh if path is None else jnp.take_along_axis(fresh, path[:, None, :, None], axis=2)

    return [
        {name: write_rows(layer[name], pick(fresh[name]), length) for name in ("k", "v")}
        for layer, fresh in zip(cache, rows, strict=True)
    ]
