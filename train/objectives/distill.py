"""Distillation of a draft model: a small transformer that learns to agree with its target, on text of several sources.

At position p the student's distribution q is compared with the target's, p, both after x_{<=p}, wherever x_{p+1} is a
label (`shift.py`, distance 1), and with means over labels

    loss = soft * mean(divergence(p, q)) + hard * mean(-log q(x_{p+1}))

`source` says whose text it is (DistillSpec, Zhou et al. 2024; GKD, Agarwal et al. 2024):

* `dataset`: the data set's.
* `teacher`: the target continues prompts of the data set; with hard = 1, soft = 0 this is sequence-level distillation.
* `student`: the student continues them, as it does when it drafts; nothing is differentiated through the draws.
* `mixed`: the student with probability `on_policy`, drawn once per batch, else whoever `otherwise` names.
* `served`: the target answers with the student as its drafter, and only tokens that took a rejected draft's place are
  labels (online speculative distillation, Liu et al. 2024): the two are compared one place before the corrected token,
  where the draft was made. A batch is the buffer of requests after which one update is made.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from decoding.drafters.draft_model import DraftModel
from decoding.drafters.registry import build
from decoding.policies import Static
from decoding.trees import chain
from models import schema, transformer
from models.config import TransformerConfig
from models.errors import UserError
from models.formats.beside import read_beside
from models.formats.hf import load_config
from models.formats.target import Target, check_same_tokens, load_target
from models.formats.text_files import read_json
from models.formats.tokenizer import Tokenizer
from models.sharding import make_mesh, mesh_sizes
from train.objectives import vocabulary
from train.objectives.divergences import Divergence, Rows, Student, divergence_measures, divergence_sums
from train.objectives.drafting import OnFrozenTarget, check_drafting
from train.objectives.guess import Weights
from train.objectives.lm import FROM_TOKENIZER
from train.objectives.objective import Batch, HostBatch, Params, Sums
from train.objectives.shift import label_mask, labels_at
from train.objectives.target_features import TargetFeatures, layout_of
from train.objectives.written import Writer, as_rows, check_unwritten, check_writing, corrected, openings, write

_STUDENT = "student"  # In the base: what the student begins as.
MEASURES = ("loss", "alpha", "agreement", "accuracy", "cross_entropy")


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """The section `objective` of a distillation job.

    Attributes:
      name: `distill`.
      target: directory of the target, the teacher, which stays as it is.
      model: fields of the student's `models.config.TransformerConfig` but those that the tokenizer decides; or None.
      init_from: what to begin from: a target directory of the same tokenizer, or the directory of a draft model for
        this target, or for what it was fine-tuned from; or None. Exactly one of the two is given.
      embedding: of a `model`: `random`, or `target`, the target's own table along its principal directions, which a
        short training could not learn for a large vocabulary.
      divergence: which (`divergences.py`): its name, `beta`, `skew` and `temperature`.
      soft: weight of the divergence.
      hard: weight of the cross-entropy with the text.
      source: whose text: `dataset`, `teacher`, `student`, `mixed` or `served`.
      on_policy: of `mixed`: the probability that a batch is the student's.
      otherwise: of `mixed`: whose text the other batches are, `dataset` or `teacher`.
      new_tokens: that are written behind each prompt; the rest of a row is for the prompt.
      sampling: temperature of what is written; 0 is greedy.
      draft: tokens that the student drafts in a row: where it serves, and as the drafter that is made.
      speculate: the teacher writes with the student as its drafter: other draws of the same distribution, and greedily
        the same text.
      reuse: steps that learn from what was written once.
      teacher_mesh: how the target is split over the same devices, such as `tensor=8`; None is as `config.mesh` says, by
        which the student is.
      labels: which tokens of the data set are learnt: `assistant`, those that it marks, or `all`.
      loop_prompts: prompts from the valid split that every evaluation decodes, at most a batch; 0 is none.
      loop_tokens: new tokens per such prompt; 0 decodes nothing.
    """

    reads: ClassVar[str] = "text"

    name: Literal["distill"]
    target: str | None
    model: Mapping[str, Any] | None = None
    init_from: str | None = None
    embedding: Literal["random", "target"] = "random"
    divergence: Divergence = dataclasses.field(default_factory=Divergence)
    soft: float = 1.0
    hard: float = 0.0
    source: Literal["dataset", "teacher", "student", "mixed", "served"] = "dataset"
    on_policy: float = 0.5
    otherwise: Literal["dataset", "teacher"] = "dataset"
    new_tokens: int = 128
    sampling: float = 1.0
    draft: int = 4
    speculate: bool = False
    reuse: int = 1
    teacher_mesh: str | None = None
    labels: Literal["assistant", "all"] = "all"
    loop_prompts: int = 4
    loop_tokens: int = 64

    def __post_init__(self):
        check_distilling(self)
        schema.require_weights(self, "soft", "hard", "sampling")
        check_unwritten(self)
        if self.source != "mixed":
            schema.require_defaults(self, "on_policy", "otherwise", why="is for objective.source 'mixed'")
        if self.source != "teacher" and (self.source, self.otherwise) != ("mixed", "teacher"):
            why = (
                "is for text of the teacher (objective.source 'teacher', or 'mixed' with objective.otherwise 'teacher')"
            )
            schema.require_defaults(self, "speculate", why=why)
        if (self.source, self.otherwise) == ("mixed", "dataset"):
            why = "must be 1 for objective.source 'mixed' with the data set's text, of which every step reads its own"
            schema.require_defaults(self, "reuse", why=why)
        if not self.hard + self.soft:
            raise UserError("objective.hard and objective.soft are both 0: there is nothing to learn")
        schema.require(0 <= self.on_policy <= 1, "objective.on_policy must lie in 0..1", self.on_policy)
        if self.embedding == "target" and self.init_from is not None:
            raise UserError("objective.embedding is for a new student: objective.init_from brings its own")

    @property
    def weights(self) -> Weights:
        """Of the loss's terms, as far as they say what is read of the target."""
        return Weights(self.hard, self.soft, 0.0, 1.0, divergence=self.divergence)

    @property
    def base(self) -> str:
        """The target."""
        return str(self.target)

    def untrained(self, model: TransformerConfig) -> DraftModel:
        """The student as a drafter of chains, without parameters."""
        return student_of(self, model)


def check_distilling(config: Any) -> None:
    """Rules that configs of draft models share. Raises UserError."""
    check_drafting(config)
    if (config.model is None) == (config.init_from is None):
        raise UserError("give either objective.model (a shape) or objective.init_from (a target directory)")
    for name in FROM_TOKENIZER:
        if name in (config.model or {}):
            raise UserError(f"objective.model.{name} is the target's; leave it out")
    for name in ("new_tokens", "draft", "reuse"):
        schema.require(getattr(config, name) >= 1, f"objective.{name} must be at least 1", getattr(config, name))
    if config.teacher_mesh is not None:
        mesh_sizes(config.teacher_mesh)


def student_of(config: Any, model: TransformerConfig) -> DraftModel:
    """The draft model of a target of that shape that a config's `model`, `init_from` and `draft` describe."""
    if config.init_from is not None:
        record = _record_of(config.init_from)
        shape = load_config(config.init_from) if record is None else _draft_model(config.init_from, record).model
    else:
        facts = {name: getattr(model, name) for name in FROM_TOKENIZER}
        shape = schema.parse(TransformerConfig, {**config.model, **facts}, "objective.model")
    return DraftModel(shape, Static(chain(config.draft)))


def _record_of(directory: str) -> dict | None:
    """The record of a drafter directory; None for any other."""
    path = Path(directory) / "drafter.json"
    return read_json(path) if path.is_file() else None


def _tokenizer_of(record: dict, directory: str) -> str:
    """Fingerprint of the tokenizer of a drafter's base. Raises UserError where its record has none."""
    base = record.get("base")
    if not isinstance(base, dict) or not isinstance(base.get("tokenizer"), str):
        raise UserError(f"{directory}/drafter.json must say whose drafter it is: it has no base with a tokenizer")
    return base["tokenizer"]


def _draft_model(directory: str, record: dict) -> DraftModel:
    drafter = build(record, f"{directory}/drafter.json")
    # One with exits is a draft model too, but what learns here is all of its layers, and none of its exits.
    if type(drafter) is not DraftModel:
        raise UserError(f"objective.init_from ({directory}) must be a draft model, but is a drafter {drafter.name}")
    return drafter


class DraftModelObjective(OnFrozenTarget):
    """Base of those that make a draft model, which learns in float32 with its layers stacked, and may write text.

    Its config has, besides what every drafter's has, `model`, `init_from`, `draft`, `new_tokens` and `teacher_mesh`.
    """

    drafter: DraftModel
    recomputes = True

    def __init__(self, config: Any, tokenizer: Tokenizer):
        """As `OnFrozenTarget`. Raises UserError, too, where student and teacher read different tokens."""
        super().__init__(config, tokenizer)
        self._teacher = Writer(self.model, self._tokenizer)
        self._student = Writer(self.drafter.model, self._tokenizer)
        if config.init_from is not None:
            start, record = config.init_from, _record_of(config.init_from)
            own = Tokenizer.load(start).fingerprint if record is None else _tokenizer_of(record, start)
            what, target = f"objective.init_from {config.init_from}", f"objective.target {config.base}"
            check_same_tokens(what, own, target, tokenizer.fingerprint)

    def prepare(self, compute):
        """Also counts what the student begins as."""
        super().prepare(compute)
        if self._config.init_from is not None:
            shapes = transformer.param_shapes(self.drafter.model, jnp.float32)
            self.base = {**self.base, _STUDENT: jax.eval_shape(transformer.stack_layers, shapes)}

    def check(self, length):
        """Also refuses rows without room for a prompt, and several processes where text is written."""
        super().check(length)
        model = self.drafter.model
        if length is not None and length > model.max_position:
            raise UserError(
                f"config.length ({length}) exceeds the student's longest sequence ({model.max_position}): set "
                "objective.model.max_position"
            )
        if self.refresh_every:
            check_writing(self._config.new_tokens, length)

    @property
    def depth(self) -> int:
        """Tokens that a chain drafts."""
        return self._config.draft

    @property
    def inputs(self) -> Mapping[str, str | None]:
        """The target, and what the student begins as."""
        return {**super().inputs, "objective.init_from": self._config.init_from}

    def base_mesh(self, mesh):
        """The teacher's own, where it has one. Raises UserError where that is of fewer devices."""
        if self._config.teacher_mesh is None:
            return mesh
        sizes = {"data": 1} | mesh_sizes(self._config.teacher_mesh)
        if -1 not in sizes.values() and (count := math.prod(sizes.values())) != mesh.size:
            raise UserError(
                f"objective.teacher_mesh ({self._config.teacher_mesh}) is of {count} devices, and the student's of "
                f"{mesh.size}: both must be split over the same"
            )
        return make_mesh(**sizes, devices=mesh.devices.ravel().tolist())

    def load_base(self, mesh):
        """On the teacher's mesh."""
        return super().load_base(self.base_mesh(mesh))

    def beside_target(self, mesh: Mesh) -> Params:
        """What the student begins as."""
        if self._config.init_from is None:
            return {}
        directory = self._config.init_from
        if _record_of(directory):
            params = read_beside(Path(directory), "drafter.json", transformer.param_shapes(self.drafter.model), mesh)
        else:
            params = load_target(directory, dtype=jnp.float32, mesh=mesh).params
        return {_STUDENT: transformer.stack_layers(params)}

    def frozen_part(self, base: Params) -> Params:
        """The target."""
        return {name: part for name, part in base.items() if name != _STUDENT}

    def init(self, key, base):
        """Random, or what is read; layers stacked, in float32."""
        if _STUDENT in base:
            return base[_STUDENT]
        return transformer.stack_layers(transformer.init(self.drafter.model, key, jnp.float32))

    def drafter_params(self, trainable, frozen):
        """Layers as a list."""
        return transformer.unstack_layers(trainable)

    def student(self, trainable: Params, batch: Batch) -> Student:
        """On a text, ready to be read."""
        model, params = self.drafter.model, self.compute.cast(trainable)
        layout = layout_of(batch, self.compute.attention)
        hidden = transformer.forward(model, params, batch["tokens"], layout, remat=self.compute.remat).hidden
        return Student(hidden, vocabulary.reader(model, params, vocabulary.shared(model, self.model)))

    def teacher(self, target: TargetFeatures) -> Callable[..., Array]:
        """From rows of `target.scored` to what the student is compared with."""
        return vocabulary.first_tokens(target.read, vocabulary.shared(self.drafter.model, self.model))

    def writers(self, trainable: Params, frozen: Params) -> tuple[Target, Target]:
        """(teacher, student), ready to decode."""
        return self._teacher.of(frozen, self.compute), self._student.of(trainable, self.compute)


class DistillObjective(DraftModelObjective):
    """The `distill` objective."""

    Config: ClassVar[type] = DistillConfig

    def check(self, length):
        """Also refuses a student whose embeddings the target's cannot be projected to."""
        super().check(length)
        if self._config.embedding == "target" and self.drafter.model.width > self.model.width:
            raise UserError(
                f"objective.embedding 'target' is for students as wide as the target ({self.model.width}) or less, "
                f"got {self.drafter.model.width}"
            )

    def init(self, key, base):
        """Where it is asked for, with embeddings of the target."""
        params = super().init(key, base)
        if self._config.embedding == "random":
            return params
        table = principal(base["embed"]["embedding"].astype(jnp.float32), self.drafter.model.width)
        return {**params, "embed": {"embedding": table}}

    @property
    def refresh_every(self) -> int:  # type: ignore[override]
        """Text is written for so many steps."""
        return 0 if self._config.source == "dataset" else self._config.reuse

    def refresh(self, trainable, frozen, batch, key):
        """A batch of the text of whoever has his turn."""
        coin, draws = jax.random.split(key)
        who, config = self._config.source, self._config
        if who == "mixed":
            who = _STUDENT if jax.random.uniform(coin) < config.on_policy else config.otherwise
        marked: HostBatch = {**batch, "mask": np.asarray(label_mask(batch, config.labels), np.uint8)}
        length = batch["tokens"].shape[1]
        room = length - config.new_tokens
        if who == "dataset" or not (prompts := openings(marked, room)):
            return marked
        teacher, student = self.writers(trainable, frozen)
        drafter = self.drafter, student.params
        if who == _STUDENT:
            made = write(student, prompts, config.new_tokens, room, config.sampling, draws)
        else:
            helped = who == "served" or config.speculate
            made = write(teacher, prompts, config.new_tokens, room, config.sampling, draws, drafter if helped else None)
        counted = [[True] * len(new) for new in made.tokens]
        if who == "served":
            counted = [corrected(writers, config.draft) for writers in made.writers]
        return as_rows(prompts, made.tokens, counted, length)

    def loss_on(self, target, trainable, frozen, batch, key, progress):
        """One term."""
        config = self._config
        rows = self._rows(target, batch, "assistant" if self.refresh_every else config.labels)
        if config.divergence.drawn:
            rows = rows._replace(uniform=jax.random.uniform(key, (*rows.counted.shape, 2)))
        (total,) = divergence_sums(
            config.divergence,
            [self.student(trainable, batch)],
            self.teacher(target),
            rows,
            soft=config.soft,
            hard=config.hard,
            devices=self.compute.devices,
        )
        weight = jnp.sum(rows.counted).astype(total.dtype)
        return (total, weight), labels_per_row(weight, rows.counted)

    def evaluate_on(self, target, trainable, frozen, batch):
        """On the data set's text, whatever is learnt from: the divergence; `alpha`, sum of min(p, q), what verification
        keeps of a sampled draft; `agreement`, of a greedy one; first-choice accuracy and cross-entropy of the text."""
        rows = self._rows(target, batch, self._config.labels)
        students = [self.student(trainable, batch)]
        (sums,) = divergence_measures(
            self._config.divergence, students, self.teacher(target), rows, self.compute.devices
        )
        weight = jnp.sum(rows.counted).astype(jnp.float32)
        return {name: (value, weight) for name, value in sums.items()}

    def report(self, means):
        """The means."""
        return {name: float(means[name]) for name in MEASURES}

    def _rows(self, target, batch: Batch, labels: str) -> Rows:
        tokens, counted = labels_at({**batch, "mask": label_mask(batch, labels)}, 1)
        return Rows(counted, target.scored, tokens)


def labels_per_row(labels: Float[Array, ""], counted: Bool[Array, "B S"]) -> Sums:
    """The metric `labels`: how many a row of a step's batch had, which tells budgets apart."""
    return {"labels": (labels, jnp.float32(counted.shape[0]))}


def principal(table: Float[Array, "V H"], width: int) -> Float[Array, "V W"]:
    """Rows along the directions in which they are longest, which keep most of their products."""
    _, directions = jnp.linalg.eigh(table.T @ table)
    return table @ directions[:, -width:]
