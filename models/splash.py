"""Attention over whole texts on a TPU, by the library's splash kernel: scores of a tile exist at once, never of a text.

The kernel takes tiles of 128 lanes, so rows and heads must be multiples of that; where they are not, and where a window
is data, attention runs in blocks of rows (`models/attention.py`).
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jaxtyping import Array, Float

from models.layout import Causal, Layout
from models.sharding import head_wise

LANES = 128


def fits(q_BTND: Float[Array, "B T N D"], layout: Layout) -> bool:
    """Whether the kernel can do it, with any window that is known when the program is made."""
    _, rows, _, head_dim = q_BTND.shape
    return rows % LANES == 0 and head_dim % LANES == 0 and isinstance(layout.order, Causal)


def attend_on_tpu(
    q_BTND: Float[Array, "B T N D"],
    k_BKDT: Float[Array, "B K D T"],
    v_BKTD: Float[Array, "B K T D"],
    layout: Layout,
    scale: float,
    cap: float | None,
    window: int | None,
) -> Float[Array, "B T N D"]:
    """Causal attention over the rows alone; elsewhere than on a TPU the kernel is interpreted, which is slow.

    Args:
      q_BTND: queries.
      k_BKDT: keys, as a cache has them.
      v_BKTD: values.
      layout: of whole texts, perhaps of packed documents.
      scale: of the scores.
      cap: of the scores (`models.attention.softcap`).
      window: a query sees the keys less than so many places before it.
    """
    B, T, N, D = q_BTND.shape
    K = v_BKTD.shape[1]
    causal = masks.CausalMask((T, T)) if window is None else masks.LocalMask((T, T), (window - 1, 0), 0)
    segments_BT = jnp.ones((B, T), jnp.int32) if layout.segments is None else layout.segments

    def of_rows(q_BKGTD, k_BKTD, v_BKTD, segments_BT):
        attend = kernel.make_splash_mqa_single_device(
            masks.MultiHeadMask([causal] * (N // K)),
            attn_logits_soft_cap=cap,
            interpret=jax.default_backend() != "tpu",
        )

        def of_row(q_KGTD, k_KTD, v_KTD, segments_T):
            ids = kernel.SegmentIds(segments_T, segments_T)
            return jax.vmap(attend, in_axes=(0, 0, 0, None))(q_KGTD, k_KTD, v_KTD, ids)

        return jax.vmap(of_row)(q_BKGTD, k_BKTD, v_BKTD, segments_BT)

    q_BKGTD = (q_BTND * scale).reshape(B, T, K, N // K, D).transpose(0, 2, 3, 1, 4)
    mixed_BKGTD = head_wise(of_rows, (q_BKGTD, k_BKDT.swapaxes(2, 3), v_BKTD), segments_BT)
    return mixed_BKGTD.transpose(0, 3, 1, 2, 4).reshape(B, T, N, D)
