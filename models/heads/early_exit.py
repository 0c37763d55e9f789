"""A lens for an early exit (Belrose et al. 2023, Tuned Lens): an affine map between some layer and the target's head.

The residual stream x behind the first layers is not yet in the form that final norm and head expect of it. With

    logits = head(norm(x + A x + b)),  A = 0 and b = 0 at the start,

norm and head being the target's own, a map of H^2 + H numbers turns it there, and the target stays as it is.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from models import transformer
from models.config import TransformerConfig
from models.layers import call
from models.transformer import Params


class Lens(nn.Module):
    """x + A x + b."""

    width: int

    @nn.compact
    def __call__(self, x: Float[Array, "*B H"]) -> Float[Array, "*B H"]:
        return x + nn.Dense(self.width, kernel_init=nn.initializers.zeros, name="linear")(x)


def init(config: TransformerConfig, key: Array, dtype) -> Params:
    """A lens that changes nothing."""
    params = Lens(config.width).init(key, jnp.zeros((1, config.width)))["params"]
    return {"lens": jax.tree.map(lambda leaf: leaf.astype(dtype), params)}


def hidden(
    config: TransformerConfig, params: Params, target: Params, stream: Float[Array, "*B H"]
) -> Float[Array, "*B H"]:
    """What the target's head reads of the residual stream, seen through the lens."""
    seen = call(Lens(config.width), params["lens"], stream)
    return transformer.final_norm(config, target, seen.astype(stream.dtype))
