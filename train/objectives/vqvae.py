"""A multi-scale VQ-VAE: images to codes and back (VAR, section 3.2; the losses around it are VQGAN's).

With x an image, y what the decoder makes of it and f_hat_k the sum of the first k + 1 scales' codes, its loss is

    l1 |x - y| + l2 (x - y)^2 + perceptual d(x, y) + gan lambda (-D(y))
      + quantiser mean over k of [commitment (sg f_hat_k - f)^2 + (f_hat_k - sg f)^2]

with means over pixels and channels; beside it the discriminator D learns by its own loss. One gradient serves both
players: each sees the other as a constant. The decoder's gradient passes the quantiser straight through. What training
leaves behind is a VQ-VAE directory.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from models import sharding
from models.errors import UserError
from models.formats import image_models as files
from models.images import quantiser, vqvae
from models.images.config import VQVAEConfig
from models.layers import call
from models.schema import nearest, require
from train.objectives.adversary import Discriminator, adaptive_weight, hinge
from train.objectives.image_batch import pixels, present
from train.objectives.objective import Batch, Objective, Params, Replaced, Sums
from train.objectives.perceptual import FEATURE_NETS, FeatureNet, perceptual_distance


@dataclasses.dataclass(frozen=True)
class PerceptualConfig:
    """The perceptual term.

    Attributes:
      net: the network whose features are compared, one of `perceptual.FEATURE_NETS`; None is no such term.
      weights: path of its weights.
      weight: of the term.
    """

    net: str | None = None
    weights: str | None = None
    weight: float = 1.0

    def __post_init__(self):
        require(self.weight > 0, "objective.perceptual.weight must be positive", self.weight)
        if self.net is not None and self.net not in FEATURE_NETS:
            known = ", ".join(map(repr, FEATURE_NETS))
            hint = nearest(self.net, FEATURE_NETS)
            raise UserError(f"objective.perceptual.net must be None or one of {known}, got {self.net!r}{hint}")
        if self.net is None and self.weights is not None:
            raise UserError("objective.perceptual.weights are given, but no objective.perceptual.net to read them")
        if self.net is not None and self.weights is None:
            raise UserError(
                f"objective.perceptual.net is {self.net!r}: set objective.perceptual.weights to the file of its "
                "weights, or the net to None"
            )


@dataclasses.dataclass(frozen=True)
class GANConfig:
    """The adversarial term.

    Attributes:
      weight: of the term, before it is adapted; 0 is no discriminator.
      start_fraction: share of the run before which neither player learns from the other.
      width: channels of the discriminator's first layer.
      layers: times that it halves the sides.
    """

    weight: float = 0.0
    start_fraction: float = 0.22
    width: int = 64
    layers: int = 3

    def __post_init__(self):
        require(self.weight >= 0, "objective.gan.weight must not be negative", self.weight)
        require(0 <= self.start_fraction < 1, "objective.gan.start_fraction must lie in 0..1", self.start_fraction)
        require(self.width >= 1, "objective.gan.width must be at least 1", self.width)
        require(self.layers >= 1, "objective.gan.layers must be at least 1", self.layers)


@dataclasses.dataclass(frozen=True)
class VQVAEObjectiveConfig:
    """The section `objective` of a VQ-VAE job.

    Attributes:
      name: `vqvae`.
      model: its sizes.
      l1: weight of the absolute error, per pixel and channel in [-1, 1].
      l2: weight of the squared error.
      quantiser: weight of the quantiser's loss.
      commitment: within it, weight of what pulls the features to the codes.
      perceptual: the perceptual term.
      gan: the adversarial term.
      reset_every: steps after which codes that the batch did not choose at any scale are replaced by vectors that the
        batch looked codes up for; 0 never replaces any.
      reset_until: the share of the run after which no code is replaced, so that all are trained in the end.
    """

    reads: ClassVar[str] = "images"

    name: Literal["vqvae"]
    model: VQVAEConfig
    l1: float = 0.2
    l2: float = 1.0
    quantiser: float = 1.0
    commitment: float = 0.25
    perceptual: PerceptualConfig = PerceptualConfig()
    gan: GANConfig = GANConfig()
    reset_every: int = 0
    reset_until: float = 0.8

    def __post_init__(self):
        for name in ("l1", "l2", "quantiser", "commitment", "reset_every"):
            require(getattr(self, name) >= 0, f"objective.{name} must not be negative", getattr(self, name))
        require(0 <= self.reset_until <= 1, "objective.reset_until must lie in 0..1", self.reset_until)
        require(self.l1 + self.l2 > 0, "objective.l1 or objective.l2 must be positive", 0)

    @property
    def image_size(self) -> int:
        """Side of the images."""
        return self.model.image_size


class VQVAEObjective(Objective):
    """The `vqvae` objective.

    Trainable are `{'vqvae': ..., 'discriminator': ...}`, the latter where there is one; frozen is the feature net.
    """

    Config: ClassVar[type] = VQVAEObjectiveConfig
    product: ClassVar[str] = "vqvae"

    def __init__(self, config: VQVAEObjectiveConfig, classes: tuple[str, ...]):
        """`classes` make no difference."""
        self._config, self.model = config, config.model
        self._discriminator = Discriminator(config.gan.width, config.gan.layers)
        perceptual = config.perceptual
        self._net: FeatureNet | None = FEATURE_NETS[perceptual.net](str(perceptual.weights)) if perceptual.net else None
        self.base = None if self._net is None else self._net.shapes()

    @property
    def inputs(self) -> Mapping[str, str | None]:
        """The feature net."""
        return {"objective.perceptual.weights": self._config.perceptual.weights if self._net else None}

    def load_base(self, mesh: Mesh) -> Params:
        """The feature net."""
        assert self._net is not None
        return sharding.place_params(mesh, self._net.load())

    def init(self, key: Array, base: Params | None) -> Params:
        """Random parameters, float32."""
        keys = jax.random.split(key)
        params = {"vqvae": vqvae.init(self.model, keys[0])}
        if not self._config.gan.weight:
            return params
        side = self.model.image_size
        drawn = self._discriminator.lazy_init(keys[1], jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32))
        return {**params, "discriminator": drawn["params"]}

    def loss(self, trainable: Params, frozen: Params | None, batch: Batch, key: Array, progress: Array | float):
        """Mean over images of the sum of both players' losses."""
        config, params, images = self._config, self._cast(trainable["vqvae"]), pixels(batch)
        features = vqvae.features(self.model, params, images)
        f_hats, _ = quantiser.quantise(self.model, params, features)
        decoded, pull = self._decoded(params, quantiser.straight_through(features, f_hats[-1]))
        parts = self._reconstruction(frozen, images, decoded)
        parts["quantiser"] = config.quantiser * quantiser.quantiser_loss(features, f_hats, config.commitment)
        if config.gan.weight:
            gradient = jax.grad(
                lambda y: sum(jnp.sum(part) for part in self._reconstruction(frozen, images, y).values())
            )
            critic = self.compute.cast(trainable["discriminator"])
            ratio = adaptive_weight(pull, gradient(decoded), jax.grad(lambda y: self._fooled(critic, y).sum())(decoded))
            started = progress >= config.gan.start_fraction
            parts["adversarial"] = started * config.gan.weight * ratio * self._fooled(critic, decoded)
            parts["discriminator"] = started * self._told_apart(critic, images, decoded)
        weight = jnp.asarray(len(images), decoded.dtype)
        total = sum(jnp.sum(part) for part in parts.values())
        return (total, weight), {name: (jnp.sum(part), weight) for name, part in parts.items()}

    def replace(
        self, trainable: Params, frozen: Params | None, batch: Batch, step: Array, progress: Array, key: Array
    ) -> tuple[Params, Replaced]:
        """Every `reset_every` steps, other vectors for the codes that this batch did not choose."""
        if not self._config.reset_every:
            return trainable, None
        params = trainable["vqvae"]
        old = params["codebook"]["embedding"]
        codebook, replaced_V1 = jax.lax.cond(
            (step % self._config.reset_every == 0) & (progress <= self._config.reset_until),
            lambda: replace_unused(self.model, params, pixels(batch), key),
            lambda: (old, jnp.zeros((len(old), 1), bool)),
        )
        # What the average of the parameters forgets: other than these rows, nothing.
        others: dict[str, Replaced] = dict.fromkeys(trainable)
        replaced = {**others, "vqvae": {**dict.fromkeys(params), "codebook": {"embedding": replaced_V1}}}
        return {**trainable, "vqvae": {**params, "codebook": {"embedding": codebook}}}, replaced

    def evaluate(self, trainable: Params, frozen: Params | None, batch: Batch) -> Sums:
        """Squared error, signal-to-noise ratio, and how often an image's scales choose every code."""
        params, images, present_B = self._cast(trainable["vqvae"]), pixels(batch), present(batch)
        f_hats, indices = quantiser.quantise(self.model, params, vqvae.features(self.model, params, images))
        error_B = jnp.mean(jnp.square(vqvae.decode(self.model, params, f_hats[-1]) - images), axis=(1, 2, 3))
        decibels_B = 10 * jnp.log10(4 / jnp.maximum(error_B, 1e-10))
        count_KV = quantiser.usage(self.model, indices, present_B > 0)
        number = jnp.sum(present_B)
        return {
            "squared_error": (jnp.sum(error_B * present_B), number),
            "psnr": (jnp.sum(decibels_B * present_B), number),
            "codes": (count_KV.astype(error_B.dtype), number),
        }

    def report(self, means: dict[str, Any]) -> dict[str, float]:
        """Adds what the codebook is worth: the perplexity of its use and the share of codes that were used at all, over
        all scales; and the perplexity at each, which falls to 1 where a scale collapses to one code."""
        count_KV = np.asarray(means["codes"])
        used = {"perplexity": _perplexity(count_KV.sum(axis=0)), "codes_used": float(np.mean(count_KV.any(axis=0)))}
        by_scale = {f"scale_perplexity_{k}": _perplexity(count_V) for k, count_V in enumerate(count_KV)}
        return {"squared_error": means["squared_error"], "psnr": means["psnr"], **used, **by_scale}

    def export(self, directory: Path, trainable: Params, frozen: Params | None) -> None:
        """Writes a VQ-VAE directory; the discriminator has done its work."""
        files.save(directory, self.model, trainable["vqvae"], overwrite=True)

    def _cast(self, params):
        """The convolutions for the products of a step; codes stay as they are, however near they lie to each other."""
        return {**self.compute.cast(params), **{name: params[name] for name in ("codebook", "phi")}}

    def _decoded(self, params, f_hat):
        """Images, and the map from the gradient of a loss there to its gradient at the decoder's last kernel."""
        decoder = params["decoder"]

        def run(kernel):
            last = {**decoder["conv_out"], "kernel": kernel}
            return vqvae.reconstruct(self.model, {**params, "decoder": {**decoder, "conv_out": last}}, f_hat)

        return jax.vjp(run, decoder["conv_out"]["kernel"])

    def _reconstruction(self, frozen, images, decoded) -> dict[str, Float[Array, "B"]]:
        """Weighted parts per image of what the decoder answers for alone."""
        config, difference = self._config, decoded - images
        parts = {
            "l1": config.l1 * jnp.mean(jnp.abs(difference), axis=(1, 2, 3)),
            "l2": config.l2 * jnp.mean(jnp.square(difference), axis=(1, 2, 3)),
        }
        if self._net is not None:
            parts["perceptual"] = config.perceptual.weight * perceptual_distance(self._net, frozen, images, decoded)
        return parts

    def _fooled(self, critic, decoded) -> Float[Array, "B"]:
        """The decoder's adversarial loss per image; the discriminator is a constant."""
        return -jnp.mean(call(self._discriminator, jax.lax.stop_gradient(critic), decoded), axis=(1, 2))

    def _told_apart(self, critic, images, decoded) -> Float[Array, "B"]:
        """The discriminator's loss per image; the decoder is a constant."""
        true, made = (call(self._discriminator, critic, x) for x in (images, jax.lax.stop_gradient(decoded)))
        return hinge(true, made)


def _perplexity(counts: np.ndarray) -> float:
    """exp of the entropy of a choice that was made so many times each way."""
    shares = counts / counts.sum()
    return math.exp(-np.sum(shares * np.log(np.where(shares > 0, shares, 1))))


def replace_unused(
    config: VQVAEConfig, params: Params, images: Float[Array, "B H W 3"], key: Array
) -> tuple[Float[Array, "V C"], Bool[Array, "V 1"]]:
    """The codebook, in which random vectors that the quantiser looks codes up for stand in for codes not chosen.

    Args:
      config: the VQ-VAE.
      params: its parameters.
      images: in [-1, 1]; a code is unused if none of their vectors takes it at any scale.
      key: typed PRNG key.

    Returns:
      The codebook, and which of its rows are new.
    """
    features = vqvae.features(config, params, images)
    f_hats, indices = quantiser.quantise(config, params, features)
    residuals = [features, *(features - f_hat for f_hat in f_hats[:-1])]
    C = config.latent_channels
    sought = [quantiser.tokens_of(config, k, residual).reshape(-1, C) for k, residual in enumerate(residuals)]
    sought_NC = jnp.concatenate(sought)
    unused_V1 = jnp.sum(quantiser.usage(config, indices), axis=0)[:, None] == 0
    drawn_V = jax.random.randint(key, (config.vocab_size,), 0, len(sought_NC))
    codebook = params["codebook"]["embedding"]
    return jnp.where(unused_V1, sought_NC[drawn_V].astype(codebook.dtype), codebook), unused_V1
