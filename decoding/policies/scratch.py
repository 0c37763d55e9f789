"""The rows that a draft network ran in one step: keys and values beside its cache, until verification judged them."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Int

from decoding.cache import SLOTS, init_cache
from models.config import TransformerConfig
from models.layout import Blocks, Layout
from models.transformer import Cache


@struct.dataclass
class Scratch:
    """S slots of keys and values, and where their rows stand.

    Attributes:
      rows: per layer, as a cache of S slots.
      positions: of the rows.
    """

    rows: Cache
    positions: Int[Array, "B S"]

    @classmethod
    def empty(cls, config: TransformerConfig, batch: int, slots: int, dtype, layers: int | None = None) -> "Scratch":
        """A scratch of `slots` slots for `layers` layers (default: all)."""
        return cls(init_cache(config, batch, slots, dtype, layers), jnp.zeros((batch, slots), jnp.int32))

    def write(self, fresh: Cache, positions: Int[Array, "B M"], at: int) -> "Scratch":
        """With M fresh rows in the slots from `at` on."""

        def put(buffer, rows, axis):
            return jax.lax.dynamic_update_slice_in_dim(buffer, rows.astype(buffer.dtype), at, axis)

        rows = [
            {name: put(layer[name], new[name], axis) for name, axis in SLOTS.items()}
            for layer, new in zip(self.rows, fresh, strict=True)
        ]
        return dataclasses.replace(self, rows=rows, positions=put(self.positions, positions, 1))

    def layout(self, positions: Int[Array, "B M"], slots: Int[Array, "B"], seen: Bool[Array, "B M S"]) -> Layout:
        """For M rows that see `slots` slots of the cache, what `seen` says of the scratch, and each itself."""
        return Layout(positions, slots[:, None], Blocks(1), scratch_seen=seen, scratch_positions=self.positions)

    def take(self, slots: Int[Array, "B R"]) -> Cache:
        """The rows of the named slots, per layer, in that order."""

        def pick(buffer, axis):
            shape = [slots.shape[0], 1, 1, 1]
            shape[axis] = slots.shape[1]
            return jnp.take_along_axis(buffer, slots.reshape(shape), axis=axis)

        return [{name: pick(layer[name], axis) for name, axis in SLOTS.items()} for layer in self.rows]
