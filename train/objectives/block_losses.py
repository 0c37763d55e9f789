"""Losses of drafters that guess a block of tokens at once, slot by slot, and what the slots of a block count.

Everything here is a pure function of log-probabilities, float32 or wider: q the drafter's, p the target's at the same
place, over V tokens; `counted` says which slots have a label. A block's slots lie on the last axis before V, 0 the
first that is drafted. Results are per slot, not yet summed, so that a piece of the anchors of a batch gives its part of
the sums, and whoever divides does so by sums over the whole batch. Only D-PACE looks at several slots, those of one
block, and only at the probabilities of their labels.

With alpha = sum_v min(p, q), the chance that verification keeps a token drawn from q, and TV = 1 - alpha:

    hard        -log q(x)
    l1          sum_v |q - p| = 2 TV        (a weight of 0.9 here is one of 1.8 where TV is weighed)
    forward_kl  sum_v p log(p / q)
    nla         -log max(alpha, 1e-5)       (LK losses; its gradient is TV's over alpha; for one-hot p it is hard)
    hybrid      w KL(p || q) + (1 - w) TV,  w = exp(-3 alpha) of each slot, or exp(-alpha), alpha the mean of the
                batch (as SpecForge has it)
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from train.objectives.divergences import forward_kl, hybrid, l1, nla


@dataclasses.dataclass(frozen=True)
class Terms:
    """Weights of what a slot's loss is summed of; see the module."""

    hard: float = 0.0
    l1: float = 0.0
    forward_kl: float = 0.0
    nla: float = 0.0
    hybrid: float = 0.0

    @property
    def soft(self) -> bool:
        """Whether the target's distributions are asked for."""
        return any((self.l1, self.forward_kl, self.nla, self.hybrid))


def slot_losses(
    terms: Terms,
    log_q: Float[Array, "*B V"],
    log_p: Float[Array, "*B V"] | None,
    labels: Int[Array, "*B"],
    hybrid_weight: Float[Array, "*#B"] | None = None,
) -> Float[Array, "*B"]:
    """The weighted sum of a slot's losses.

    Args:
      terms: their weights.
      log_q: of the drafter.
      log_p: of the target, taken as constant; None where no term asks for it.
      labels: tokens of the text.
      hybrid_weight: of KL in `hybrid`; None takes each slot's own.
    """
    loss = jnp.zeros(labels.shape, log_q.dtype)
    if terms.hard:
        loss -= terms.hard * of_label(log_q, labels)
    if log_p is None:
        assert not terms.soft, "these terms compare with the target's distributions"
        return loss
    log_p = jax.lax.stop_gradient(log_p)
    if terms.l1:
        loss += terms.l1 * l1(log_q, log_p)
    if terms.forward_kl:
        loss += terms.forward_kl * forward_kl(log_q, log_p)
    if terms.nla:
        loss += terms.nla * nla(log_q, log_p)
    if terms.hybrid:
        loss += terms.hybrid * hybrid(log_q, log_p, hybrid_weight)
    return loss


def of_label(log_q: Float[Array, "*B V"], labels: Int[Array, "*B"]) -> Float[Array, "*B"]:
    """log q(label), picked by comparison, whose gradients are no scatter (`shift.log_likelihood`)."""
    vocabulary = jnp.arange(log_q.shape[-1], dtype=labels.dtype)
    return jnp.sum(jnp.where(labels[..., None] == vocabulary, log_q, 0), axis=-1)


def confidence_loss(logit: Float[Array, "*B"], survives: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """Binary cross-entropy of sigmoid(`logit`) with a soft label, which is taken as constant."""
    survives = jax.lax.stop_gradient(survives)
    return jax.nn.softplus(logit) - survives * logit


def exponential_decay(slots: int, pace: float | None) -> Float[Array, "K"]:
    """exp(-k / pace) for slot k; None weighs all alike."""
    index_K = jnp.arange(slots, dtype=jnp.float32)
    return jnp.ones(slots) if pace is None else jnp.exp(-index_K / pace)


def unbroken(counted: Bool[Array, "*B K"]) -> Bool[Array, "*B K"]:
    """The counted slots before which no slot is missing."""
    return jnp.cumprod(counted.astype(jnp.int32), axis=-1) > 0


def d_pace(
    log_q_label: Float[Array, "*B K"], counted: Bool[Array, "*B K"], smoothing: float = 0.5
) -> Float[Array, "*B K"]:
    """D-PACE's weights: how fast the expected accepted length of a block grows with each slot's log-probability.

    s_j = (1 - smoothing) q(label_j) + smoothing, and w_j = sum over i >= j of s_1 .. s_i, both over counted slots.
    Constant, and 0 where nothing counts.
    """
    likely = jax.lax.stop_gradient(jnp.exp(log_q_label))
    smooth = jnp.where(counted, (1 - smoothing) * likely + smoothing, 1)
    length = jnp.where(counted, jnp.cumprod(smooth, axis=-1), 0)
    return jnp.where(counted, jnp.flip(jnp.cumsum(jnp.flip(length, -1), axis=-1), -1), 0)
