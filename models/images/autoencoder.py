"""The convolutional halves of the VQ-VAE: images to latent maps and back (VQGAN's networks as VAR uses them).

Residual blocks of two 3x3 convolutions at every level, attention over all places at the lowest, and the sides halved
or doubled between levels. Published is: 32 groups in every group norm, width 160. Narrow networks have as many groups
as divide both 32 and their width: gcd(32, width), so widths below 32 work.

Everything is NHWC, the layout in which XLA convolves without transposing. Convolutions run in the dtype of parameters
and inputs, statistics and softmax in float32 or wider.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from models.images.config import VQVAEConfig
from models.images.convolution import Conv3x3
from models.linear import wide_einsum


def _norm(x: Array, name: str) -> Array:
    return nn.GroupNorm(math.gcd(32, x.shape[-1]), epsilon=1e-6, use_fast_variance=False, name=name)(x)


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 convolution on x where the width changes."""

    width: int

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W D"]:
        h = Conv3x3(self.width, name="conv_1")(nn.silu(_norm(x, "norm_1")))
        h = Conv3x3(self.width, name="conv_2")(nn.silu(_norm(h, "norm_2")))
        return h + (x if x.shape[-1] == self.width else nn.Conv(self.width, (1, 1), name="shortcut")(x))


class SelfAttention(nn.Module):
    """x plus attention of one head over all places of the map."""

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        B, H, W, C = x.shape
        qkv = nn.Conv(3 * C, (1, 1), name="qkv")(_norm(x, "norm")).reshape(B, H * W, 3, C)
        q_BTC, k_BTC, v_BTC = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        scores = wide_einsum("BTC,BSC->BTS", q_BTC, k_BTC) * C**-0.5
        mixed = jnp.einsum("BTS,BSC->BTC", jax.nn.softmax(scores, axis=-1).astype(x.dtype), v_BTC)
        return x + nn.Conv(C, (1, 1), name="out")(mixed.reshape(B, H, W, C))


class Level(nn.Module):
    """The residual blocks of one resolution, each followed by attention where `attends`."""

    width: int
    blocks: int
    attends: bool
    resample: str | None

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 D"]:
        for i in range(self.blocks):
            x = ResBlock(self.width, name=f"block_{i}")(x)
            x = SelfAttention(name=f"attention_{i}")(x) if self.attends else x
        if self.resample == "half":
            # A zero row and column on the far sides only, as the published weights expect.
            x = nn.Conv(self.width, (3, 3), 2, padding=((0, 1), (0, 1)), name="resample")(x)
        if self.resample == "double":
            x = Conv3x3(self.width, name="resample")(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2))
        return x


class Middle(nn.Module):
    """Block, attention, block at the lowest resolution."""

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        x = ResBlock(x.shape[-1], name="block_0")(x)
        return ResBlock(x.shape[-1], name="block_1")(SelfAttention(name="attention")(x))


class Encoder(nn.Module):
    """Images to latent maps; level 0 has full resolution."""

    config: VQVAEConfig

    @nn.compact
    def __call__(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B h w C"]:
        c, last = self.config, len(self.config.multipliers) - 1
        x = Conv3x3(c.width, name="conv_in")(images)
        for i, width in enumerate(c.widths):
            x = Level(width, c.blocks, i == last, "half" if i < last else None, name=f"level_{i}")(x)
        x = Middle(name="middle")(x)
        return Conv3x3(c.latent_channels, name="conv_out")(nn.silu(_norm(x, "norm_out")))


class Decoder(nn.Module):
    """Latent maps to images, from the lowest level up; level 0 has full resolution here too."""

    config: VQVAEConfig

    @nn.compact
    def __call__(self, latents: Float[Array, "B h w C"]) -> Float[Array, "B H W 3"]:
        c, last = self.config, len(self.config.multipliers) - 1
        x = Middle(name="middle")(Conv3x3(c.widths[-1], name="conv_in")(latents))
        for i in reversed(range(last + 1)):
            x = Level(c.widths[i], c.blocks + 1, i == last, "double" if i > 0 else None, name=f"level_{i}")(x)
        return Conv3x3(3, name="conv_out")(nn.silu(_norm(x, "norm_out")))
