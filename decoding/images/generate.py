"""`generate_images`: classes in, pictures out, by one model or by several in turn.

A *stage* is a model and how far it goes. VAR is one stage that makes all scales. Collaborative decoding (CoDe, Chen et
al. 2024) is two: a large drafter makes the first N scales, which are few tokens and decide what the picture shows, and
a small refiner the rest, which are most of the tokens. What is handed over is the running sum f_hat and the features
read from it, not tokens and not a cache: the models' widths differ, so the refiner computes keys and values of its own
for the prefix, in one pass. Every stage is a program of its own, so the drafter's cache is gone before the refiner's
exists. The decoder is another program, run on few images at a time.
"""

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from decoding.images.scales import Drawing, Draws, Kept, Sketch, run
from models.errors import UserError
from models.images import vqvae
from models.images.config import VARConfig, VQVAEConfig
from models.sharding import mesh_of, on_mesh, place_rows
from models.transformer import Params

DECODED_AT_ONCE = 4


class Tokenizer(NamedTuple):
    """A VQ-VAE: its shape and parameters."""

    config: VQVAEConfig
    params: Params


class Stage(NamedTuple):
    """A transformer and what it makes.

    Attributes:
      config: its shape.
      params: its parameters, layers as a list.
      last: one past the last scale that it makes; it begins where the stage before ended.
      drawing: how its codes are drawn, one setting or one per image.
    """

    config: VARConfig
    params: Params
    last: int
    drawing: Drawing | Sequence[Drawing] = Drawing()


@dataclasses.dataclass(frozen=True)
class Generated:
    """Finished images.

    Attributes:
      pixels: the images.
      indices: codes per scale.
      f_hat: the features that were decoded.
      stage_seconds: per stage.
      decode_seconds: from f_hat to pixels.
    """

    pixels: UInt8[np.ndarray, "B H W 3"]
    indices: list[Int[np.ndarray, "B _"]]
    f_hat: Float[np.ndarray, "B h w E"]
    stage_seconds: tuple[float, ...]
    decode_seconds: float


def code_stages(
    drafter: tuple[VARConfig, Params],
    refiner: tuple[VARConfig, Params],
    draft_scales: int,
    drafting: Drawing | Sequence[Drawing] = Drawing(top_k=600),
    refining: Drawing | Sequence[Drawing] = Drawing(top_k=600),
) -> list[Stage]:
    """CoDe with the drafter for the first `draft_scales` scales (N) and the refiner for the others.

    Raises:
      UserError: N leaves nothing to one of the two.
    """
    scales = drafter[0].num_scales
    if not 1 <= draft_scales < scales:
        raise UserError(f"draft_scales must be 1 to {scales - 1} of {scales} scales, got {draft_scales}")
    return [Stage(*drafter, draft_scales, drafting), Stage(*refiner, scales, refining)]


def generate_images(
    tokenizer: Tokenizer,
    stages: Sequence[Stage],
    labels: Sequence[int],
    *,
    seeds: int | Sequence[int] | np.ndarray = 0,
    kept: Kept | None = None,
    decoded_at_once: int = DECODED_AT_ONCE,
) -> Generated:
    """One image per label.

    Args:
      tokenizer: the VQ-VAE that all stages were trained on.
      stages: in turn; the last one goes to the last scale. On a mesh, the one that the first one's parameters lie on.
      labels: classes; `num_classes` is none.
      seeds: one per image, or a first one from which they count up. An image depends on its own class, seed and
        settings alone.
      kept: parts of given images that stay (`keep`).
      decoded_at_once: images per call of the decoder.

    Raises:
      UserError: a label that is no class, stages that do not fit each other or the tokenizer, or that leave scales out,
        or settings, seeds or kept images that are not one per label.
    """
    batch = len(labels)
    _check(tokenizer.config, stages, labels, decoded_at_once)
    if kept is not None and len(kept.mask) != batch:
        raise UserError(f"kept has {len(kept.mask)} images for {batch} labels")
    mesh = mesh_of(stages[0].params)
    keys = jax.vmap(jax.random.key)(jnp.array(_seeds(seeds, batch), jnp.uint32))
    codes = {name: tokenizer.params[name] for name in ("codebook", "phi")}
    sketch = Sketch.empty(tokenizer.config, batch, codes["codebook"]["embedding"].dtype)
    classes = jnp.array(labels, jnp.int32)
    seconds, first = [], 0
    with on_mesh(mesh):
        for stage in stages:
            draws = Draws.of(_per_image(stage.drawing, batch), keys, tokenizer.config.num_scales)
            if mesh is not None:
                classes, draws, sketch, kept = place_rows(mesh, (classes, draws, sketch, kept))
            started = time.perf_counter()
            arguments = (tokenizer.config, stage.config, codes, stage.params, classes, draws, sketch)
            sketch = jax.block_until_ready(run(*arguments, first, stage.last, kept))
            seconds.append(time.perf_counter() - started)
            first = stage.last
    f_hat = np.asarray(sketch.f_hat)
    started = time.perf_counter()
    pixels = decode_pixels(tokenizer, f_hat, decoded_at_once)
    finished = time.perf_counter()
    return Generated(pixels, [np.asarray(index) for index in sketch.indices], f_hat, tuple(seconds), finished - started)


def decode_pixels(
    tokenizer: Tokenizer, f_hat: Float[np.ndarray, "B h w E"], at_once: int = DECODED_AT_ONCE
) -> UInt8[np.ndarray, "B H W 3"]:
    """Images of features, `at_once` at a time, the last ones filled up so that there is one program; rounded."""
    size = min(at_once, len(f_hat))
    parts = []
    for start in range(0, len(f_hat), size):
        part = f_hat[start : start + size]
        filled = np.concatenate([part, np.repeat(part[-1:], size - len(part), axis=0)])
        parts.append(np.asarray(pixels_of(tokenizer.config, tokenizer.params, jnp.asarray(filled)))[: len(part)])
    return np.concatenate(parts)


def keep(tokenizer: Tokenizer, images: UInt8[np.ndarray, "B H W 3"], mask: np.ndarray) -> Kept:
    """Given images of which what `mask` leaves out stays: in-painting, out-painting, and editing by class.

    Args:
      tokenizer: the VQ-VAE.
      images: of its size.
      mask: bool `[H, W]` or `[B, H, W]`, true where new content goes; a cell of the latent map is new if any of its
        pixels is.

    Raises:
      UserError: images of another size, or a mask of another shape.
    """
    config, side = tokenizer.config, tokenizer.config.image_size
    if images.shape[1:] != (side, side, 3) or images.dtype != np.uint8:
        raise UserError(f"images must be uint8 [B, {side}, {side}, 3], got {images.dtype} {list(images.shape)}")
    if mask.dtype != bool or mask.shape not in ((side, side), images.shape[:3]):
        wanted = f"bool [{side}, {side}] or {list(images.shape[:3])}"
        raise UserError(f"the mask must be {wanted}, got {mask.dtype} {list(mask.shape)}")
    cells = config.scales[-1]
    whole = np.broadcast_to(mask, images.shape[:3]).reshape(len(images), cells, side // cells, cells, side // cells)
    indices = _encode(config, tokenizer.params, images)
    return Kept(indices, jnp.array(whole.any(axis=(2, 4))))


@functools.partial(jax.jit, static_argnames=("config",))
def pixels_of(config: VQVAEConfig, params: Params, f_hat: Float[Array, "B h w E"]) -> UInt8[Array, "B H W 3"]:
    """The decoder as one program: images of features, rounded."""
    images = vqvae.decode(config, params, f_hat)
    return jnp.round((images + 1) * 127.5).astype(jnp.uint8)


@functools.partial(jax.jit, static_argnames=("config",))
def _encode(config, params, images):
    dtype = params["codebook"]["embedding"].dtype
    return vqvae.encode(config, params, images.astype(dtype) / 127.5 - 1)


def _check(tokenizer: VQVAEConfig, stages: Sequence[Stage], labels: Sequence[int], decoded_at_once: int) -> None:
    if not labels or not stages:
        raise UserError("there is no class to make an image of" if stages else "there is no model to make images with")
    if decoded_at_once < 1:
        raise UserError(f"decoded_at_once must be at least 1, got {decoded_at_once}")
    first = 0
    for number, stage in enumerate(stages, start=1):
        for name in ("scales", "vocab_size", "latent_channels"):
            found, wanted = getattr(stage.config, name), getattr(tokenizer, name)
            if found != wanted:
                raise UserError(f"model {number} was made for {name} {found}, the tokenizer has {wanted}")
        if not first < stage.last <= tokenizer.num_scales:
            raise UserError(
                f"model {number} is to make scales {first} to {stage.last - 1}: expected at least one, and at most up "
                f"to {tokenizer.num_scales - 1}"
            )
        if min(labels) < 0 or max(labels) > stage.config.num_classes:
            wrong = min(labels) if min(labels) < 0 else max(labels)
            raise UserError(f"class {wrong} is not one of model {number}'s 0 to {stage.config.num_classes - 1}")
        first = stage.last
    if first != tokenizer.num_scales:
        raise UserError(f"the models make {first} of {tokenizer.num_scales} scales")


def _per_image(drawing: Drawing | Sequence[Drawing], batch: int) -> list[Drawing]:
    drawings = [drawing] * batch if isinstance(drawing, Drawing) else list(drawing)
    if len(drawings) != batch:
        raise UserError(f"drawing has {len(drawings)} entries for {batch} images")
    return drawings


def _seeds(seeds: int | Sequence[int] | np.ndarray, batch: int) -> list[int]:
    given = np.asarray(seeds)
    found = [int(seed) for seed in (given if given.ndim else given + np.arange(batch))]
    if len(found) != batch:
        raise UserError(f"seeds has {len(found)} entries for {batch} images")
    if min(found) < 0 or max(found) >= 2**32:
        raise UserError(f"seeds must be in [0, 2^32), got {min(found) if min(found) < 0 else max(found)}")
    return found
