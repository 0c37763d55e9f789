"""From target logits to the token that is emitted.

The warps make up the *target distribution*, with respect to which everything here is lossless: temperature, then top-k,
top-p and min-p, each on what the one before left. It is evaluated for one node at a time, only where verification asks.
Draws are keyed by request and absolute position, so a drafter that changes how many steps a text takes does not change
its text.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from models.errors import UserError


@struct.dataclass
class Warps:
    """Sampling settings, one per batch row, traced; which of them are in force is static.

    Attributes:
      temperature: 0 means argmax.
      top_k: tokens kept; 0 means all.
      top_p: probability mass kept.
      min_p: tokens below `min_p` times the largest probability are dropped.
      greedy: every row has temperature 0.
      sorts: some row uses top-k or top-p, which need a sort of the vocabulary.
    """

    temperature: Float[Array, "B"]
    top_k: Int[Array, "B"]
    top_p: Float[Array, "B"]
    min_p: Float[Array, "B"]
    greedy: bool = struct.field(pytree_node=False)
    sorts: bool = struct.field(pytree_node=False)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """What a person asks for: one setting for a request.

    Raises:
      UserError: a value outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self):
        for name, ok, range_text in (
            ("temperature", self.temperature >= 0, "0 or more"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("min_p", 0 <= self.min_p < 1, "in [0, 1)"),
        ):
            if not ok:
                raise UserError(f"{name} must be {range_text}, got {getattr(self, name)}")


def batch_warps(settings: list[Sampling]) -> Warps:
    """Stacks the requests' settings into arrays of batch rows."""
    return Warps(
        temperature=jnp.array([s.temperature for s in settings], jnp.float32),
        top_k=jnp.array([s.top_k for s in settings], jnp.int32),
        top_p=jnp.array([s.top_p for s in settings], jnp.float32),
        min_p=jnp.array([s.min_p for s in settings], jnp.float32),
        greedy=all(s.temperature == 0 for s in settings),
        sorts=any(s.temperature > 0 and (s.top_k > 0 or s.top_p < 1) for s in settings),
    )


def argmax(x: Float[Array, "*B V"]) -> Int[Array, "*B"]:
    """First index of the maximum over the last axis; two reductions, which XLA's CPU back end vectorises (its own
    argmax takes about six times as long)."""
    size = x.shape[-1]
    index_V = jnp.arange(size, dtype=jnp.int32)
    return jnp.min(jnp.where(x == jnp.max(x, axis=-1, keepdims=True), index_V, size - 1), axis=-1)


def warp_logits(logits: Float[Array, "B V"], warps: Warps) -> Float[Array, "B V"]:
    """Log-probabilities, up to a constant, of the target distribution; dropped tokens are -inf.

    Ties at a threshold are kept. Rows of temperature 0 are left at temperature 1: `draw` takes their argmax.
    """
    dtype = logits.dtype
    temperature = jnp.where(warps.temperature > 0, warps.temperature, 1.0).astype(dtype)
    x = logits / temperature[:, None]
    if warps.sorts:
        descending = -jnp.sort(-x, axis=-1)
        size = x.shape[-1]
        kept = jnp.where(warps.top_k > 0, jnp.minimum(warps.top_k, size), size)
        inside = jnp.arange(size) < kept[:, None]
        p = jax.nn.softmax(jnp.where(inside, descending, -jnp.inf), axis=-1)
        before = jnp.cumsum(p, axis=-1) - p
        # top_p = 1 must keep everything even where rounding lifts the running sum to 1 before the end.
        inside &= (before < warps.top_p[:, None].astype(dtype)) | (warps.top_p[:, None] >= 1)
        last = jnp.sum(inside, axis=-1, keepdims=True) - 1
        x = jnp.where(x >= jnp.take_along_axis(descending, last, axis=-1), x, -jnp.inf)
    floor = jnp.max(x, axis=-1) + jnp.log(warps.min_p.astype(dtype))
    return jnp.where(x >= floor[:, None], x, -jnp.inf)


def draw(logits: Float[Array, "B V"], warps: Warps, keys: Array, positions: Int[Array, "B"]) -> Int[Array, "B"]:
    """The target's token at `positions`, one per row: argmax at temperature 0, else a draw keyed by row and position.

    Args:
      logits: target logits at the position before.
      warps: sampling settings.
      keys: typed PRNG keys `[B]`, one per request.
      positions: absolute position that the token will take.
    """
    best = argmax(logits)
    if warps.greedy:
        return best
    noise = jax.vmap(lambda k, p: jax.random.gumbel(jax.random.fold_in(k, p), logits.shape[-1:], logits.dtype))(
        keys, positions
    )
    return jnp.where(warps.temperature > 0, argmax(warp_logits(logits, warps) + noise), best)


def best_tokens(logits: Float[Array, "*B V"], count: int) -> Int[Array, "*B K"]:
    """The `count` best tokens, best first."""
    if count == 1:
        return argmax(logits)[..., None]
    return jax.lax.top_k(logits, count)[1].astype(jnp.int32)
