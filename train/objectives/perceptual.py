"""The perceptual distance of images: how far apart a fixed network's features of them lie (LPIPS, Zhang et al. 2018).

    d(x, y) = sum over taps of  mean over places of  |f(x) / |f(x)| - f(y) / |f(y)||^2

with unit features per place, and all taps and channels weighed alike: learned weights belong to the networks that they
were learned on. A network is anything that keeps `FeatureNet`; `FEATURE_NETS` names those that a config can choose.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from models.formats.inception import read_inception
from models.images import inception
from models.layers import call
from train.objectives.objective import Params


class FeatureNet(Protocol):
    """A fixed network, made from the path of its weights."""

    def shapes(self) -> Params:
        """Shapes and dtypes of what `load` returns."""

    def load(self) -> Params:
        """Its parameters. Raises UserError where the file is missing or broken."""

    def features(self, params: Params, images: Float[Array, "B H W 3"]) -> Sequence[Float[Array, "B _ _ _"]]:
        """Maps of features of images in [-1, 1], of any sizes."""


@dataclasses.dataclass(frozen=True)
class InceptionTaps:
    """The network of `models/images/inception.py` at four depths, at the images' own size or 75 pixels if smaller.

    Attributes:
      weights: path of its file, `pt_inception-2015-12-05-6726825d.pth`.
      taps: modules whose outputs are compared.
    """

    weights: str
    taps: tuple[str, ...] = ("Conv2d_2b_3x3", "Conv2d_4a_3x3", "Mixed_5d", "Mixed_6e")

    _smallest = 75  # A smaller image would leave the last blocks no place.

    def shapes(self) -> Params:
        """Of the whole network, float32."""
        return inception.param_shapes()

    def load(self) -> Params:
        """The network's parameters."""
        return read_inception(self.weights)

    def features(self, params: Params, images: Float[Array, "B H W 3"]) -> Sequence[Float[Array, "B _ _ _"]]:
        """One map per tap."""
        height, width = (max(side, self._smallest) for side in images.shape[1:3])
        enlarged = jax.image.resize(images, (len(images), height, width, 3), "bilinear")
        # (x - 128) / 128 of x in 0..255
        return call(inception.InceptionMaps(self.taps), params, (enlarged * 127.5 - 0.5) / 128)


# What `objective.perceptual.net` may be -> the network, from the path of its weights.
FEATURE_NETS: dict[str, Callable[[str], FeatureNet]] = {"inception": InceptionTaps}


def perceptual_distance(
    net: FeatureNet, params: Params, images: Float[Array, "B H W 3"], others: Float[Array, "B H W 3"]
) -> Float[Array, "B"]:
    """The distance of each pair of images in [-1, 1]."""
    total = jnp.zeros(len(images), images.dtype)
    pairs = zip(net.features(params, images), net.features(params, others), strict=True)
    for one, other in pairs:
        difference = jnp.sum(jnp.square(_unit(one) - _unit(other)), axis=-1)
        total = total + jnp.mean(difference, axis=(1, 2))
    return total


def _unit(x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    # Below the root, because the gradient of a root at 0 is not finite.
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-10)
