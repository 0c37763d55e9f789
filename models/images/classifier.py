"""A small convolutional classifier, whose pooled features judge images where no published network does.

    features, scores = forward(config, params, images)

One residual block per level, each level at half the side of the one before; the mean over the places of the last level
is what images are compared by, and a linear map of it scores the classes. Parameters are named like the blocks of the
VQ-VAE (`models/images/autoencoder.py`), from which they are built. Images are NHWC in [-1, 1].
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from models.attention import wide
from models.images.autoencoder import ResBlock
from models.layers import call
from models.schema import require
from models.transformer import Params


@dataclasses.dataclass(frozen=True)
class ClassifierConfig:
    """Sizes of a classifier.

    Attributes:
      num_classes: labels 0 to num_classes - 1.
      image_size: side of the images that it learns from, in pixels; features of others mean nothing.
      width: channels of the first level.
      multipliers: of the width at every level, the highest resolution, half the image's, first.
    """

    num_classes: int
    image_size: int
    width: int = 32
    multipliers: tuple[int, ...] = (1, 2, 4)

    def __post_init__(self):
        for name in ("num_classes", "image_size", "width"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1", getattr(self, name))
        require(
            bool(self.multipliers) and min(self.multipliers) >= 1,
            "multipliers must be one or more numbers of 1 or more",
            list(self.multipliers),
        )
        levels = 2 ** len(self.multipliers)
        require(self.image_size % levels == 0, f"image_size must be a multiple of {levels}", self.image_size)

    @property
    def features(self) -> int:
        """How many pooled features there are."""
        return self.width * self.multipliers[-1]


class Network(nn.Module):
    """The classifier as a module; `forward` is its functional face."""

    config: ClassifierConfig

    @nn.compact
    def __call__(self, images: Float[Array, "B H W 3"]) -> tuple[Float[Array, "B F"], Float[Array, "B C"]]:
        c, x = self.config, images
        for i, multiplier in enumerate(c.multipliers):
            # Strided at once: at the full side the convolutions would take most of the time and add little.
            x = nn.Conv(c.width * multiplier, (3, 3), 2, name=f"half_{i}")(x)
            x = ResBlock(c.width * multiplier, name=f"block_{i}")(x)
        features = jnp.mean(nn.silu(x), axis=(1, 2), dtype=wide(x.dtype))
        return features, nn.Dense(c.num_classes, name="classes")(features)


def init(config: ClassifierConfig, key: Array, dtype=jnp.float32) -> Params:
    """Random parameters: kernels of std 1/sqrt(fan-in), biases zero."""
    side = config.image_size
    image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    params = Network(config).lazy_init(key, image)["params"]
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def param_shapes(config: ClassifierConfig, dtype=jnp.float32) -> Params:
    """The tree of `ShapeDtypeStruct`s that `init` would return, without allocating."""
    return jax.tree.map(lambda shape: shape, _param_shapes(config, jnp.result_type(dtype)))  # The caller's own.


@functools.cache
def _param_shapes(config: ClassifierConfig, dtype: Any) -> Params:
    return jax.eval_shape(functools.partial(init, config, dtype=dtype), jax.random.key(0))


def forward(
    config: ClassifierConfig, params: Params, images: Float[Array, "B H W 3"]
) -> tuple[Float[Array, "B F"], Float[Array, "B C"]]:
    """Pooled features and scores of the classes, float32 or wider, of images in [-1, 1]."""
    features, scores = call(Network(config), params, images.astype(params["half_0"]["kernel"].dtype))
    return features, scores.astype(wide(scores.dtype))
