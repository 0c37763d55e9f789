"""How many slots of every row's chain are verified, from what a confidence head says of them (DSpark, section 4).

c[r, k] is the probability that slot k of row r survives verification given that the slots before it did, and
a[r, k] = c[r, 0] .. c[r, k] that it is reached and survives. A target forward over more rows takes longer, so a slot is
worth verifying while it raises the tokens per second that are expected of the whole batch: with R rows and T tokens
verified, theta = (R + sum of a over the admitted) * speed(T), speed being the steps per second of such forwards. A row
whose text has ended is run and brings no token: its confidence is 0, and R leaves it out.

Verification stays lossless only if the decision on slot k looks at nothing that token k or a later one had a say in. c
is a function of the tokens before its slot, so these do:

* `until`, the cut at the first slot below a threshold;
* `admit`, which takes slots in the order of falling a and *stops at the first that does not pay*: along a row a falls,
  so all that was looked at before slot k came before it.

The number of slots with the largest theta of the same step does not: slot k + 1, whose confidence depends on token k,
may pay for slot k. Nor does the probability of a drawn token itself, unless tokens are not drawn but the best.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def of_going(confidence: Float[Array, "B M"], done: Bool[Array, "B"] | None) -> Float[Array, "B M"]:
    """c, 0 in rows whose text has ended; `done` None is none."""
    return confidence if done is None else jnp.where(done[:, None], 0, confidence)


def reach(confidence: Float[Array, "B D"]) -> Float[Array, "B D"]:
    """a: how probably every slot is reached and survives."""
    return jnp.cumprod(confidence, axis=1)


def until(confidence: Float[Array, "B D"], threshold: Float[Array, ""] | float) -> Int[Array, "B"]:
    """Slots before the first whose confidence is below the threshold."""
    return jnp.sum(jnp.cumprod((confidence >= threshold).astype(jnp.int32), axis=1), axis=1, dtype=jnp.int32)


def admit(reached: Float[Array, "B D"], speed: Float[Array, "S"]) -> Int[Array, "B"]:
    """Slots of every row that are verified: greedily, until one does not pay.

    Args:
      reached: a; 0 in the first slot of a row whose text has ended.
      speed: steps per second of forwards over 1, 2, .. S rows; beyond, every row takes as long as the last one did.
    """
    batch = reached.shape[0]
    # Slots by falling a, `[D * B]`; of equal ones the earlier slot comes first, so that none overtakes its elder.
    order = jnp.argsort(-reached.T.ravel(), stable=True)
    tokens = batch + jnp.arange(reached.size + 1)
    gained = jnp.concatenate([jnp.zeros(1, reached.dtype), jnp.cumsum(reached.T.ravel()[order])])
    seconds = 1 / speed
    slope = jnp.maximum(seconds[-1] - seconds[-2], 0) if len(speed) > 1 else 0.0
    known = jnp.minimum(tokens, len(speed))
    going = jnp.sum(reached[:, 0] > 0)
    theta = (going + gained) / (seconds[known - 1] + slope * (tokens - known))
    count = jnp.sum(jnp.cumprod((theta[1:] > theta[:-1]).astype(jnp.int32)))
    rank = jnp.zeros(order.shape, jnp.int32).at[order].set(jnp.arange(len(order), dtype=jnp.int32))
    return jnp.sum((rank < count).reshape(reached.T.shape), axis=0, dtype=jnp.int32)
