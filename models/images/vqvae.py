"""The multi-scale VQ-VAE as functions of its parameters (VAR, section 3.2): images to codes, f_hat to images.

    encode(config, params, images) -> indices per scale        decode(config, params, f_hat) -> images

What lies between, codes to f_hat and to the transformer's inputs, is `models.images.quantiser`. Parameters:

    {'encoder', 'decoder', 'quant': {'kernel', 'bias'}, 'post_quant': likewise, 'codebook': {'embedding' [V, C]},
     'phi': [{'kernel', 'bias'}, ...]}

The convolutional parts run in the dtype of their own parameters, so that these may be bfloat16 for fast decoding; the
quantiser never runs below float32.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from models.attention import wide
from models.images import quantiser
from models.images.autoencoder import Decoder, Encoder
from models.images.config import VQVAEConfig
from models.layers import call
from models.transformer import Params


def init(config: VQVAEConfig, key: Array, dtype=jnp.float32) -> Params:
    """Random parameters: kernels of std 1/sqrt(fan-in), codes of std 1/sqrt(C), biases zero."""
    encoder_key, decoder_key, codebook_key, *conv_keys = jax.random.split(key, 5 + config.phis)
    C, size, side = config.latent_channels, config.scales[-1], config.image_size
    latents, image = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, size, size, C), (1, side, side, 3)))
    quant, post_quant, *phi = (_draw(_conv(C), k, latents) for k in conv_keys)
    params = {
        "encoder": _draw(Encoder(config), encoder_key, image),
        "decoder": _draw(Decoder(config), decoder_key, latents),
        "quant": quant,
        "post_quant": post_quant,
        "codebook": {"embedding": jax.random.normal(codebook_key, (config.vocab_size, C)) * C**-0.5},
        "phi": phi,
    }
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def param_shapes(config: VQVAEConfig, dtype=jnp.float32) -> Params:
    """The tree of `ShapeDtypeStruct`s that `init` would return, without allocating."""
    return jax.tree.map(lambda shape: shape, _param_shapes(config, jnp.result_type(dtype)))  # The caller's own.


@functools.cache
def _param_shapes(config: VQVAEConfig, dtype: Any) -> Params:
    return jax.eval_shape(functools.partial(init, config, dtype=dtype), jax.random.key(0))


def features(config: VQVAEConfig, params: Params, images: Float[Array, "B H W 3"]) -> Float[Array, "B h w C"]:
    """What the quantiser reads of images in [-1, 1], float32 or wider; sides must be multiples of 2^(levels - 1)."""
    x = call(Encoder(config), params["encoder"], _as_kernels(params["encoder"]["conv_in"], images))
    x = call(_conv(config.latent_channels), params["quant"], x)
    return x.astype(wide(x.dtype))


def encode(config: VQVAEConfig, params: Params, images: Float[Array, "B H W 3"]) -> list[Int[Array, "B _"]]:
    """Indices of every scale, `[B, p_k^2]` row by row, int32, of images in [-1, 1] of side `config.image_size`.

    At full matrix precision whatever the default, like the quantiser: less, as in TF32, would change codes.
    """
    with jax.default_matmul_precision("highest"):
        return quantiser.encode(config, params, features(config, params, images))


def reconstruct(config: VQVAEConfig, params: Params, f_hat: Float[Array, "B h w C"]) -> Float[Array, "B H W 3"]:
    """What the decoder makes of f_hat, float32 or wider and unbounded, as the losses of training read it."""
    x = call(_conv(config.latent_channels), params["post_quant"], _as_kernels(params["post_quant"], f_hat))
    images = call(Decoder(config), params["decoder"], x)
    return images.astype(wide(images.dtype))


def decode(config: VQVAEConfig, params: Params, f_hat: Float[Array, "B h w C"]) -> Float[Array, "B H W 3"]:
    """Images in [-1, 1], float32 or wider."""
    return jnp.clip(reconstruct(config, params, f_hat), -1, 1)


def _conv(channels: int) -> nn.Conv:
    return nn.Conv(channels, (3, 3))


def _draw(module: nn.Module, key: Array, inputs: jax.ShapeDtypeStruct) -> Params:
    """A module's initial parameters, without running it on inputs as large as images."""
    return module.lazy_init(key, inputs)["params"]


def _as_kernels(conv: Params, x: Array) -> Array:
    """Inputs in the dtype of the first kernel: flax would widen narrow kernels to wide inputs instead."""
    return x.astype(conv["kernel"].dtype)
