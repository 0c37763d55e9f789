"""The schema of a training job: every key a config file may hold, with its type, default and rules.

The section `objective` belongs to the objective that its `name` selects, which brings its own dataclass; nothing here
changes when an objective is added.
"""

import dataclasses
import math
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from models import schema
from models.errors import UserError
from models.schema import require

if TYPE_CHECKING:  # Training steps are timed where it is not installed.
    from ml_collections import ConfigDict


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is read.

    Attributes:
      path: a data set directory written by `scripts/build_dataset.py`, or `tfds:NAME` from the TFDS catalogue.
      split: the split to train on, perhaps a slice as TFDS writes it, such as `train[:90%]`.
      valid_split: the split that evaluations pass over.
      tokenizer: for catalogue texts, when training starts from no target: directory of the tokenizer; otherwise None.
      fields: for catalogue texts: the text fields that make a document, comma-separated; None finds the usual ones.
      features: for drafters: a directory that keeps what they read of the frozen target on the training split, rounded
        to bfloat16, so that no step runs the target. A job that does not find it writes it, and says how large it will
        be; any number of jobs may read it. None runs the target in every step.
      features_top_k: how the target's distribution is kept there, where a loss asks for it. 0 keeps the feature that
        the head reads, from which every step computes all of the distribution. k keeps the k most probable tokens with
        their log-probabilities, which is smaller and biased: what the target gives to other tokens is shared out among
        the k in proportion, so that what is learnt is sharper than the target, by one over the probability of the k.
    """

    path: str
    split: str = "train"
    valid_split: str = "valid"
    tokenizer: str | None = None
    fields: str | None = None
    features: str | None = None
    features_top_k: int = 0

    def __post_init__(self):
        require(self.features_top_k >= 0, "data.features_top_k must not be negative", self.features_top_k)
        if self.features_top_k and self.features is None:
            raise UserError("data.features_top_k is about what data.features keeps: name a directory there")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW or Muon under a warm-up and a schedule.

    Attributes:
      name: `adamw`, or `muon`: orthogonalised momentum for kernels but those of
        vocabularies, and AdamW for the rest (Jordan et al. 2024), with
        updates scaled to AdamW's size so that one learning rate serves both (Liu et al. 2025, section 2.2).
      learning_rate: the peak, reached after `warmup_steps`.
      schedule: how the rate falls from the peak to `final_fraction` of it at the last step.
      warmup_steps: steps of linear growth from 0.
      final_fraction: last rate over peak; must be 1 when the schedule is constant.
      weight_decay: decoupled, on matrices only (never on norm scales, biases and tables of positions).
      clip_norm: gradients are scaled down to this global norm.
      ema: decay of an average of the parameters over the steps, which evaluations and the export then use; it begins
        lower, at (1 + step) / (10 + step), so that early steps are forgotten. 0 keeps no average.
    """

    learning_rate: float
    name: Literal["adamw", "muon"] = "adamw"
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = 0
    final_fraction: float = 0.1
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    clip_norm: float = 1.0
    ema: float = 0.0

    def __post_init__(self):
        require(0 < self.learning_rate < math.inf, "optimizer.learning_rate must be positive", self.learning_rate)
        require(self.warmup_steps >= 0, "optimizer.warmup_steps must not be negative", self.warmup_steps)
        require(0 <= self.final_fraction <= 1, "optimizer.final_fraction must lie in 0..1", self.final_fraction)
        require(
            0 <= self.weight_decay < math.inf, "optimizer.weight_decay must be 0 or more, and finite", self.weight_decay
        )
        require(0 <= self.b1 < 1, "optimizer.b1 must lie in 0..1, 1 excluded", self.b1)
        require(0 <= self.b2 < 1, "optimizer.b2 must lie in 0..1, 1 excluded", self.b2)
        require(0 < self.eps < math.inf, "optimizer.eps must be positive, and finite", self.eps)
        require(self.clip_norm > 0, "optimizer.clip_norm must be positive", self.clip_norm)
        require(0 <= self.ema < 1, "optimizer.ema must lie in 0..1, 1 excluded", self.ema)
        if self.schedule == "constant" and self.final_fraction != 1:
            raise UserError(
                f"optimizer.final_fraction must be 1.0 when optimizer.schedule is 'constant', got {self.final_fraction}"
            )

    def check_fits(self, steps: int, where: str = "optimizer") -> None:
        """Raises UserError where the warm-up is as long as a run of so many steps; `where` names the section."""
        if self.warmup_steps >= steps:
            raise UserError(f"{where}.warmup_steps ({self.warmup_steps}) must be smaller than steps ({steps})")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices per mesh axis (`models/sharding.py`); -1 takes what is left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self):
        for field in dataclasses.fields(self):
            size = getattr(self, field.name)
            require(size == -1 or size >= 1, f"mesh.{field.name} must be at least 1, or -1 for the rest", size)


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Every `every` steps and at the end, one pass over the valid split, or over its first `batches` batches."""

    every: int
    batches: int | None = None

    def __post_init__(self):
        require(self.every >= 1, "evaluation.every must be at least 1", self.every)
        require(self.batches is None or self.batches >= 1, "evaluation.batches must be at least 1", self.batches)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Every `every` steps and at the end the whole training state is saved; the newest `keep` stay on disk."""

    every: int
    keep: int = 2

    def __post_init__(self):
        require(self.every >= 1, "checkpoint.every must be at least 1", self.every)
        require(self.keep >= 1, "checkpoint.keep must be at least 1", self.keep)


@dataclasses.dataclass(frozen=True)
class MetricsConfig:
    """Where metrics go besides `metrics.jsonl`.

    Attributes:
      every: steps between lines.
      tensorboard: also write TensorBoard events into the workdir.
      wandb: project name for Weights & Biases, or None.
    """

    every: int = 10
    tensorboard: bool = False
    wandb: str | None = None

    def __post_init__(self):
        require(self.every >= 1, "metrics.every must be at least 1", self.every)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A whole job.

    Attributes:
      objective: the dataclass of the objective (`train/objectives`), chosen by its field `name`.
      steps: optimizer steps of the run.
      batch_size: rows per step over all devices.
      accumulate: parts that a step's batch is taken in, one after the other; the result is that of the whole, but for
        what compares the rows of a batch (advantages of `tvd++`, `hybrid_of` a batch), which are then those of a part.
      length: tokens per row of text; None for images.
      seed: of initialisation, noise and the order of the data.
      precision: of products: `float32`, or `bfloat16`, over parameters and optimizer state that are float32 either way;
        `auto` is float32 on a CPU and bfloat16 on accelerators.
      remat: what is computed again for gradients instead of being kept: `none`; all but the results of products with
        parameters (`products`, of drafts and VAR the same as `layers`); all inside a layer, or a step of a draft
        (`layers`). Heads on a frozen target that are no such layers (Medusa, Hydra, blocks) keep little, and refuse it.
    """

    objective: Any
    data: DataConfig
    optimizer: OptimizerConfig
    evaluation: EvaluationConfig
    checkpoint: CheckpointConfig
    steps: int
    batch_size: int
    length: int | None = None
    seed: int = 0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    remat: Literal["none", "products", "layers"] = "none"
    accumulate: int = 1
    mesh: MeshConfig = MeshConfig()
    metrics: MetricsConfig = MetricsConfig()

    def __post_init__(self):
        require(1 <= self.steps < 2**31, "steps must be at least 1, and less than 2^31", self.steps)
        require(self.accumulate >= 1, "accumulate must be at least 1", self.accumulate)
        require(self.batch_size >= 1, "batch_size must be at least 1", self.batch_size)
        if self.objective.reads == "text":
            require(
                self.length is not None, f"the objective {self.objective.name} reads text: length must be set", None
            )
        else:
            require(
                self.length is None,
                f"the objective {self.objective.name} reads images: length must be None",
                self.length,
            )
        require(self.length is None or self.length >= 2, "length must be at least 2", self.length)
        require(0 <= self.seed < 2**31, "seed must lie in 0..2147483647", self.seed)
        self.optimizer.check_fits(self.steps)

    @property
    def unit(self) -> str:
        """What a batch is counted in."""
        return "images" if self.length is None else "tokens"


def parse(
    raw: "ConfigDict | Mapping[str, Any]", objectives: Mapping[str, Any], place: str = "the config"
) -> TrainConfig:
    """The schema applied to what a config file returned.

    Args:
      raw: a `ConfigDict`, or the same as nested dicts.
      objectives: name -> subclass of `train.objectives.objective.Objective`, whose `Config` is the section's dataclass.
      place: how messages call the whole, for instance the file's name.

    Raises:
      UserError: one sentence that names the key, what was found and what was expected, or what the objective lacks.
    """
    raw = raw if isinstance(raw, Mapping) else raw.to_dict()
    section = raw.get("objective")
    if not isinstance(section, Mapping):
        raise UserError(f"{place} has no section objective, whose name chooses one of {', '.join(objectives)}")
    name = str(section.get("name"))
    if name not in objectives:
        raise UserError(
            f"{place}: there is no objective {name!r}{schema.nearest(name, objectives)}, only {', '.join(objectives)}"
        )
    objectives[name].require_complete()
    return schema.parse(TrainConfig, raw, place=place, given={"objective": objectives[name].Config})


def fill_in(raw: "ConfigDict", objectives: Mapping[str, Any]) -> None:
    """Gives every key that a config leaves out its default, so that a command line can name it.

    What is unknown or missing stays so, for `parse` to tell. A section that is a mapping stays as the config has it:
    which keys it may hold is for its owner to say.
    """
    from ml_collections import ConfigDict

    section = raw.get("objective")
    name = str(section.get("name")) if isinstance(section, ConfigDict) else ""
    kind = getattr(objectives.get(name), "Config", None)
    given = {"objective": kind} if dataclasses.is_dataclass(kind) else {}
    with raw.unlocked():
        _fill_in(raw, TrainConfig, given)


def _fill_in(raw: "ConfigDict", kind: type, given: Mapping[str, Any], default: Any = None) -> None:
    """`default` is a `kind` with the defaults, where they are not those of the fields."""
    from ml_collections import ConfigDict, config_dict

    types = {**typing.get_type_hints(kind), **given}
    for field in dataclasses.fields(kind):
        annotation = schema.without_none(types[field.name])[0]
        absent, value = field.name not in raw, _default_of(field, default)
        if dataclasses.is_dataclass(annotation):
            if absent and value is not None and value is not dataclasses.MISSING:
                raw[field.name] = ConfigDict()
            if isinstance(raw.get(field.name), ConfigDict):
                # What a section leaves out of itself has the default of its field, as `parse` has it.
                _fill_in(raw[field.name], typing.cast(type, annotation), {}, value if absent else None)
        elif absent and value is None:
            written = typing.get_origin(annotation) or annotation
            if isinstance(written, type) and not issubclass(written, Mapping):
                raw[field.name] = config_dict.placeholder(written)
        elif absent and value is not dataclasses.MISSING:
            raw[field.name] = value


def _default_of(field: dataclasses.Field, default: Any) -> Any:
    if default is not None:
        return getattr(default, field.name)
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
