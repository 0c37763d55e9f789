"""From target logits to the token that is emitted.

The sampling parameters make up the *target distribution*, with respect to which everything here is lossless:
temperature, then top-k, top-p and min-p, each on what the one before left. It is evaluated for one node at a time,
only where verification asks. Draws are keyed by request and text index, so a drafter that changes how many
steps a text takes does not change its text.
"""

import dataclasses
import functools
import numbers
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int, Real

from models.errors import UserError
from models.sharding import row_wise


@struct.dataclass
class SamplingParameters:
    """Sampling settings, one per batch row, traced; which of them are in force is static.

    Attributes:
      temperature: 0 means argmax.
      top_k: tokens kept; 0 means all.
      top_p: probability mass kept.
      min_p: tokens below `min_p` times the largest probability are dropped.
      greedy: every row has temperature 0.
      cuts: some row uses top-k or top-p.
    """

    temperature: Float[Array, "B"]
    top_k: Int[Array, "B"]
    top_p: Float[Array, "B"]
    min_p: Float[Array, "B"]
    greedy: bool = struct.field(pytree_node=False)
    cuts: bool = struct.field(pytree_node=False)

    @property
    def of_any_mode(self) -> "SamplingParameters":
        """The same, without what is static: for programs that run once and need not be compiled for every mode."""
        return dataclasses.replace(self, greedy=False, cuts=True)


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
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            kind, noun = (numbers.Integral, "a whole number") if field.name == "top_k" else (numbers.Real, "a number")
            if isinstance(value, np.ndarray | jax.Array) and value.ndim == 0:
                value = value.item()
                object.__setattr__(self, field.name, value)
            if not isinstance(value, kind) or isinstance(value, bool):
                raise UserError(f"{field.name} must be {noun}, got {value!r}")
        for name, ok, range_text in (
            # Beyond these, scores over a temperature leave float32.
            ("temperature", self.temperature == 0 or 1e-6 <= self.temperature <= 1e6, "0, or from 1e-6 to 1e6"),
            ("top_k", 0 <= self.top_k < 2**31, "0 (off) or more, and less than 2^31"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("min_p", 0 <= self.min_p < 1, "in [0, 1)"),
        ):
            if not ok:
                raise UserError(f"{name} must be {range_text}, got {getattr(self, name)}")


def batch_sampling(settings: list[Sampling]) -> SamplingParameters:
    """Stacks the requests' settings into arrays of batch rows."""
    return SamplingParameters(
        temperature=jax.device_put(np.array([s.temperature for s in settings], np.float32)),
        top_k=jax.device_put(np.array([s.top_k for s in settings], np.int32)),
        top_p=jax.device_put(np.array([s.top_p for s in settings], np.float32)),
        min_p=jax.device_put(np.array([s.min_p for s in settings], np.float32)),
        greedy=all(s.temperature == 0 for s in settings),
        cuts=any(s.temperature > 0 and (s.top_k > 0 or s.top_p < 1) for s in settings),
    )


def argmax(x: Real[Array, "*B V"]) -> Int[Array, "*B"]:
    """First index of the maximum over the last axis; two reductions, which XLA's CPU back end vectorises (its own
    argmax takes about six times as long)."""
    size = x.shape[-1]
    index_V = jnp.arange(size, dtype=jnp.int32)
    return jnp.min(jnp.where(x == jnp.max(x, axis=-1, keepdims=True), index_V, size - 1), axis=-1)


def apply_sampling(logits: Float[Array, "B V"], sampling: SamplingParameters) -> Float[Array, "B V"]:
    """Log-probabilities, up to a constant, of the target distribution; dropped tokens are -inf.

    Ties at a threshold are kept. Rows of temperature 0 are left at temperature 1: `draw` takes their argmax.
    """
    dtype = logits.dtype
    temperature = jnp.where(sampling.temperature > 0, sampling.temperature, 1.0).astype(dtype)
    x = logits / temperature[:, None]
    x = filtered(x, sampling)
    floor = jnp.max(x, axis=-1) + jnp.log(sampling.min_p.astype(dtype))
    return jnp.where(x >= floor[:, None], x, -jnp.inf)


def filtered(x: Float[Array, "B V"], sampling: SamplingParameters) -> Float[Array, "B V"]:
    """`x` with what top-k, and top-p on what that leaves, drop at -inf; ties at a threshold are kept."""
    if not sampling.cuts:
        return x
    x = jax.lax.cond(jnp.any(sampling.top_k > 0), _keep_top_k, lambda x, _: x, x, sampling)
    return jax.lax.cond(jnp.any(sampling.top_p < 1), _keep_top_p, lambda x, _: x, x, sampling)


def target_probabilities(logits: Float[Array, "B V"], sampling: SamplingParameters) -> Float[Array, "B V"]:
    """The target distribution itself; at temperature 0 all of it lies on the argmax."""
    best = argmax(logits)[:, None] == jnp.arange(logits.shape[-1], dtype=jnp.int32)
    if sampling.greedy:
        return best.astype(logits.dtype)
    p = jax.nn.softmax(apply_sampling(logits, sampling), axis=-1)
    return jnp.where(sampling.temperature[:, None] > 0, p, best)


def _keep_top_k(x: Float[Array, "B V"], sampling: SamplingParameters) -> Float[Array, "B V"]:
    size = x.shape[-1]
    need = jnp.where(sampling.top_k > 0, jnp.minimum(sampling.top_k, size), size)
    bits = jax.lax.bitcast_convert_type(x, _integer(x.dtype))
    # The order of floats, once the magnitude bits of negative ones are flipped.
    order_BV = jnp.where(bits < 0, bits ^ jnp.iinfo(bits.dtype).max, bits)

    def above(threshold_B):
        return jnp.sum(order_BV >= threshold_B[:, None], axis=-1, dtype=x.dtype)

    threshold_B = _threshold(above, need.astype(x.dtype))
    return jnp.where(order_BV >= threshold_B[:, None], x, -jnp.inf)


def _keep_top_p(x: Float[Array, "B V"], sampling: SamplingParameters) -> Float[Array, "B V"]:
    # Computed once: the threshold is one of these very numbers.
    mass_BV = jax.lax.optimization_barrier(jax.nn.softmax(x, axis=-1))

    def floor_B1(threshold_B):
        # Of what is not negative the bits are in order as they are.
        return jax.lax.bitcast_convert_type(threshold_B, x.dtype)[:, None]

    def above(threshold_B):
        return jnp.sum(jnp.where(mass_BV >= floor_B1(threshold_B), mass_BV, 0), axis=-1)

    need = jnp.maximum(sampling.top_p.astype(x.dtype) * jnp.sum(mass_BV, axis=-1), jnp.finfo(x.dtype).tiny)
    threshold_B = _threshold(above, need)
    # Scores that rounding gives equal masses are ties. Where top_p is 1 everything stays, even what rounding cannot see
    # in the sum.
    return jnp.where((mass_BV >= floor_B1(threshold_B)) | (sampling.top_p[:, None] >= 1), x, -jnp.inf)


def _integer(dtype) -> np.dtype:
    return np.dtype("int64" if dtype == jnp.float64 else "int32")


def _threshold(above: Callable[[Array], Array], need: Float[Array, "B"]) -> Int[Array, "B"]:
    """The largest integers at which `above`, which must not rise with them, is at least `need`; the least if nowhere.

    They are found bit by bit: exact, and about 25 times as fast as sorting a vocabulary of 32,000 on a CPU. Time goes
    into the memory that `above` reads. Negative ones are tried only where 0 is too large.
    """
    kind = _integer(need.dtype)

    def raised(threshold_B, trial_B):
        return jnp.where(above(trial_B) >= need, trial_B, threshold_B)

    def body(i, threshold_B):
        return raised(threshold_B, threshold_B + jnp.left_shift(jnp.ones((), kind), jnp.iinfo(kind).bits - 2 - i))

    lowest_B = jnp.full(need.shape, jnp.iinfo(kind).min, kind)
    threshold_B = raised(lowest_B, jnp.zeros_like(lowest_B))
    return jax.lax.fori_loop(0, jnp.iinfo(kind).bits - 1, body, threshold_B)


def draw(
    logits: Float[Array, "B V"], sampling: SamplingParameters, keys: Array, indices: Int[Array, "B"]
) -> Int[Array, "B"]:
    """The target's token at `indices`, one per row: argmax at temperature 0, else a draw keyed by row and text index.

    V, which is no token, stands for logits that are not finite.

    Args:
      logits: target logits at the token before.
      sampling: sampling settings.
      keys: typed PRNG keys `[B]`, one per request.
      indices: text index that the token will have.
    """
    return row_wise(_draw, logits, sampling, keys, indices)


def _draw(logits, sampling, keys, indices):
    best = argmax(logits)
    if sampling.greedy:
        return unless_broken(logits, best)
    drawn = argmax(apply_sampling(logits, sampling) + noise(keys, indices, logits.shape[-1], logits.dtype))
    return unless_broken(logits, jnp.where(sampling.temperature > 0, drawn, best))


def unless_broken(logits: Float[Array, "B V"], token: Int[Array, "B"]) -> Int[Array, "B"]:
    """`token`, or V, which is no token, in rows whose logits hold NaN or infinity.

    It costs nothing: the maximum is one that `argmax` takes anyway, and V ends a text as an end token does
    (`decoding/generate.py`).
    """
    return jnp.where(jnp.isfinite(jnp.max(logits, axis=-1)), token, logits.shape[-1])


def noise(keys: Array, indices: Int[Array, "B"], size: int, dtype) -> Float[Array, "B V"]:
    """Gumbel noise for one draw at `indices`."""
    return jax.vmap(lambda k, p: jax.random.gumbel(jax.random.fold_in(k, p), (size,), dtype))(keys, indices)


def invert(mass: Float[Array, "B V"], uniform: Float[Array, "B 2"]) -> Int[Array, "B"]:
    """Draws from `mass`, unnormalised, by inverting its running sum, and never a place that has none.

    One random number says which block of places, the other which place of it, where Gumbel noise would take one for
    each place; 0 for both takes the first place with any mass.
    """
    padded = jnp.pad(mass, [(0, 0), (0, -mass.shape[1] % _BLOCK)])
    blocks = padded.reshape(len(mass), -1, _BLOCK)
    block = _first_past(jnp.sum(blocks, axis=-1), uniform[:, 0])
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return block * _BLOCK + _first_past(inside, uniform[:, 1])


def _first_past(mass, uniform):
    running = jnp.cumsum(mass, axis=-1)
    past = running > uniform[:, None] * running[:, -1:]
    # Sums round: should none with mass be past its share, the first one is taken.
    return argmax(jnp.where(mass > 0, 1 + past.astype(jnp.int32), 0))


# Folded into a request's key for drafters, in the place where the verifier folds in a position: no text is that long.
_DRAFTS = 2**32 - 1

# Tokens per block of `best_logits` and `invert`.
_BLOCK = 64


def draft_keys(keys: Array, length: Int[Array, "B"]) -> Array:
    """Keys for the draws of drafters, `[B]`: fresh in every step, since `length` grows, and never the verifier's."""
    return jax.vmap(lambda key, n: jax.random.fold_in(jax.random.fold_in(key, np.uint32(_DRAFTS)), n))(keys, length)


def best_tokens(logits: Float[Array, "*B V"], count: int) -> Int[Array, "*B K"]:
    """The `count` best tokens, best first, the smaller of equals before the larger."""
    return best_logits(logits, count)[1]


def best_logits(logits: Float[Array, "*B V"], count: int) -> tuple[Float[Array, "*B K"], Int[Array, "*B K"]]:
    """The `count` largest logits, largest first, and their tokens, the smaller of equals before the larger.

    The k largest lie in the k blocks with the largest maxima. Maxima vectorise where XLA's CPU top-k does not: 81 rows
    of 32,000 take 0.5 ms this way instead of 3.8.
    """
    if count == 1:
        best = argmax(logits)[..., None]
        return jnp.take_along_axis(logits, best, axis=-1), best
    return row_wise(functools.partial(_best_logits, count), logits)


def top_k(x: Real[Array, "B *M"], count: int) -> tuple[Real[Array, "B *K"], Int[Array, "B *K"]]:
    """`jax.lax.top_k` that leaves every batch row on its devices, where XLA would gather the batch."""
    values, places = row_wise(lambda rows: jax.lax.top_k(rows, count), x)
    return values, places.astype(jnp.int32)


def _best_logits(count, logits):
    size = logits.shape[-1]
    if size < 4 * count * _BLOCK:
        values, tokens = jax.lax.top_k(logits, count)
        return values, tokens.astype(jnp.int32)
    padding = [(0, 0)] * (logits.ndim - 1) + [(0, -size % _BLOCK)]
    blocks = jnp.pad(logits, padding, constant_values=-jnp.inf).reshape(*logits.shape[:-1], -1, _BLOCK)
    # In order of place, so that among equal logits the first one is still found first.
    chosen = jnp.sort(jax.lax.top_k(jnp.max(blocks, axis=-1), count)[1], axis=-1)
    inside = jnp.take_along_axis(blocks, chosen[..., None], axis=-2)
    values, place = jax.lax.top_k(inside.reshape(*inside.shape[:-2], -1), count)
    tokens = jnp.take_along_axis(chosen, place // _BLOCK, axis=-1) * _BLOCK + place % _BLOCK
    return values, tokens.astype(jnp.int32)
