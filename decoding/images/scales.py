"""The next-scale loop (VAR, section 3): every pass of the transformer draws all codes of one scale at once.

`run` makes scales `first` to `last - 1`. Scales before `first`, if there are any, were made by somebody else: what they
left, the features that the transformer reads, is the *prefix*, and the first pass reads all of it together with scale
`first`. So VAR is `run` from 0 to K, and collaborative decoding is `run` from 0 to N with one model and from N to K
with another (`decoding/images/generate.py`).

Scales are unrolled, for each has a shape of its own; one compilation serves a batch size. Draws are keyed by request
and scale: a row's image is a function of its own class, key and settings, whoever its neighbours are.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from decoding.sampling import Sampling, SamplingParameters, argmax, batch_sampling, filtered, invert
from models.errors import UserError
from models.images import quantiser, var
from models.images.config import VARConfig, VQVAEConfig, scale_starts
from models.sharding import keep_rows, row_wise
from models.transformer import FEW_LAYERS, Params, stack_layers


@dataclasses.dataclass(frozen=True)
class Drawing:
    """How codes are drawn; the defaults are those of the published FID runs of VAR (CoDe: top_k 600).

    Attributes:
      guidance: extra weight of the class at the last scale, growing from 0 at the first: t = guidance * k / (K - 1) and
        scores (1 + t) * conditional - t * unconditional.
      top_k: codes kept; 0 means all.
      top_p: probability mass kept of those.
      temperature: of what is left; the filters do not see it. 0 means the best code. One for all scales, or one per
        scale (CoDe: 1.1 for scales 0 to 6, 1.0 for 7 to 9).
      smooth: mix code vectors by Gumbel-softmax weights instead of taking the code drawn, for smoother pictures; not
        for measurements.

    Raises:
      UserError: a value outside its range.
    """

    guidance: float = 1.5
    top_k: int = 900
    top_p: float = 0.96
    temperature: float | tuple[float, ...] = 1.0
    smooth: bool = False

    def __post_init__(self):
        for temperature in self.temperature if isinstance(self.temperature, tuple) else (self.temperature,):
            Sampling(temperature, self.top_k, self.top_p)
        if self.guidance < 0:
            raise UserError(f"guidance must be 0 (off) or more, got {self.guidance}")

    def temperatures(self, num_scales: int) -> tuple[float, ...]:
        """One per scale.

        Raises:
          UserError: there are some, but not `num_scales`.
        """
        found = self.temperature if isinstance(self.temperature, tuple) else (self.temperature,) * num_scales
        if len(found) != num_scales:
            raise UserError(f"temperature has {len(found)} entries for {num_scales} scales")
        return found


@struct.dataclass
class Draws:
    """`Drawing` as arrays of batch rows; what decides the program is static.

    Attributes:
      keys: typed PRNG keys, one per image.
      guidance: see `Drawing`.
      temperature: see `Drawing`; per scale.
      filters: top-k and top-p, at temperature 1.
      guided: some row has guidance; otherwise the unconditional half is not run.
      greedy: every row takes the best code at every scale.
      smooth: see `Drawing`.
    """

    keys: Array
    guidance: Float[Array, "B"]
    temperature: Float[Array, "B K"]
    filters: SamplingParameters
    guided: bool = struct.field(pytree_node=False)
    greedy: bool = struct.field(pytree_node=False)
    smooth: bool = struct.field(pytree_node=False)

    @classmethod
    def of(cls, drawings: Sequence[Drawing], keys: Array, num_scales: int) -> "Draws":
        """One per image.

        Raises:
          UserError: some images are to be smooth and others not, or temperatures do not fit the scales.
        """
        if len({drawing.smooth for drawing in drawings}) > 1:
            raise UserError("images of one batch must all be smooth or all not")
        temperatures = [drawing.temperatures(num_scales) for drawing in drawings]
        return cls(
            keys=keys,
            guidance=jnp.array([drawing.guidance for drawing in drawings], jnp.float32),
            temperature=jnp.array(temperatures, jnp.float32),
            filters=batch_sampling([Sampling(1.0, drawing.top_k, drawing.top_p) for drawing in drawings]),
            guided=any(drawing.guidance for drawing in drawings),
            greedy=not any(map(any, temperatures)),
            smooth=drawings[0].smooth,
        )


@struct.dataclass
class Kept:
    """Parts of given images that stay as they are, in every scale (VAR, section 5.3).

    Attributes:
      indices: their codes, per scale.
      mask: where new codes count, at the side of the last scale.
    """

    indices: list[Int[Array, "B _"]]
    mask: Bool[Array, "B H W"]


@struct.dataclass
class Sketch:
    """Images up to some scale: all that the next scale, whoever makes it, needs to know.

    Attributes:
      f_hat: the sum of all scales so far.
      prefix: what the transformer reads at the scales after the first, up to the next one, in order.
      indices: codes per scale.
    """

    f_hat: Float[Array, "B H W E"]
    prefix: Float[Array, "B T E"]
    indices: list[Int[Array, "B _"]]

    @classmethod
    def empty(cls, tokenizer: VQVAEConfig, batch: int, dtype=jnp.float32) -> "Sketch":
        """Before the first scale."""
        return cls(
            quantiser.first_f_hat(tokenizer, batch, dtype), jnp.zeros((batch, 0, tokenizer.latent_channels), dtype), []
        )


@functools.partial(jax.jit, static_argnames=("tokenizer", "config", "first", "last"))
def run(
    tokenizer: VQVAEConfig,
    config: VARConfig,
    codes: Params,
    params: Params,
    labels: Int[Array, "B"],
    draws: Draws,
    sketch: Sketch,
    first: int,
    last: int,
    kept: Kept | None = None,
) -> Sketch:
    """Makes scales `first` to `last - 1`.

    Args:
      tokenizer: shape of the VQ-VAE.
      config: shape of the transformer.
      codes: parameters of the quantiser, `codebook` and `phi`.
      params: of the transformer, layers as a list.
      labels: classes.
      draws: how codes are drawn.
      sketch: scales 0 to `first - 1`.
      first: first scale.
      last: one past the last.
      kept: what stays of given images.
    """
    starts = scale_starts(config.scales)
    if draws.guided:
        # With and without the class side by side, so that both lie on the devices of their row.
        labels = jnp.stack([labels, jnp.full_like(labels, config.num_classes)], axis=1).reshape(-1)
    c = var.class_features(params, labels)
    in_a_loop = loops(config.depth)
    params = stack_layers(params) if in_a_loop else params
    modulated = var.modulations(config, params, c)
    cache: var.Cache | None = var.init_cache(config, len(labels), starts[last], c.dtype, stacked=in_a_loop)
    f_hat, features, prefix, indices = sketch.f_hat, sketch.prefix, [sketch.prefix], list(sketch.indices)
    for k in range(first, last):
        begin = 0 if k == first else k
        both = jnp.repeat(features, 2, axis=0) if draws.guided else features
        x = var.inputs(config, params, c, both, begin, k + 1)
        hidden, cache = var.forward(config, params, c, x, begin, k + 1, cache, modulated)
        # Of a prefix only the next scale has codes to be drawn.
        scores = var.logits(config, params, hidden[:, starts[k] - starts[begin] :], c)
        if draws.guided:
            conditional, unconditional = scores[::2], scores[1::2]
            t = (draws.guidance * (k / (config.num_scales - 1))).astype(scores.dtype)[:, None, None]
            scores = (1 + t) * conditional - t * unconditional
        index, vectors = draw_codes(codes["codebook"]["embedding"], scores, draws, k)
        indices.append(index)
        f_hat, following = _step(tokenizer, codes, k, f_hat, vectors, kept)
        if following is not None:
            features = following
            prefix.append(following)
    return keep_rows(Sketch(f_hat, jnp.concatenate(prefix, axis=1), indices))


def loops(depth: int) -> bool:
    """Whether a model's layers run in a loop, for which they are put together first. Every scale is a pass through all
    of them, so that a deep model's program is of hundreds of layers, which take a GPU's compiler minutes."""
    return jax.default_backend() == "gpu" and depth > FEW_LAYERS


def draw_codes(
    codebook: Float[Array, "V E"], scores: Float[Array, "B T V"], draws: Draws, k: int
) -> tuple[Int[Array, "B T"], Float[Array, "B T E"]]:
    """Codes of scale k, by inversion of what the filters leave, and the vectors that stand for them; smooth mixtures of
    vectors have noise of their own."""
    if draws.greedy and not draws.smooth:
        index = argmax(scores)
        return index, codebook[index]
    index, weights = row_wise(functools.partial(_draw_codes, k), scores, draws)
    return index, codebook[index] if weights is None else weights @ codebook


def _draw_codes(k, scores, draws):
    batch, tokens, size = scores.shape
    per_token: Any = jax.tree.map(lambda setting: jnp.repeat(setting, tokens), draws.filters)
    left = filtered(scores.reshape(-1, size), per_token).reshape(scores.shape)
    keys = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, k)))(draws.keys)
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (tokens, 2), scores.dtype))(keys[:, 0])
    temperature = draws.temperature[:, k].astype(scores.dtype)[:, None, None]
    # At temperature 0 the best codes alone have mass, and 0 takes the first of them.
    uniform = jnp.where(temperature > 0, uniform, 0)
    least = jnp.finfo(scores.dtype).tiny
    mass = jnp.exp((left - jnp.max(left, axis=-1, keepdims=True)) / jnp.maximum(temperature, least))
    index = invert(mass.reshape(-1, size), uniform.reshape(-1, 2)).reshape(batch, tokens)
    if not draws.smooth:
        return index, None
    noise = jax.vmap(lambda key: jax.random.gumbel(key, (tokens, size), scores.dtype))(keys[:, 1])
    ratio = k / (draws.temperature.shape[1] - 1)
    return index, jax.nn.softmax((left * (1 + ratio) + noise) / max(0.27 * (1 - 0.95 * ratio), 0.005), axis=-1)


def _step(tokenizer, codes, k, f_hat, vectors, kept):
    if kept is None:
        return quantiser.step(tokenizer, codes, k, f_hat, vectors)
    new = quantiser.contribution(tokenizer, codes, k, vectors)
    given = quantiser.contribution(tokenizer, codes, k, kept.indices[k])
    f_hat = f_hat + jnp.where(kept.mask[..., None], new, given)
    return f_hat, quantiser.tokens_of(tokenizer, k + 1, f_hat) if k < tokenizer.num_scales - 1 else None
