"""Pictures for people: grids of images, an image scale by scale, and both as PNG."""

import base64
import functools
import io
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8
from PIL import Image

from decoding.images.generate import DECODED_AT_ONCE, Tokenizer, decode_pixels
from models.images import quantiser, vqvae
from models.images.config import VQVAEConfig

_PAPER = 255


def tiled(
    images: UInt8[np.ndarray, "N H W 3"], columns: int, gap: int = 2, enlarged: int = 1
) -> UInt8[np.ndarray, "H2 W2 3"]:
    """Images in rows of `columns`, white between them, each pixel `enlarged` times as wide and high."""
    count, height, width, _ = images.shape
    rows = -(-count // columns)
    page = np.full((rows, columns, height + gap, width + gap, 3), _PAPER, np.uint8)
    page.reshape(rows * columns, height + gap, width + gap, 3)[:count, :height, :width] = images
    whole = page.transpose(0, 2, 1, 3, 4).reshape(rows * (height + gap), columns * (width + gap), 3)
    whole = whole[: rows * (height + gap) - gap, : columns * (width + gap) - gap]
    return whole.repeat(enlarged, axis=0).repeat(enlarged, axis=1)


def png(pixels: UInt8[np.ndarray, "H W 3"]) -> bytes:
    """An image as the content of a PNG file."""
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG", optimize=True)
    return content.getvalue()


def data_uri(pixels: UInt8[np.ndarray, "H W 3"]) -> str:
    """An image as something that a page can show without another file."""
    return "data:image/png;base64," + base64.b64encode(png(pixels)).decode("ascii")


def build_up(
    tokenizer: Tokenizer, indices: Sequence[Int[np.ndarray, "B _"]], at_once: int = DECODED_AT_ONCE
) -> UInt8[np.ndarray, "B K H W 3"]:
    """What images look like after each scale: the decoder's view of f_hat so far."""
    codes = {name: tokenizer.params[name] for name in ("codebook", "phi")}
    f_hats = np.asarray(_sums(tokenizer.config, codes, [jnp.asarray(index) for index in indices]))
    pixels = decode_pixels(tokenizer, f_hats.reshape(-1, *f_hats.shape[2:]), at_once)
    return pixels.reshape(*f_hats.shape[:2], *pixels.shape[1:])


@functools.partial(jax.jit, static_argnames=("config",))
def _sums(config: VQVAEConfig, codes, indices) -> Float[Array, "B K h w E"]:
    parts = [quantiser.contribution(config, codes, k, index) for k, index in enumerate(indices)]
    return jnp.cumsum(jnp.stack(parts, axis=1), axis=1)


def reconstructions(tokenizer: Tokenizer, images: UInt8[np.ndarray, "B H W 3"]) -> UInt8[np.ndarray, "B H W 3"]:
    """What the tokenizer alone makes of images: the best that models of its codes can hope for."""
    return np.asarray(_reconstructed(tokenizer.config, tokenizer.params, images))


@functools.partial(jax.jit, static_argnames=("config",))
def _reconstructed(config: VQVAEConfig, params, images):
    dtype = params["codebook"]["embedding"].dtype
    indices = vqvae.encode(config, params, images.astype(dtype) / 127.5 - 1)
    made = vqvae.decode(config, params, quantiser.accumulate(config, params, indices))
    return jnp.round((made + 1) * 127.5).astype(jnp.uint8)
