"""Cross-entropy over the classes of images: a network to judge generated images with.

What training leaves behind is a directory that `eval/images/features.py` reads; its metrics carry the name of a
classifier, never FID's.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

from decoding.sampling import argmax
from models import schema
from models.errors import UserError
from models.formats import image_models as files
from models.images import classifier
from models.images.classifier import ClassifierConfig
from train.objectives.image_batch import pixels, present
from train.objectives.objective import Batch, Objective, Params, Sums


@dataclasses.dataclass(frozen=True)
class ImageClassifierConfig:
    """The section `objective` of a classifier's job.

    Attributes:
      name: `image_classifier`.
      model: fields of `models.images.classifier.ClassifierConfig` but `num_classes`, which the data decides.
      shift: images are moved by up to so many pixels in each direction, their edges repeated, so that more is learnt
        from few.
    """

    reads: ClassVar[str] = "images"

    name: Literal["image_classifier"]
    model: Mapping[str, Any]
    shift: int = 0

    def __post_init__(self):
        if "num_classes" in self.model:
            raise UserError("objective.model.num_classes comes from the data set; leave it out")
        schema.require(self.shift >= 0, "objective.shift must not be negative", self.shift)
        self.shape(1)

    @property
    def image_size(self) -> int:
        """Side of the images."""
        return self.shape(1).image_size

    def shape(self, num_classes: int) -> ClassifierConfig:
        """The model section completed. Raises UserError for a key that does not fit."""
        return schema.parse(ClassifierConfig, {**self.model, "num_classes": num_classes}, "objective.model")


class ImageClassifier(Objective):
    """The `image_classifier` objective."""

    Config: ClassVar[type] = ImageClassifierConfig
    product: ClassVar[str] = "classifier"

    def __init__(self, config: ImageClassifierConfig, facts: Sequence[str]):
        """`facts` are the names of the classes."""
        self._config, self.model = config, config.shape(len(facts))

    def init(self, key: Array, base: None) -> Params:
        """Random parameters in float32."""
        return classifier.init(self.model, key)

    def loss(self, trainable: Params, frozen: None, batch: Batch, key: Array, progress: Array | float):
        """Mean cross-entropy, in nats, and accuracy, over images that are shifted at random."""
        images = pixels(batch)
        if self._config.shift:
            images = _shifted(images, key, self._config.shift)
        likelihood_B, right_B = self._score(trainable, images, batch["label"])
        weight_B = present(batch)
        weight = jnp.sum(weight_B)
        return (-jnp.sum(likelihood_B * weight_B), weight), {"accuracy": (jnp.sum(right_B * weight_B), weight)}

    def evaluate(self, trainable: Params, frozen: None, batch: Batch) -> Sums:
        """Cross-entropy and accuracy per image."""
        likelihood_B, right_B = self._score(trainable, pixels(batch), batch["label"])
        weight_B = present(batch)
        weight = jnp.sum(weight_B)
        return {"loss": (-jnp.sum(likelihood_B * weight_B), weight), "accuracy": (jnp.sum(right_B * weight_B), weight)}

    def export(self, directory: Path, trainable: Params, frozen: None) -> None:
        """Writes a classifier directory."""
        files.save(directory, self.model, trainable, overwrite=True)

    def _score(self, params: Params, images: Array, labels: Array) -> tuple[Array, Array]:
        """Log-likelihood of each label, and whether it is the first choice; both float."""
        _, scores_BC = classifier.forward(self.model, self.compute.cast(params), images)
        chosen_B1 = jnp.maximum(labels, 0)[:, None]
        likelihood_B = jnp.take_along_axis(jax.nn.log_softmax(scores_BC), chosen_B1, axis=1)[:, 0]
        return likelihood_B, (argmax(scores_BC) == labels).astype(scores_BC.dtype)


def _shifted(images: Array, key: Array, most: int) -> Array:
    """Each image moved by its own number of pixels."""
    side = images.shape[1]
    padded = jnp.pad(images, ((0, 0), (most, most), (most, most), (0, 0)), mode="edge")
    offsets_B2 = jax.random.randint(key, (len(images), 2), 0, 2 * most + 1)

    def cut(image, offset):
        return jax.lax.dynamic_slice(image, (offset[0], offset[1], 0), (side, side, 3))

    return jax.vmap(cut)(padded, offsets_B2)
