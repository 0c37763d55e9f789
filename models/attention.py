"""Attention of new rows over several sources of keys: themselves, the committed prefix, a draft's scratch, a memory.

Letters as in `models/layers.py`, and R = T * G, the new rows of all query heads of a key head.
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from models import splash
from models.layout import Blocks, Causal, Layout
from models.linear import wide_einsum

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
      memory: another text, as an encoder has read it; a block's cross-attention reads it, under a softmax of its own.
    """

    prefix: Any = None
    scratch: Any = None
    memory: Any = None

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
    rows: Rows | None,
    sources: Sources,
    layout: Layout,
    *,
    scale: float,
    cap: float | None = None,
    window: int | Int[Array, ""] | None = None,
) -> Float[Array, "B T N*D"]:
    """Softmax attention over the new rows, unless they are None, and all other sources, under one normaliser.

    With `layout.attention` "blocks" or "fused", which are for whole texts, no scores of all rows with all exist: blocks
    of rows take turns, or with "fused" the library's kernel of the device does it where it can. Rows whose order is
    `Blocks` have a prefix there, too, and blocks take turns at it.

    With "split" the prefix is left to `jax.nn.dot_product_attention`, masked by length, and its
    result is merged with that of the other rows by their log-sum-exp: the same sums in another order. It has neither
    windows nor caps, and pays for turning the cache into the library's layout.

    Keeping the sources apart means that the fresh keys of a draft tree never have to be written to the cache: only
    rows that verification accepts are (`decoding/cache.py`). Keys lie as [B, K, D, S] and values as [B, K, S, D], the
    two forms in which XLA multiplies a cache as it is; any other is transposed or packed anew at every step.
    """
    if rows is not None and layout.attention in ("blocks", "fused"):
        if isinstance(layout.order, Blocks):
            assert sources.scratch is None and sources.memory is None, "attention of blocks has a prefix alone"
            return attend_by_block(q_BTND, rows, sources.prefix, layout, scale=scale, cap=cap, window=window)
        assert sources == ALONE, "attention over whole texts has no other sources"
        kernel = kernel_for(q_BTND, layout, cap, window)
        if kernel == "splash" and not isinstance(window, jax.Array):
            mixed_BTND = splash.attend_on_tpu(q_BTND, rows["k"], rows["v"], layout, scale, cap, window)
            return mixed_BTND.reshape(*q_BTND.shape[:2], -1)
        if kernel == "library":
            return _library_kernel(q_BTND, rows, layout, scale)
        return attend_in_blocks(q_BTND, rows, layout, scale=scale, cap=cap, window=window)[0].astype(q_BTND.dtype)
    prefix, scratch, memory = sources.prefix, sources.scratch, sources.memory
    split = prefix is not None and layout.attention == "split"
    dense, seen = [], []
    if rows is not None:
        dense.append(rows)
        seen.append(layout.sees_rows(window))
    if scratch is not None:
        dense.append(scratch)
        seen.append(layout.sees_scratch(window))
    if prefix is not None and not split:
        dense.append(prefix)
        seen.append(layout.sees_prefix(prefix["k"].shape[3], window))
    if memory is not None:
        dense.append(memory)
        seen.append(layout.sees_memory())
    B, T, N, D = q_BTND.shape
    K = dense[0]["v"].shape[1]
    dtype = wide(q_BTND.dtype)
    q_BKRD = (q_BTND * scale).reshape(B, T, K, N // K, D).transpose(0, 2, 1, 3, 4).reshape(B, K, -1, D)

    def scores(k_BKDS, seen_BTS):
        s_BKRS = wide_einsum("BKRD,BKDS->BKRS", q_BKRD, k_BKDS)
        s_BKTGS = softcap(s_BKRS, cap).reshape(B, K, T, N // K, -1)
        return jnp.where(seen_BTS[:, None, :, None], s_BKTGS, jnp.finfo(dtype).min)

    s = [scores(source["k"], mask) for source, mask in zip(dense, seen, strict=True)]
    top = functools.reduce(jnp.maximum, [jnp.max(x, axis=-1, keepdims=True) for x in s])
    e = [jnp.exp(x - top) for x in s]
    total = functools.reduce(jnp.add, [jnp.sum(x, axis=-1, keepdims=True) for x in e]).reshape(B, K, -1, 1)
    mixed = [
        wide_einsum("BKRS,BKSD->BKRD", x.reshape(B, K, T * N // K, -1).astype(source["v"].dtype), source["v"])
        for x, source in zip(e, dense, strict=True)
    ]
    mixed_BKRD = functools.reduce(jnp.add, mixed) / total
    if prefix is not None and split:
        assert cap is None and window is None, "attention over a split prefix has neither windows nor caps"
        assert layout.horizon.shape[1] == 1 and layout.since is None, "nor a horizon for every row"
        assert layout.prefix_seen is None, "nor slots that are not seen"
        over_BKRD, residual_BKR1 = _library_attention(q_BTND, prefix, layout, scale)
        weight = jax.nn.sigmoid(residual_BKR1 - (top.reshape(B, K, -1, 1) + jnp.log(total)))
        mixed_BKRD = mixed_BKRD + weight * (over_BKRD - mixed_BKRD)
    mixed_BKRD = mixed_BKRD.astype(q_BTND.dtype)
    return mixed_BKRD.reshape(B, K, T, N // K, D).transpose(0, 2, 1, 3, 4).reshape(B, T, N * D)


# Scores of a block of rows with all others, heads and batch rows counted: half a GiB in float32.
BLOCK = 2**27


def attend_in_blocks(
    q_BTND: Float[Array, "B T N D"],
    rows: Rows,
    layout: Layout,
    *,
    scale: float,
    cap: float | None = None,
    window: int | Int[Array, ""] | None = None,
) -> tuple[Float[Array, "B T N*D"], Float[Array, "B T N"]]:
    """Causal attention over the rows alone, of a block of queries after the other, and the log-sum-exp of its scores.

    Both are `wide`. Of several blocks scores are computed again for their gradients, so that only those of one ever
    exist; all of a text that is a block alone are kept.
    """
    B, T, N, D = q_BTND.shape
    K = rows["v"].shape[1]
    dtype = wide(q_BTND.dtype)
    count = min(-(-B * N * T * T // BLOCK), T)
    size = -(-T // count)

    def block(first, q_BQND):
        q_BKQGD = (q_BQND * scale).reshape(B, -1, K, N // K, D).transpose(0, 2, 1, 3, 4)
        s_BKQGS = softcap(wide_einsum("BKQGD,BKDS->BKQGS", q_BKQGD, rows["k"]), cap)
        seen_BQS = layout.sees_from(first, q_BQND.shape[1], window)
        s_BKQGS = jnp.where(seen_BQS[:, None, :, None], s_BKQGS, jnp.finfo(dtype).min)
        top = jax.lax.stop_gradient(jnp.max(s_BKQGS, axis=-1, keepdims=True))
        e_BKQGS = jnp.exp(s_BKQGS - top)
        total = jnp.sum(e_BKQGS, axis=-1, keepdims=True)
        mixed_BKQGD = wide_einsum("BKQGS,BKSD->BKQGD", e_BKQGS.astype(rows["v"].dtype), rows["v"]) / total
        by_row = mixed_BKQGD.transpose(0, 2, 1, 3, 4).reshape(B, -1, N * D)
        return by_row, (top + jnp.log(total)).transpose(0, 2, 1, 3, 4).reshape(B, -1, N)

    if count == 1:
        return block(0, q_BTND)
    padded = jnp.pad(q_BTND, ((0, 0), (0, -T % size), (0, 0), (0, 0)))
    pieces = jnp.moveaxis(padded.reshape(B, -1, size, N, D), 1, 0)
    starts = jnp.arange(len(pieces), dtype=jnp.int32) * size
    found = jax.lax.map(lambda piece: jax.checkpoint(block)(*piece), (starts, pieces))
    mixed, residual = (jnp.moveaxis(x, 0, 1).reshape(B, -1, x.shape[-1])[:, :T] for x in found)
    return mixed, residual


def attend_by_block(
    q_BTND: Float[Array, "B T N D"],
    rows: Rows,
    prefix: Rows,
    layout: Layout,
    *,
    scale: float,
    cap: float | None = None,
    window: int | Int[Array, ""] | None = None,
) -> Float[Array, "B T N*D"]:
    """Attention of many `Blocks` of rows, each over itself and over what it sees of a prefix that all share.

    A block has no scores with rows of others. Those with the prefix exist of some blocks at a time, are computed again
    for their gradients, and the two results are merged by the log-sum-exp of their scores.
    """
    order = layout.order
    assert isinstance(order, Blocks) and isinstance(order.phase, int) and order.phase == 0, "blocks begin with row 0"
    B, T, N, D = q_BTND.shape
    K, size = rows["v"].shape[1], order.size
    count, dtype = T // size, wide(q_BTND.dtype)
    q_BKTGD = (q_BTND * scale).reshape(B, T, K, N // K, D).transpose(0, 2, 1, 3, 4)

    def softmax(s, seen):
        """Weights over the last axis, and the log-sum-exp."""
        s = jnp.where(seen, softcap(s, cap), jnp.finfo(dtype).min)
        top = jax.lax.stop_gradient(jnp.max(s, axis=-1, keepdims=True))
        e = jnp.exp(s - top)
        total = jnp.sum(e, axis=-1, keepdims=True)
        return (e / total).astype(q_BTND.dtype), top + jnp.log(total)

    def over_prefix(piece):
        q_BKRGD, layout = piece
        seen_BR = layout.sees_prefix(prefix["k"].shape[3], window)
        p, residual = softmax(wide_einsum("BKRGD,BKDS->BKRGS", q_BKRGD, prefix["k"]), seen_BR[:, None, :, None])
        return wide_einsum("BKRGS,BKSD->BKRGD", p, prefix["v"]), residual

    position_BMQ = layout.positions.reshape(B, count, size)
    seen_BMQS = order.inside
    if window is not None:
        seen_BMQS = seen_BMQS & (position_BMQ[..., :, None] - position_BMQ[..., None, :] < window)
    keys_BKDMS, values_BKMSD = (rows["k"].reshape(B, K, D, count, size), rows["v"].reshape(B, K, count, size, D))
    q_BKMQGD = q_BKTGD.reshape(B, K, count, size, -1, D)
    s_BKMQGS = wide_einsum("BKMQGD,BKDMS->BKMQGS", q_BKMQGD, keys_BKDMS)
    seen = jnp.broadcast_to(seen_BMQS, (B, count, size, size))[:, None, :, :, None]
    p, own_residual = softmax(s_BKMQGS, seen)
    own = wide_einsum("BKMQGS,BKMSD->BKMQGD", p, values_BKMSD).reshape(B, K, T, -1, D)
    other, residual = _by_turns(over_prefix, q_BKTGD, layout, size, prefix["k"].shape[3])
    weight = jax.nn.sigmoid(residual - own_residual.reshape(residual.shape))
    mixed_BKTGD = own + weight * (other - own)
    return mixed_BKTGD.transpose(0, 2, 1, 3, 4).reshape(B, T, N * D).astype(q_BTND.dtype)


def _by_turns(function: Any, q_BKTGD: Float[Array, "B K T G D"], layout: Layout, size: int, slots: int) -> Any:
    """`function` of queries and their layout, of as many blocks of `size` rows at a time as have `BLOCK` scores.

    What it returns has an axis of rows where the queries have theirs.
    """
    B, K, T, G, _ = q_BKTGD.shape
    per_row = {name: getattr(layout, name) for name in ("positions", "horizon", "since")}
    per_row = {name: None if x is None else jnp.broadcast_to(x, (B, T)) for name, x in per_row.items()}
    count = T // size
    turns = min(-(-B * K * G * T * slots // BLOCK), count)
    if turns == 1:
        return function((q_BKTGD, dataclasses.replace(layout, **per_row)))
    length = -(-count // turns) * size

    def cut(x, axis):
        padding = [(0, -T % length if i == axis else 0) for i in range(x.ndim)]
        shape = (*x.shape[:axis], -1, length, *x.shape[axis + 1 :])
        return jnp.moveaxis(jnp.pad(x, padding).reshape(shape), axis, 0)

    def turn(piece):
        q_BKRGD, per_row = piece
        return function((q_BKRGD, dataclasses.replace(layout, **per_row)))

    found = jax.lax.map(jax.checkpoint(turn), (cut(q_BKTGD, 2), jax.tree.map(lambda x: cut(x, 1), per_row)))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2).reshape(B, K, -1, G, x.shape[-1])[:, :, :T], found)


def kernel_for(
    q_BTND: Float[Array, "B T N D"], layout: Layout, cap: float | None, window: int | Int[Array, ""] | None
) -> Literal["splash", "library", "blocks"]:
    """What attends over whole texts: the kernel of the device if it takes such rows and heads, else blocks of rows.

    The library's is cuDNN's on a GPU; on a CPU it has a plain implementation, which takes all.
    """
    backend, (_, rows, _, head_dim) = jax.default_backend(), q_BTND.shape
    if layout.attention != "fused":
        return "blocks"
    if backend == "tpu":
        known = window is None or isinstance(window, int)
        return "splash" if known and splash.fits(q_BTND, layout) else "blocks"
    if cap is not None or window is not None:
        return "blocks"
    if backend == "cpu":
        return "library"
    masked = not isinstance(layout.order, Causal) or layout.segments is not None
    narrow = jnp.finfo(q_BTND.dtype).bits == 16 and head_dim % 8 == 0 and head_dim <= 128
    # Gradients of a mask, which it takes for a bias, exist for even rows alone.
    taken = narrow and not (masked and rows % 2) and "cuda" in jax.devices()[0].client.platform_version
    return "library" if taken else "blocks"


def _library_kernel(q_BTND: Float[Array, "B T N D"], rows: Rows, layout: Layout, scale: float):
    """Attention over the rows alone by the library's kernel for whole texts, which keeps no scores.

    Its numbers are those of its plain implementation, which is what devices without the kernel run.
    """
    B, T, N, D = q_BTND.shape
    keys_BTKD, values_BTKD = rows["k"].transpose(0, 3, 1, 2), rows["v"].transpose(0, 2, 1, 3)
    kernel: Literal["cudnn", "xla"] = "cudnn" if jax.default_backend() == "gpu" else "xla"
    # Said beside a mask, too: what is after a row is then left out of the work, not only of the result.
    causal = isinstance(layout.order, Causal)
    seen_B1TT = None if causal and layout.segments is None else layout.sees_rows(None)[:, None]
    mixed_BTND = jax.nn.dot_product_attention(
        q_BTND, keys_BTKD, values_BTKD, mask=seen_B1TT, scale=scale, is_causal=causal, implementation=kernel
    )
    return mixed_BTND.reshape(B, T, N * D)


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
