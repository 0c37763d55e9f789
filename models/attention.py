"""Attention of new rows over several sources of keys: the rows themselves, the committed prefix, a draft's scratch.

Letters as in `models/layers.py`, and R = T * G, the new rows of all query heads of a key head.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from models.layout import Layout

# One layer's keys `k` [B, K, D, S] and values `v` [B, K, S, D], of S cache slots or of S = T new rows.
Rows = dict[str, Float[Array, "B K _ _"]]
# The same of L stacked layers.
StackedRows = dict[str, Float[Array, "L B K _ _"]]


@struct.dataclass
class Sources:
    """Keys and values beside those of the new rows; which of them a row sees is the layout's to say.

    Of a whole stack each is a list of `Rows` with one entry per layer, or one `Rows` with a leading axis of layers; of
    one layer (`layer`), its `Rows`. None where there are none.

    Attributes:
      prefix: the committed text, in the slots of the KV cache.
      scratch: rows that earlier forwards of the same draft computed.
    """

    prefix: Any = None
    scratch: Any = None

    def layer(self, k: int) -> "Sources":
        """What layer k of a list of layers attends to."""
        every = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return Sources(**{name: None if source is None else source[k] for name, source in every.items()})


ALONE = Sources()


def wide(dtype) -> jnp.dtype:
    """The dtype for norms, softmax and logits: float32, or `dtype` if that is wider."""
    return jnp.promote_types(dtype, jnp.float32)


def softcap(x: Float[Array, "*shape"], cap: float | None) -> Float[Array, "*shape"]:
    """cap * tanh(x / cap), or x when there is no cap (Gemma-2, section 2)."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def attend(
    q_BTND: Float[Array, "B T N D"],
    rows: Rows,
    sources: Sources,
    layout: Layout,
    *,
    scale: float,
    cap: float | None = None,
    window: int | Int[Array, ""] | None = None,
) -> Float[Array, "B T N*D"]:
    """Softmax attention over the new rows and all other sources, under one normaliser.

    With `layout.attention` "split" the prefix is left to `jax.nn.dot_product_attention`, masked by length, and its
    result is merged with that of the other rows by their log-sum-exp: the same sums in another order. It has neither
    windows nor caps, and pays for turning the cache into the library's layout.

    Keeping the sources apart means that the fresh keys of a draft tree never have to be written to the cache: only
    rows that verification accepts are (`decoding/cache.py`). Keys lie as [B, K, D, S] and values as [B, K, S, D], the
    two forms in which XLA multiplies a cache as it is; any other is transposed or packed anew at every step.
    """
    B, T, N, D = q_BTND.shape
    K = rows["v"].shape[1]
    dtype = wide(q_BTND.dtype)
    q_BKRD = (q_BTND * scale).reshape(B, T, K, N // K, D).transpose(0, 2, 1, 3, 4).reshape(B, K, -1, D)

    def scores(k_BKDS, seen_BTS):
        s_BKRS = jnp.einsum("BKRD,BKDS->BKRS", q_BKRD, k_BKDS, preferred_element_type=dtype)
        s_BKTGS = softcap(s_BKRS, cap).reshape(B, K, T, N // K, -1)
        return jnp.where(seen_BTS[:, None, :, None], s_BKTGS, jnp.finfo(dtype).min)

    prefix, scratch = sources.prefix, sources.scratch
    dense, seen = [rows], [layout.sees_rows(window)]
    if scratch is not None:
        dense.append(scratch)
        seen.append(layout.sees_scratch(window))
    split = prefix is not None and layout.attention == "split"
    if prefix is not None and not split:
        dense.append(prefix)
        seen.append(layout.sees_prefix(prefix["k"].shape[3], window))
    s = [scores(source["k"], mask) for source, mask in zip(dense, seen, strict=True)]
    top = functools.reduce(jnp.maximum, [jnp.max(x, axis=-1, keepdims=True) for x in s])
    e = [jnp.exp(x - top) for x in s]
    total = functools.reduce(jnp.add, [jnp.sum(x, axis=-1, keepdims=True) for x in e]).reshape(B, K, -1, 1)
    mixed = [
        jnp.einsum(
            "BKRS,BKSD->BKRD",
            x.reshape(B, K, T * N // K, -1).astype(source["v"].dtype),
            source["v"],
            preferred_element_type=dtype,
        )
        for x, source in zip(e, dense, strict=True)
    ]
    mixed_BKRD = functools.reduce(jnp.add, mixed) / total
    if prefix is not None and split:
        assert cap is None and window is None, "attention over a split prefix has neither windows nor caps"
        assert layout.horizon.shape[1] == 1, "nor a horizon for every row"
        over_BKRD, residual_BKR1 = _library_attention(q_BTND, prefix, layout, scale)
        weight = jax.nn.sigmoid(residual_BKR1 - (top.reshape(B, K, -1, 1) + jnp.log(total)))
        mixed_BKRD = mixed_BKRD + weight * (over_BKRD - mixed_BKRD)
    mixed_BKRD = mixed_BKRD.astype(q_BTND.dtype)
    return mixed_BKRD.reshape(B, K, T, N // K, D).transpose(0, 2, 1, 3, 4).reshape(B, T, N * D)


def _library_attention(
    q_BTND: Float[Array, "B T N D"], prefix: Rows, layout: Layout, scale: float
) -> tuple[Float[Array, "B K R D"], Float[Array, "B K R 1"]]:
    """Attention over the prefix alone, masked by the horizon, and the log-sum-exp of its scores."""
    B, T, N, D = q_BTND.shape
    K = prefix["v"].shape[1]
    keys_BSKD, values_BSKD = prefix["k"].transpose(0, 3, 1, 2), prefix["v"].transpose(0, 2, 1, 3)
    mixed_BTND, residual_BTN = jax.nn.dot_product_attention(
        q_BTND, keys_BSKD, values_BSKD, scale=scale, key_value_seq_lengths=layout.horizon[:, 0], return_residual=True
    )
    dtype = wide(q_BTND.dtype)

    def by_key_head(x, last):
        return x.astype(dtype).reshape(B, T, K, N // K, last).transpose(0, 2, 1, 3, 4).reshape(B, K, -1, last)

    return by_key_head(mixed_BTND, D), by_key_head(residual_BTN, 1)
