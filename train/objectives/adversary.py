"""The discriminator that may help a VQ-VAE: it tells patches of images from decoded ones (VQGAN, section 3.1).

The discriminator minimises the hinge loss mean(max(0, 1 - D(x)) + max(0, 1 + D(y))) / 2 over patches of true images x
and decoded ones y, the decoder -mean D(y), weighed so that both of its losses pull equally hard on its last layer.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float


class Discriminator(nn.Module):
    """Convolutions that halve the sides `layers` times, then a score per place (PatchGAN, Isola et al. 2017).

    Group norm in place of batch norm: nothing depends on the other images of a batch.
    """

    width: int
    layers: int

    @nn.compact
    def __call__(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B h w"]:
        narrow = self.has_variable("params", "score")
        x = images.astype(self.variables["params"]["score"]["kernel"].dtype) if narrow else images
        for i in range(self.layers):
            x = nn.Conv(self.width * min(2**i, 8), (4, 4), 2, name=f"conv_{i}")(x)
            x = nn.GroupNorm(1, name=f"norm_{i}")(x) if i else x
            x = nn.leaky_relu(x, 0.2)
        return nn.Conv(1, (3, 3), name="score")(x)[..., 0].astype(images.dtype)


def hinge(true: Float[Array, "B h w"], decoded: Float[Array, "B h w"]) -> Float[Array, "B"]:
    """The discriminator's loss per pair of images, from its scores."""
    margins = nn.relu(1 - true) + nn.relu(1 + decoded)
    return jnp.mean(margins, axis=(1, 2)) / 2


def adaptive_weight(
    pull: Callable[[Array], Any], reconstruction: Float[Array, "B H W 3"], adversarial: Float[Array, "B H W 3"]
) -> Float[Array, ""]:
    """|gradient of the reconstruction loss| / |gradient of the adversarial loss|, at the last layer (VQGAN, eq. 7).

    Args:
      pull: from the gradient of a loss at the decoded images to that at the layer, as `jax.vjp` gives it.
      reconstruction: gradient of the one loss.
      adversarial: gradient of the other.

    Returns:
      The ratio, at most 1e4, as a constant: nothing flows back through it.
    """
    wanted, made = (optax.global_norm(pull(gradient)) for gradient in (reconstruction, adversarial))
    return jax.lax.stop_gradient(jnp.clip(wanted / (made + 1e-4), 0, 1e4))
