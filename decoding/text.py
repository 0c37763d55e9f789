"""The text that a loop writes: its buffer, who wrote each token, and where it ends."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Int, Int16, Int32

from decoding.request import Request


@struct.dataclass
class Text:
    """Texts of batch rows.

    Attributes:
      tokens: the text so far, root included, in the first `length + 1` places.
      writers: who wrote each token: 0 the target, d the accepted draft of depth d.
      length: committed tokens.
      done: finished rows.
    """

    tokens: Int32[Array, "B C"]
    writers: Int16[Array, "B C"]
    length: Int32[Array, "B"]
    done: Bool[Array, "B"]


def emit(
    text: Text, request: Request, tokens: Int[Array, "B R"], drafts: Int[Array, "B"]
) -> tuple[Text, Int[Array, "B"]]:
    """Appends `drafts + 1` tokens to each live row, cut at its limit and after its first stop sequence.

    Returns:
      The text and how many tokens each row really got.
    """
    R = tokens.shape[1]
    place_R = jnp.arange(R, dtype=jnp.int32)
    count = jnp.minimum(drafts + 1, request.limit - text.length - 1)
    stopped_BR = _ends_stop(text, request, tokens) & (place_R < count[:, None])
    first = jnp.min(jnp.where(stopped_BR, place_R, R), axis=1)
    count = jnp.where(text.done, 0, jnp.minimum(count, first + 1))
    writers_BR = jnp.where(place_R < drafts[:, None], place_R + 1, 0).astype(jnp.int16)
    length = text.length + count
    written = dataclasses.replace(
        text,
        tokens=_write(text.tokens, tokens, text.length + 1),
        writers=_write(text.writers, writers_BR, text.length + 1),
        length=length,
        done=text.done | (first < R) | (length + 1 >= request.limit),
    )
    return written, count


def _write(buffer: Int[Array, "B C"], values: Int[Array, "B R"], start: Int[Array, "B"]) -> Int[Array, "B C"]:
    return jax.vmap(lambda b, v, s: jax.lax.dynamic_update_slice(b, v.astype(b.dtype), (s,)))(buffer, values, start)


def _ends_stop(text: Text, request: Request, tokens: Int[Array, "B R"]) -> Bool[Array, "B R"]:
    """`[b, r]`: generated text up to and including `tokens[b, r]` ends with one of the row's stop sequences."""
    R, L = tokens.shape[1], request.stops.shape[2]
    before_BL = text.length[:, None] + 1 + jnp.arange(-(L - 1), 0, dtype=jnp.int32)
    tail = jnp.take_along_axis(text.tokens, jnp.maximum(before_BL, 0), axis=1)
    # A stop sequence must lie in generated text: prompt tokens match nothing.
    tail = jnp.where(before_BL >= request.prompt_length[:, None], tail, -2)
    window = jnp.concatenate([tail, tokens], axis=1)
    window_BRL = jnp.stack([window[:, i : i + R] for i in range(L)], axis=2)
    stops_BKL = request.stops
    same = (stops_BKL[:, None] == window_BRL[:, :, None]) | (stops_BKL[:, None] == -1)
    return jnp.any(jnp.all(same, axis=3) & (stops_BKL[:, None, :, -1] >= 0), axis=2)
