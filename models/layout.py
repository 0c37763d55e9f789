"""Who sees whom, said in structure instead of as a dense mask.

Every forward computes some *new rows* per batch row. A new row has a position (its place in the text, which RoPE and
sliding windows use), perhaps a segment (packed training documents do not see each other), and a relation to the other
new rows: causal, or the ancestor matrix of a draft tree. Beside the new rows lies the *prefix*: the first `length`
slots of the KV cache, whose slot number is their position, because only committed tokens are ever written there.

Row `i` of a draft tree would occupy slot `length + i` but stands at position `length + depth(i)`; positions, never
slots, reach RoPE and windows. Attention derives from this the two masks it needs.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Int


@struct.dataclass
class Layout:
    """Visibility of T new rows over themselves and over a committed prefix.

    Attributes:
      positions: place of each new row in its text, in tokens from 0.
      length: committed tokens in the cache, per batch row.
      ancestors: `[b, i, j]` says that new row i sees new row j (itself included); None means causal order.
      segments: packed documents, 1, 2, ...; 0 is padding; None means one document per row.
      scratch_seen: `[b, i, s]` says that new row i sees row s of the scratch, rows that an earlier forward of the same
        draft computed; None when there is no scratch.
      scratch_positions: where those rows stand.
      attention: "dense", or "split", which leaves the prefix to the library's attention (`models/attention.py`).
    """

    positions: Int[Array, "B T"]
    length: Int[Array, "B"]
    ancestors: Bool[Array, "#B T T"] | None = None
    segments: Int[Array, "B T"] | None = None
    scratch_seen: Bool[Array, "#B T S"] | None = None
    scratch_positions: Int[Array, "B S"] | None = None
    attention: str = struct.field(pytree_node=False, default="dense")

    @classmethod
    def causal(cls, batch: int, rows: int, segments: Int[Array, "B T"] | None = None) -> "Layout":
        """Whole texts from position 0; with `segments`, positions restart where a new document begins."""
        index_T = jnp.arange(rows, dtype=jnp.int32)
        if segments is None:
            positions_BT = jnp.broadcast_to(index_T, (batch, rows))
        else:
            begins_BT = jnp.concatenate([jnp.ones((batch, 1), bool), segments[:, 1:] != segments[:, :-1]], axis=1)
            start_BT = jnp.where(begins_BT, index_T, 0)
            positions_BT = index_T - jax.lax.cummax(start_BT, axis=1)
        return cls(positions_BT, jnp.zeros(batch, jnp.int32), segments=segments)

    @classmethod
    def extend(cls, length: Int[Array, "B"], rows: int, attention: str = "dense") -> "Layout":
        """The next `rows` tokens of texts whose first `length` tokens are in the cache (a prefill chunk)."""
        positions_BT = length[:, None] + jnp.arange(rows, dtype=jnp.int32)
        return cls(positions_BT, length, attention=attention)

    def sees_rows(self, window: int | Int[Array, ""] | None) -> Bool[Array, "B T T"]:
        """`[b, i, j]`: new row i attends to new row j."""
        rows = self.positions.shape[1]
        if self.ancestors is None:
            seen = jnp.tril(jnp.ones((rows, rows), bool))[None]
        else:
            seen = self.ancestors
        if self.segments is not None:
            seen = seen & (self.segments[:, :, None] == self.segments[:, None, :])
        if window is not None:
            seen = seen & (self.positions[:, :, None] - self.positions[:, None, :] < window)
        return seen

    def sees_scratch(self, window: int | Int[Array, ""] | None) -> Bool[Array, "B T S"]:
        """`[b, i, s]`: new row i attends to row s of the scratch."""
        assert self.scratch_seen is not None and self.scratch_positions is not None
        if window is None:
            return self.scratch_seen
        near = self.positions[:, :, None] - self.scratch_positions[:, None, :] < window
        return self.scratch_seen & near

    def sees_prefix(self, capacity: int, window: int | Int[Array, ""] | None) -> Bool[Array, "B #T S"]:
        """`[b, i, s]`: new row i attends to cache slot s, which holds the committed token at position s."""
        slot_S = jnp.arange(capacity, dtype=jnp.int32)
        seen = (slot_S < self.length[:, None])[:, None, :]
        if window is not None:
            seen = seen & (self.positions[:, :, None] - slot_S < window)
        return seen
