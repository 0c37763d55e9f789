"""What the objectives share that teach a VAR transformer: codes of images by a frozen tokenizer, and teacher forcing.

Images become codes on the fly, in float32 at full precision; the transformer reads what the tokenizer makes of the true
codes of the scales before (`quantiser.teacher_inputs`). For a share of the images the class is withheld, so that one
network serves with and without it (classifier-free guidance).
"""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from decoding.sampling import argmax
from models import schema, sharding
from models.errors import UserError
from models.formats import image_models as files
from models.images import quantiser, var, vqvae
from models.images.config import VARConfig, VQVAEConfig
from models.schema import require
from models.transformer import stack_layers
from train.objectives.image_batch import pixels, present
from train.objectives.objective import Batch, Objective, Params, Sums
from train.objectives.shift import log_likelihood

# What the tokenizer and the data decide; a config that repeated it could only contradict it.
FROM_TOKENIZER = ("vocab_size", "latent_channels", "scales")
FROM_DATA = ("num_classes",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NextScaleConfig:
    """What the sections `objective` of these jobs share.

    Attributes:
      tokenizer: a VQ-VAE directory, which stays as it is.
      model: fields of `models.images.config.VARConfig` but those that tokenizer and data decide; or None.
      init_from: a VAR directory to go on from; or None. Exactly one of the two is given.
      gate: of a new model, factor on the rows of adaLN that make gates: 1e-3 for depth 16, 1e-5 for 30.
      class_dropout: share of the images whose class is withheld.
      stochastic_depth: share of the images that skip a half of the last block; it grows from 0 in the first. None is
        the published 0.1 for 24 blocks, in proportion to their number.
    """

    reads: ClassVar[str] = "images"

    tokenizer: str | None
    model: Mapping[str, Any] | None = None
    init_from: str | None = None
    gate: float = 1e-3
    class_dropout: float = 0.1
    stochastic_depth: float | None = None

    def __post_init__(self):
        require(self.tokenizer is not None, "objective.tokenizer must be a VQ-VAE directory", None)
        if (self.model is None) == (self.init_from is None):
            raise UserError("give either objective.model (a shape) or objective.init_from (a VAR directory)")
        for name in ("class_dropout", "stochastic_depth"):
            share = getattr(self, name)
            require(share is None or 0 <= share < 1, f"objective.{name} must lie in 0..1, 1 excluded", share)
        require(self.gate > 0, "objective.gate must be positive", self.gate)
        for names, owner in ((FROM_TOKENIZER, "the tokenizer"), (FROM_DATA, "the data set")):
            for name in names:
                if name in (self.model or {}):
                    raise UserError(f"objective.model.{name} comes from {owner}; leave it out")
        if self.model is not None:
            self.shape(VQVAEConfig(), num_classes=1)

    @property
    def image_size(self) -> int:
        """Side of the images, the tokenizer's."""
        return files.read_config(str(self.tokenizer), VQVAEConfig).image_size

    def shape(self, tokenizer: VQVAEConfig, num_classes: int) -> VARConfig:
        """The model section completed by tokenizer and data. Raises UserError for a key that does not fit."""
        facts = {name: getattr(tokenizer, name) for name in FROM_TOKENIZER} | {"num_classes": num_classes}
        return schema.parse(VARConfig, {**(self.model or {}), **facts}, "objective.model")


class Lesson(NamedTuple):
    """A batch as a VAR transformer learns it.

    Attributes:
      labels: classes; `num_classes` where none is told.
      features: what the transformer reads at scales 1 to K - 1.
      codes: of all scales.
      weights: 1 for images, 0 for what only fills up a batch.
    """

    labels: Int[Array, "B"]
    features: Float[Array, "B T E"]
    codes: Int[Array, "B L"]
    weights: Float[Array, "B"]


class NextScale(Objective):
    """Base of these objectives: all but `Config`, `product`, `loss`, `evaluate`, and `provenance`, which goes into the
    product's config file."""

    base: Params
    recomputes = True

    def __init__(self, config: Any, classes: Sequence[str]):
        """`classes` are the data's. Raises UserError for a broken directory, or one of another tokenizer or data."""
        self._config = config
        self.tokenizer = files.read_config(config.tokenizer, VQVAEConfig)
        self.base = {"tokenizer": files.param_shapes(self.tokenizer)}
        if config.init_from is None:
            self.model = config.shape(self.tokenizer, len(classes))
        else:
            self.model = self.read_model(config.init_from, len(classes))
            self.base["init_from"] = stacked_shapes(self.model)
        rate = config.stochastic_depth
        self._rate = 0.1 * self.model.depth / 24 if rate is None else rate

    @property
    @abc.abstractmethod
    def provenance(self) -> dict[str, Any]:
        """What the product's config file tells about how it was trained."""

    def read_model(self, directory: str, num_classes: int) -> VARConfig:
        """The shape of a VAR directory. Raises UserError unless it fits the tokenizer and the classes."""
        model = files.read_config(directory, VARConfig)
        facts = {name: getattr(self.tokenizer, name) for name in FROM_TOKENIZER} | {"num_classes": num_classes}
        for name, fact in facts.items():
            owner = "the data set" if name in FROM_DATA else f"the tokenizer {self._config.tokenizer}"
            found = getattr(model, name)
            if found != fact:
                raise UserError(f"{directory} has {name} {found}, but {owner} has {fact}")
        return model

    @property
    def inputs(self) -> Mapping[str, str | None]:
        """The tokenizer and what is gone on from."""
        return {f"objective.{name}": getattr(self._config, name) for name in ("tokenizer", "init_from")}

    def load_base(self, mesh: Mesh) -> Params:
        """The tokenizer and, to go on from it, a VAR; float32, layers stacked."""
        base = {"tokenizer": files.load(self._config.tokenizer, VQVAEConfig)[1]}
        if self._config.init_from is not None:
            base["init_from"] = stack_layers(files.load(self._config.init_from, VARConfig)[1])
        return sharding.place_params(mesh, base)

    def frozen_part(self, base: Params) -> Params:
        """All but what the trainables begin as."""
        return {name: params for name, params in base.items() if name != "init_from"}

    def init(self, key: Array, base: Params) -> Params:
        """Random parameters, or those of `init_from`; layers stacked, float32."""
        if "init_from" in base:
            return base["init_from"]
        return stack_layers(var.init(self.model, key, gate=self._config.gate))

    def export(self, directory: Path, trainable: Params, frozen: Params) -> None:
        """Writes a VAR directory."""
        files.save(directory, self.model, trainable, overwrite=True, provenance=self.provenance)

    def lesson(self, frozen: Params, batch: Batch, key: Array | None) -> Lesson:
        """The batch as codes; with a key, classes are withheld at random."""
        codes = vqvae.encode(self.tokenizer, frozen["tokenizer"], pixels(batch))
        features = quantiser.teacher_inputs(self.tokenizer, frozen["tokenizer"], codes)
        labels_B, none = batch["label"], self.model.num_classes
        withheld_B = labels_B < 0
        if key is not None:
            withheld_B |= jax.random.bernoulli(key, self._config.class_dropout, labels_B.shape)
        labels_B = jnp.where(withheld_B, none, labels_B)
        return Lesson(labels_B, features, jnp.concatenate(codes, axis=1), present(batch))

    def student(self, trainable: Params, lesson: Lesson, first: int, last: int, keep=None) -> Float[Array, "B R V"]:
        """Scores of scales `first` to `last - 1` by what is trained; `keep` as of `models.images.var.forward`."""
        params, remat = self.compute.cast(trainable), self.compute.remat != "none"
        return var.teacher_forced(self.model, params, lesson.labels, lesson.features, first, last, keep, remat)

    def keep(self, key: Array, batch_size: int) -> Float[Array, "d 2 B"] | None:
        """Factors of stochastic depth, whose mean is 1 (Huang et al. 2016); None where nothing is ever skipped."""
        if not self._rate:
            return None
        kept_d11 = 1 - jnp.linspace(0, self._rate, self.model.depth)[:, None, None]
        drawn_d2B = jax.random.bernoulli(key, kept_d11, (self.model.depth, 2, batch_size))
        return drawn_d2B / kept_d11


def cross_entropy(
    logits: Float[Array, "B R V"], codes: Int[Array, "B R"], smoothing: float = 0.0
) -> Float[Array, "B R"]:
    """-log p(code), against a label of which a share `smoothing` is spread over all codes alike."""
    exact = -log_likelihood(logits, codes)
    if not smoothing:
        return exact
    spread = jax.nn.logsumexp(logits, axis=-1) - jnp.mean(logits, axis=-1)
    return (1 - smoothing) * exact + smoothing * spread


def summed(values: Float[Array, "B R"], weights: Float[Array, "B"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(sum, weight) of what there is once per code, over the images of a batch."""
    return jnp.sum(values * weights[:, None]), jnp.sum(weights) * values.shape[1]


def measures(logits: Float[Array, "B R V"], codes: Int[Array, "B R"], weights: Float[Array, "B"], tail: int) -> Sums:
    """Cross-entropy and first-choice accuracy per code, and the same of the last `tail` codes, the last scale."""
    values = {
        "loss": cross_entropy(logits, codes),
        "accuracy": (argmax(logits) == codes).astype(logits.dtype),
    }
    sums = {name: summed(value, weights) for name, value in values.items()}
    return sums | {f"last_{name}": summed(value[:, -tail:], weights) for name, value in values.items()}


def stacked_shapes(model: VARConfig) -> Params:
    """Shapes of a VAR's parameters, layers stacked."""
    return jax.eval_shape(stack_layers, files.param_shapes(model))
