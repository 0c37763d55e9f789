"""The one contract of every next-token loss: who is supervised by which token, and whether it counts.

With distance d, the row at position p answers for the token at p + d. It counts if that token lies in the row, in the
same document, and is itself marked as a label. The language-model loss is d = 1; draft head i (depth i + 1) is
d = i + 2, and its teacher, the target's own distribution over that token, stands at p + d - 1. The mask is always read
at the label, never at p, so that a prompt's last position learns the answer's first token and an answer's last
position learns nothing.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def ahead(values: Array, distance: int) -> Array:
    """`values[b, p + distance]` at p, along axis 1; the last `distance` positions hold zeros, which never count."""
    if distance == 0:
        return values
    padding = [(0, 0), (0, min(distance, values.shape[1]))] + [(0, 0)] * (values.ndim - 2)
    return jnp.pad(values[:, distance:], padding)


def behind(values: Array, distance: int) -> Array:
    """`values[b, p - distance]` at p, along axis 1; the first `distance` positions hold zeros."""
    kept = max(values.shape[1] - distance, 0)
    padding = [(0, 0), (values.shape[1] - kept, 0)] + [(0, 0)] * (values.ndim - 2)
    return jnp.pad(values[:, :kept], padding)


def labels_at(batch: dict[str, Array], distance: int) -> tuple[Int[Array, "B T"], Bool[Array, "B T"]]:
    """Labels and whether they count.

    Args:
      batch: `tokens` int [B, T]; `segments` int [B, T], documents from 1 and 0 for padding; `mask` [B, T], true where
        the token counts as a label.
      distance: how far ahead the label lies, at least 1.

    Returns:
      labels [B, T] and weights [B, T].
    """
    segments = batch["segments"]
    same_document = (segments > 0) & (ahead(segments, distance) == segments)
    return ahead(batch["tokens"], distance), same_document & ahead(batch["mask"].astype(bool), distance)


def label_mask(batch: dict[str, Array], labels: str) -> Bool[Array, "B T"]:
    """Which tokens count as labels: those the data set marks (`assistant`), or every token that is text (`all`)."""
    return batch["segments"] > 0 if labels == "all" else batch["mask"].astype(bool)


def log_likelihood(logits: Float[Array, "B T V"], labels: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """log p(label), as picked logit minus log-sum-exp.

    The label is picked by comparison instead of by gather: its gradient is then an elementwise product that XLA fuses
    with the softmax, where a gather's is a scatter over [B, T, V].
    """
    shifted = logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    vocabulary = jnp.arange(logits.shape[-1], dtype=labels.dtype)
    picked = jnp.sum(jnp.where(labels[..., None] == vocabulary, shifted, 0), axis=-1)
    return picked - jnp.log(jnp.sum(jnp.exp(shifted), axis=-1))
