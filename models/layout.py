"""Who sees whom, said in structure instead of as a dense mask.

Every forward computes some *new rows* per batch row. A new row has a position (its place in the text, which RoPE and
sliding windows use), perhaps a segment (packed training documents do not see each other), and stands to the other new
rows in one of a few *orders*: causal, the ancestors of a draft tree, block-causal, or bidirectional inside blocks.
Beside the new rows lie other sources of keys (`models.attention.Sources`). The *prefix* is the KV cache, of which a new
row sees the slots below its *horizon*: the same for all rows in decoding, another for each where rows are packed that
continue different beginnings of a text. The *scratch* holds rows that an earlier forward of the same draft computed,
and the *memory* those of another text, which an encoder has read.

Slots and positions are different numbers. Row `i` of a draft tree would occupy slot `slots + i` but stands at position
`position + depth(i)`; positions, never slots, reach RoPE and windows. Attention derives from this the masks it needs.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Int


@struct.dataclass
class Causal:
    """A row sees itself and the rows before it."""

    def sees(self, rows: int) -> Bool[Array, "1 T T"]:
        """`[0, i, j]`: new row i sees new row j."""
        return jnp.tril(jnp.ones((rows, rows), bool))[None]


@struct.dataclass
class Tree:
    """A row sees itself and its ancestors, `ancestors[b, i, j]`."""

    ancestors: Bool[Array, "#B T T"]

    def sees(self, rows: int) -> Bool[Array, "#B T T"]:
        """`[b, i, j]`: new row i sees new row j."""
        return self.ancestors


@struct.dataclass
class BlockCausal:
    """A row sees its own block and the blocks before it: floor(j/k) <= floor(i/k), Falcon's relaxed causal mask (Gao et
    al. 2024).

    Attributes:
      size: k, rows of a block.
      phase: rows that the first block lacks, 0 to k - 1: row i lies in block (i + phase) // k. Decoding lines blocks up
        at the end of what is read; training draws the phase.
    """

    size: int = struct.field(pytree_node=False)
    phase: int | Int[Array, "*B"] = 0

    def sees(self, rows: int) -> Bool[Array, "#B T T"]:
        """`[b, i, j]`: new row i sees new row j."""
        block_BT = _blocks(rows, self.size, self.phase)
        return block_BT[:, None, :] <= block_BT[:, :, None]


@struct.dataclass
class Blocks:
    """A row sees its own block alone, in both directions, or only itself and what is before it there.

    Attributes:
      size: rows of a block.
      phase: rows that the first block lacks (`BlockCausal`).
      causal: rows see none after them.
      together: but the first so many of a block see each other; not where there is a phase.
    """

    size: int = struct.field(pytree_node=False)
    phase: int | Int[Array, "*B"] = 0
    causal: bool = struct.field(pytree_node=False, default=False)
    together: int = struct.field(pytree_node=False, default=0)

    def sees(self, rows: int) -> Bool[Array, "#B T T"]:
        """`[b, i, j]`: new row i sees new row j."""
        block_BT = _blocks(rows, self.size, self.phase)
        seen = block_BT[:, None, :] == block_BT[:, :, None]
        if not self.causal:
            return seen
        among = (jnp.arange(rows) % self.size < self.together)[None, None, :]
        return seen & (CAUSAL.sees(rows) | among)

    @property
    def inside(self) -> Bool[Array, "k k"]:
        """`sees` of the rows of one block."""
        return dataclasses.replace(self, phase=0).sees(self.size)[0]


def _blocks(rows: int, size: int, phase: int | Int[Array, "*B"]) -> Int[Array, "#B T"]:
    return (jnp.arange(rows, dtype=jnp.int32) + jnp.reshape(jnp.asarray(phase, jnp.int32), (-1, 1))) // size


Order = Causal | Tree | BlockCausal | Blocks
CAUSAL = Causal()


@struct.dataclass
class Layout:
    """Visibility of T new rows over themselves, a committed prefix of S slots and a scratch of R rows.

    Attributes:
      positions: place of each new row in its text, from 0.
      horizon: cache slots that a new row sees, counted from slot 0; `[B, 1]` where all rows see the same.
      since: the first slot that it sees, where the cache holds packed documents; None is slot 0.
      prefix_seen: slots of the cache that any row may see at all; None is all.
      order: who sees whom among the new rows, each itself included.
      segments: packed documents, 1, 2, ...; 0 is padding; None means one document per row.
      scratch_seen: `[b, i, r]` says that new row i sees row r of the scratch; None when there is no scratch.
      scratch_positions: where those rows stand.
      memory_seen: `[b, i, m]` says that new row i sees row m of the memory; None when there is no memory.
      prefix_positions: where the tokens in the cache's slots stand; None where slot and position agree.
      attention: "dense"; "split", which leaves the prefix to the library's attention; or for whole texts, and for many
        `Blocks` over a prefix, "blocks" or "fused", which keep no scores of all rows with all (`models/attention.py`).
    """

    positions: Int[Array, "B T"]
    horizon: Int[Array, "B #T"]
    order: Order = CAUSAL
    segments: Int[Array, "B T"] | None = None
    scratch_seen: Bool[Array, "#B T R"] | None = None
    scratch_positions: Int[Array, "B R"] | None = None
    memory_seen: Bool[Array, "B #T M"] | None = None
    prefix_positions: Int[Array, "B S"] | None = None
    since: Int[Array, "B #T"] | None = None
    prefix_seen: Bool[Array, "#B S"] | None = None
    attention: str = struct.field(pytree_node=False, default="dense")

    @classmethod
    def causal(
        cls, batch: int, rows: int, segments: Int[Array, "B T"] | None = None, attention: str = "dense"
    ) -> "Layout":
        """Whole texts from position 0; with `segments`, positions restart where a new document begins."""
        index_T = jnp.arange(rows, dtype=jnp.int32)
        if segments is None:
            positions_BT = jnp.broadcast_to(index_T, (batch, rows))
        else:
            begins_BT = jnp.concatenate([jnp.ones((batch, 1), bool), segments[:, 1:] != segments[:, :-1]], axis=1)
            start_BT = jnp.where(begins_BT, index_T, 0)
            positions_BT = index_T - jax.lax.cummax(start_BT, axis=1)
        return cls(positions_BT, jnp.zeros((batch, 1), jnp.int32), segments=segments, attention=attention)

    @classmethod
    def extend(
        cls, slots: Int[Array, "B"], rows: int, first: Int[Array, "B"] | None = None, attention: str = "dense"
    ) -> "Layout":
        """The next `rows` tokens behind a cache in which `slots` slots are used (a prefill chunk).

        They stand at positions `first` and on, by default those that the slots would give.
        """
        first = slots if first is None else first
        return cls(first[:, None] + jnp.arange(rows, dtype=jnp.int32), slots[:, None], attention=attention)

    @classmethod
    def encoder(cls, lengths: Int[Array, "B"], rows: int, attention: str = "dense") -> "Layout":
        """Texts of `lengths` tokens, each padded to `rows`, whose rows see all of their text, before and behind.

        Positions count from the middle of each text, as in Return of the Encoder: a rotation of queries and keys by
        one more angle changes no score, and angles half as large are rounded less.
        """
        index_T = jnp.arange(rows, dtype=jnp.int32)
        positions_BT = index_T - ((lengths - 1) // 2)[:, None]
        segments_BT = (index_T < lengths[:, None]).astype(jnp.int32)
        nothing = jnp.zeros((len(lengths), 1), jnp.int32)
        return cls(positions_BT, nothing, BlockCausal(rows), segments_BT, attention=attention)

    def sees_rows(self, window: int | Int[Array, ""] | None) -> Bool[Array, "#B T T"]:
        """`[b, i, j]`: new row i attends to new row j."""
        seen = self.order.sees(self.positions.shape[1])
        if self.segments is not None:
            seen = seen & (self.segments[:, :, None] == self.segments[:, None, :])
        return seen if window is None else seen & self._near(self.positions, window)

    def sees_from(self, first: int | Int[Array, ""], count: int, window: int | Int[Array, ""] | None):
        """`sees_rows` of `count` rows from row `first` on, (block-)causal; of what lies past the end, anything."""
        assert isinstance(self.order, Causal | BlockCausal), "only a causal order is cut into blocks"
        size, phase = (1, 0) if isinstance(self.order, Causal) else (self.order.size, self.order.phase)
        rows = self.positions.shape[1]
        index_Q = first + jnp.arange(count, dtype=jnp.int32)
        block_BT = _blocks(rows, size, phase)
        at_Q = jnp.minimum(index_Q, rows - 1)
        seen = block_BT[:, at_Q, None] >= block_BT[:, None, :]
        if self.segments is not None:
            seen = seen & (self.segments[:, at_Q, None] == self.segments[:, None, :])
        if window is not None:
            seen = seen & (self.positions[:, at_Q, None] - self.positions[:, None, :] < window)
        return seen

    def sees_scratch(self, window: int | Int[Array, ""] | None) -> Bool[Array, "#B T R"]:
        """`[b, i, r]`: new row i attends to row r of the scratch."""
        assert self.scratch_seen is not None and self.scratch_positions is not None
        return self.scratch_seen if window is None else self.scratch_seen & self._near(self.scratch_positions, window)

    def sees_memory(self) -> Bool[Array, "B #T M"]:
        """`[b, i, m]`: new row i attends to row m of the memory."""
        assert self.memory_seen is not None
        return self.memory_seen

    def sees_prefix(self, capacity: int, window: int | Int[Array, ""] | None) -> Bool[Array, "B #T S"]:
        """`[b, i, s]`: new row i attends to cache slot s."""
        slot_S = jnp.arange(capacity, dtype=jnp.int32)
        seen = slot_S < self.horizon[:, :, None]
        if self.since is not None:
            seen = seen & (slot_S >= self.since[:, :, None])
        if self.prefix_seen is not None:
            seen = seen & self.prefix_seen[:, None, :]
        if window is None:
            return seen
        return seen & self._near(slot_S[None] if self.prefix_positions is None else self.prefix_positions, window)

    def _near(self, positions: Int[Array, "#B K"], window: int | Int[Array, ""]) -> Bool[Array, "B T K"]:
        """Keys at `positions` that a sliding window reaches: a query at p sees p - window + 1 to p."""
        return self.positions[:, :, None] - positions[:, None, :] < window
