"""The refiner of a collaborating pair: a small VAR that learns the large scales from a large one (CoDe, section 3.2).

On the codes of scales N and above, with p the teacher's distribution and q the refiner's, both told the same class or
none and the same true scales before:

    loss = alpha T^2 KL(softmax(teacher / T) || softmax(student / T)) + (1 - alpha) (-log q(code))

The scales below N are only read, as they will be when a drafter makes them. What training leaves behind is a VAR
directory.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import jax
from jaxtyping import Array, Float

from models import sharding
from models.formats import image_models as files
from models.images import var
from models.images.config import VARConfig, scale_starts
from models.schema import require
from models.transformer import stack_layers
from train.objectives.divergences import forward_kl, log_probabilities
from train.objectives.next_scale import (
    NextScale,
    NextScaleConfig,
    cross_entropy,
    measures,
    stacked_shapes,
    summed,
)
from train.objectives.objective import Batch, Params, Sums


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodeRefinerConfig(NextScaleConfig):
    """The section `objective` of a refiner job; see also `NextScaleConfig`.

    Attributes:
      name: `code_refiner`.
      teacher: VAR directory of the large model, which stays as it is.
      first_scale: N, the first scale that the refiner makes.
      temperature: T, of both distributions that are compared.
      alpha: share of the comparison with the teacher; the rest is that of the cross-entropy with the codes.
    """

    name: Literal["code_refiner"]
    teacher: str | None
    first_scale: int
    temperature: float = 1.0
    alpha: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        require(self.teacher is not None, "objective.teacher must be a VAR directory", None)
        require(self.temperature > 0, "objective.temperature must be positive", self.temperature)
        require(0 <= self.alpha <= 1, "objective.alpha must lie in 0..1", self.alpha)


class CodeRefiner(NextScale):
    """The `code_refiner` objective."""

    Config: ClassVar[type] = CodeRefinerConfig
    product: ClassVar[str] = "refiner"

    def __init__(self, config: CodeRefinerConfig, classes: Sequence[str]):
        """`classes` are the data's. Raises UserError for a directory that is broken or of another tokenizer or data."""
        super().__init__(config, classes)
        first, scales = config.first_scale, self.model.num_scales
        require(1 <= first < scales, f"objective.first_scale must lie in 1..{scales - 1}", first)
        self.teacher = self.read_model(str(config.teacher), len(classes))
        self.base["teacher"] = stacked_shapes(self.teacher)

    @property
    def provenance(self) -> dict[str, Any]:
        """The scales that were learnt."""
        return {"objective": "code_refiner", "first_scale": self._config.first_scale}

    @property
    def inputs(self):
        """With the teacher."""
        return {**super().inputs, "objective.teacher": self._config.teacher}

    def load_base(self, mesh):
        """The tokenizer, the teacher and, to go on from it, a VAR; float32, layers stacked."""
        teacher = stack_layers(files.load(self._config.teacher, VARConfig)[1])
        return super().load_base(mesh) | {"teacher": sharding.place_params(mesh, teacher)}

    def loss(self, trainable: Params, frozen: Params, batch: Batch, key: Array, progress: Array | float):
        """Mean over the codes of scales N and above, in nats."""
        class_key, depth_key = jax.random.split(key)
        keep = self.keep(depth_key, len(batch["label"]))
        student, teacher, codes, weights = self._scored(trainable, frozen, batch, class_key, keep)
        exact, compared = cross_entropy(student, codes), divergence(teacher, student, self._config.temperature)
        alpha = self._config.alpha
        parts = {"cross_entropy": summed(exact, weights), "divergence": summed(compared, weights)}
        losses = alpha * self._config.temperature**2 * compared + (1 - alpha) * exact
        return summed(losses, weights), parts

    def evaluate(self, trainable: Params, frozen: Params, batch: Batch) -> Sums:
        """Cross-entropy, accuracy and divergence from the teacher at T = 1, told the class, of scales N and above."""
        student, teacher, codes, weights = self._scored(trainable, frozen, batch, None, None)
        tail = self.model.scales[-1] ** 2
        compared = summed(divergence(teacher, student, 1.0), weights)
        return measures(student, codes, weights, tail) | {"divergence": compared}

    def _scored(self, trainable, frozen, batch, key, keep):
        """Scores by student and teacher, codes and weights; at scales N and above."""
        first, last = self._config.first_scale, self.model.num_scales
        lesson = self.lesson(frozen, batch, key)
        student = self.student(trainable, lesson, first, last, keep)
        teacher = var.teacher_forced(
            self.teacher, self.compute.cast(frozen["teacher"]), lesson.labels, lesson.features, first, last
        )
        return student, teacher, lesson.codes[:, scale_starts(self.model.scales)[first] :], lesson.weights


def divergence(
    teacher: Float[Array, "B R V"], student: Float[Array, "B R V"], temperature: float
) -> Float[Array, "B R"]:
    """KL(softmax(teacher / T) || softmax(student / T)), in nats."""
    return forward_kl(*(log_probabilities(scores, temperature) for scores in (student, teacher)))
