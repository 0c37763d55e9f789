"""A VAR transformer over the codes of a frozen VQ-VAE (VAR, section 3), or the drafter of a collaborating pair.

The loss is the cross-entropy of every code given the true scales before its own, all codes weighing the same. A drafter
(CoDe, section 3.2) makes the first N scales alone: it learns on these, from sequences that end there. What training
leaves behind is a VAR directory.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import jax
from jaxtyping import Array

from models.images.config import scale_starts
from models.schema import require
from train.objectives.next_scale import Lesson, NextScale, NextScaleConfig, cross_entropy, measures, summed
from train.objectives.objective import Batch, Params, Sums


@dataclasses.dataclass(frozen=True, kw_only=True)
class VARObjectiveConfig(NextScaleConfig):
    """The section `objective` of a VAR job; see also `NextScaleConfig`.

    Attributes:
      name: `var`.
      label_smoothing: share of every label that is spread over all codes.
      scales_until: N, to learn the scales before N only; None learns all.
    """

    name: Literal["var"]
    label_smoothing: float = 0.0
    scales_until: int | None = None

    def __post_init__(self):
        super().__post_init__()
        smoothing = self.label_smoothing
        require(0 <= smoothing < 1, "objective.label_smoothing must lie in 0..1, 1 excluded", smoothing)


class VARObjective(NextScale):
    """The `var` objective."""

    Config: ClassVar[type] = VARObjectiveConfig
    product: ClassVar[str] = "var"

    def __init__(self, config: VARObjectiveConfig, classes: Sequence[str]):
        """`classes` are the data's. Raises UserError for a directory that is broken or of another tokenizer or data."""
        super().__init__(config, classes)
        until, scales = config.scales_until, self.model.num_scales
        fits = until is None or 1 <= until <= scales
        require(fits, f"objective.scales_until must lie in 1..{scales}, the scales of the tokenizer", until)
        self.last = until or scales

    @property
    def provenance(self) -> dict[str, Any]:
        """The scales that were learnt."""
        return {"objective": "var", "scales_until": self.last}

    def loss(self, trainable: Params, frozen: Params, batch: Batch, key: Array, progress: Array | float):
        """Mean cross-entropy over codes, in nats."""
        class_key, depth_key = jax.random.split(key)
        lesson = self.lesson(frozen, batch, class_key)
        keep = self.keep(depth_key, len(lesson.labels))
        logits = self.student(trainable, lesson, 0, self.last, keep)
        losses = cross_entropy(logits, self._codes(lesson), self._config.label_smoothing)
        return summed(losses, lesson.weights), {}

    def evaluate(self, trainable: Params, frozen: Params, batch: Batch) -> Sums:
        """Cross-entropy and accuracy, told the class: of all codes that are learnt, and of the last scale's."""
        lesson = self.lesson(frozen, batch, None)
        logits = self.student(trainable, lesson, 0, self.last)
        return measures(logits, self._codes(lesson), lesson.weights, self.model.scales[self.last - 1] ** 2)

    def _codes(self, lesson: Lesson):
        return lesson.codes[:, : scale_starts(self.model.scales)[self.last]]
