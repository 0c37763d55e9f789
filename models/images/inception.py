"""The Inception graph of 2015-12-05 that FID, sFID and Inception Score are defined on, with its quirks.

It is Inception v3 (Szegedy et al. 2015, arXiv:1512.00567) as TensorFlow first published it, with 1,008 classes. What
later copies do otherwise and this one must not: average pools leave their padding out of the count, the last block
(`Mixed_7c`) pools by maximum, batch norm adds 1e-3, images of 0..255 are resized by TF1's first bilinear kernel and
become (x - 128) / 128, and Inception Score takes its logits without the last bias.

Modules are called what the torch port of these weights (`pt_inception-2015-12-05`) calls them. TensorFlow counts the
blocks instead: `mixed` to `mixed_2` are 5b to 5d at 35x35, `mixed_3` (the reduction) to `mixed_7` are 6a to 6e at
17x17, `mixed_8` to `mixed_10` are 7a to 7c at 8x8. So `mixed_6/conv`, which sFID reads, is the rectified output of the
first convolution of `Mixed_6d`, its 1x1 branch.
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from models.layers import call

Params = dict[str, Any]

SIZE = 299  # Side of the images that the graph reads.
SPATIAL_CHANNELS = 7  # of mixed_6/conv; at 17x17 they make the 2,023 numbers of sFID.
CLASSES = 1008
_EPSILON = 1e-3


class InceptionFeatures(NamedTuple):
    """What the metrics read of an image.

    Attributes:
      pool: `pool_3`, the mean over places of the last block.
      spatial: the first 7 channels of `mixed_6/conv`, rows first, channels last; [B, 2023] for whole images.
      logits: of 1,008 classes, without bias.
    """

    pool: Float[Array, "B 2048"]
    spatial: Float[Array, "B S"]
    logits: Float[Array, "B 1008"]


class Unit(nn.Module):
    """Convolution without bias, batch norm by stored statistics, ReLU."""

    channels: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: str = "SAME"

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B I J D"]:
        shape = (*self.kernel, x.shape[-1], self.channels)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape)
        ones, zeros = nn.initializers.ones, nn.initializers.zeros
        scale, variance = (self.param(name, ones, (self.channels,)) for name in ("scale", "variance"))
        bias, mean = (self.param(name, zeros, (self.channels,)) for name in ("bias", "mean"))
        # Full float32: reduced products would move the metrics.
        y = jax.lax.conv_general_dilated(
            x,
            kernel,
            (self.stride, self.stride),
            self.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=jax.lax.Precision.HIGHEST,
        )
        return nn.relu((y - mean) * (scale * jax.lax.rsqrt(variance + _EPSILON)) + bias)


def _branch(x: Array, *units: tuple) -> Array:
    """Convolutions one after another: name and channels of each, then kernel, stride and padding where they differ."""
    for name, *shape in units:
        x = Unit(*shape, name=name)(x)
    return x


def average_pool(x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    """3x3 means at stride 1, over the places inside the image alone."""
    return nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)


def _halved(x: Array) -> Array:
    return nn.max_pool(x, (3, 3), (2, 2))


class BlockA(nn.Module):
    """Mixed_5b to 5d, 35x35."""

    pool_channels: int

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W D"]:
        branches = [
            _branch(x, ("branch1x1", 64)),
            _branch(x, ("branch5x5_1", 48), ("branch5x5_2", 64, (5, 5))),
            _branch(x, ("branch3x3dbl_1", 64), ("branch3x3dbl_2", 96, (3, 3)), ("branch3x3dbl_3", 96, (3, 3))),
            _branch(average_pool(x), ("branch_pool", self.pool_channels)),
        ]
        return jnp.concatenate(branches, axis=-1)


class BlockB(nn.Module):
    """Mixed_6a: 35x35 to 17x17."""

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B I J D"]:
        reduce = ((3, 3), 2, "VALID")
        branches = [
            _branch(x, ("branch3x3", 384, *reduce)),
            _branch(x, ("branch3x3dbl_1", 64), ("branch3x3dbl_2", 96, (3, 3)), ("branch3x3dbl_3", 96, *reduce)),
            _halved(x),
        ]
        return jnp.concatenate(branches, axis=-1)


class BlockC(nn.Module):
    """Mixed_6b to 6e, 17x17; also returns its 1x1 branch."""

    inner: int

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> tuple[Float[Array, "B H W D"], Float[Array, "B H W 192"]]:
        row, column, inner = (1, 7), (7, 1), self.inner
        branches = [
            _branch(x, ("branch1x1", 192)),
            _branch(x, ("branch7x7_1", inner), ("branch7x7_2", inner, row), ("branch7x7_3", 192, column)),
            _branch(
                x,
                ("branch7x7dbl_1", inner),
                ("branch7x7dbl_2", inner, column),
                ("branch7x7dbl_3", inner, row),
                ("branch7x7dbl_4", inner, column),
                ("branch7x7dbl_5", 192, row),
            ),
            _branch(average_pool(x), ("branch_pool", 192)),
        ]
        return jnp.concatenate(branches, axis=-1), branches[0]


class BlockD(nn.Module):
    """Mixed_7a: 17x17 to 8x8."""

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B I J D"]:
        reduce = ((3, 3), 2, "VALID")
        wide = [("branch7x7x3_1", 192), ("branch7x7x3_2", 192, (1, 7)), ("branch7x7x3_3", 192, (7, 1))]
        branches = [
            _branch(x, ("branch3x3_1", 192), ("branch3x3_2", 320, *reduce)),
            _branch(x, *wide, ("branch7x7x3_4", 192, *reduce)),
            _halved(x),
        ]
        return jnp.concatenate(branches, axis=-1)


class BlockE(nn.Module):
    """Mixed_7b and 7c, 8x8; the latter pools by maximum, which only this graph does."""

    pool_by_maximum: bool

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W D"]:
        pooled = nn.max_pool(x, (3, 3), (1, 1), "SAME") if self.pool_by_maximum else average_pool(x)
        single = _branch(x, ("branch3x3_1", 384))
        double = _branch(x, ("branch3x3dbl_1", 448), ("branch3x3dbl_2", 384, (3, 3)))
        branches = [
            _branch(x, ("branch1x1", 320)),
            _branch(single, ("branch3x3_2a", 384, (1, 3))),
            _branch(single, ("branch3x3_2b", 384, (3, 1))),
            _branch(double, ("branch3x3dbl_3a", 384, (1, 3))),
            _branch(double, ("branch3x3dbl_3b", 384, (3, 1))),
            _branch(pooled, ("branch_pool", 192)),
        ]
        return jnp.concatenate(branches, axis=-1)


def _maps(x: Array) -> dict[str, Array]:
    """What every convolution and block puts out, in order, by name; of the blocks C also their 1x1 branch."""
    maps: dict[str, Array] = {}

    def run(module: nn.Module, x: Array) -> Array:
        maps[str(module.name)] = module(x)
        return maps[str(module.name)]

    x = run(Unit(32, (3, 3), 2, "VALID", name="Conv2d_1a_3x3"), x)
    x = run(Unit(32, (3, 3), 1, "VALID", name="Conv2d_2a_3x3"), x)
    x = run(Unit(64, (3, 3), name="Conv2d_2b_3x3"), x)
    x = run(Unit(80, name="Conv2d_3b_1x1"), _halved(x))
    x = run(Unit(192, (3, 3), 1, "VALID", name="Conv2d_4a_3x3"), x)
    x = _halved(x)
    for letter, pool_channels in zip("bcd", (32, 64, 64), strict=True):
        x = run(BlockA(pool_channels, name=f"Mixed_5{letter}"), x)
    x = run(BlockB(name="Mixed_6a"), x)
    for letter, inner in zip("bcde", (128, 160, 160, 192), strict=True):
        name = f"Mixed_6{letter}"
        maps[name], maps[f"{name}/branch1x1"] = BlockC(inner, name=name)(x)
        x = maps[name]
    x = run(BlockD(name="Mixed_7a"), x)
    x = run(BlockE(False, name="Mixed_7b"), x)
    run(BlockE(True, name="Mixed_7c"), x)
    return maps


class Inception(nn.Module):
    """The graph from resized, normalised images on; any side of 75 or more will do, 299 is what it was made for."""

    @nn.compact
    def __call__(self, x: Float[Array, "B H W 3"]) -> InceptionFeatures:
        maps = _maps(x)
        pool = jnp.mean(maps["Mixed_7c"], axis=(1, 2))
        spatial = maps["Mixed_6d/branch1x1"][..., :SPATIAL_CHANNELS]
        head = nn.Dense(CLASSES, use_bias=False, precision=jax.lax.Precision.HIGHEST, name="fc")
        return InceptionFeatures(pool, spatial.reshape(len(x), -1), head(pool))


class InceptionMaps(nn.Module):
    """The same graph with the same parameters, tapped on its way.

    Attributes:
      taps: names of the convolutions and blocks whose outputs are returned, in that order.
    """

    taps: tuple[str, ...]

    @nn.compact
    def __call__(self, x: Float[Array, "B H W 3"]) -> list[Float[Array, "B _ _ _"]]:
        maps = _maps(x)
        return [maps[tap] for tap in self.taps]


def tf1_bilinear(size_in: int, size_out: int) -> Float[np.ndarray, "O I"]:
    """TF1's first bilinear resize of one axis, as a matrix.

    Output o reads place o * size_in / size_out: corners count, there are no half pixels, and nothing is averaged when
    an image shrinks. Past the last pixel the last is repeated.
    """
    place = np.arange(size_out) * size_in / size_out
    low = np.floor(place).astype(int)
    weight = place - low
    matrix = np.zeros((size_out, size_in))
    rows = np.arange(size_out)
    np.add.at(matrix, (rows, low), 1 - weight)
    np.add.at(matrix, (rows, np.minimum(low + 1, size_in - 1)), weight)
    return matrix


def prepare(images: UInt8[Array, "B H W 3"]) -> Float[Array, "B 299 299 3"]:
    """Images as the graph reads them: resized to 299x299 and moved to -1..1 by (x - 128) / 128."""
    rows, columns = (jnp.asarray(tf1_bilinear(size, SIZE), jnp.float32) for size in images.shape[1:3])
    x = images.astype(jnp.float32)
    # With 0..255 as input, products of reduced precision would cost up to half a grey level.
    x = jnp.einsum("oh,bhwc,pw->bopc", rows, x, columns, precision=jax.lax.Precision.HIGHEST)
    return (x - 128) / 128


def features(params: Params, images: UInt8[Array, "B H W 3"]) -> InceptionFeatures:
    """Features of images of 0..255, of any one size."""
    return call(Inception(), params, prepare(images))


def init(key: Array) -> Params:
    """Random parameters, float32."""
    return Inception().init(key, jnp.zeros((1, 75, 75, 3)))["params"]


def param_shapes() -> Params:
    """The tree of `ShapeDtypeStruct`s that `init` would return, without allocating."""
    return jax.tree.map(lambda shape: shape, _param_shapes())  # The caller's own.


@functools.cache
def _param_shapes() -> Params:
    return jax.eval_shape(init, jax.random.key(0))
