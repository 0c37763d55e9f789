"""One transformer that may end after several of its layers, every exit trained with all others.

The residual stream behind e layers, through the one final norm and the one head, is exit e's guess q_e of the next
token: what the network cut off there would say. With means over the labels of the batch,

    loss = sum_e weight_e mean( hard * -log q_e(x) + soft * D(t_e, q_e) )

with D a divergence (`divergences.py`), t_e the teacher of exit e at the same place, and the last exit the end of all
layers.

* Labels alone (`soft = 0`): sorted training (Kavehzadeh et al. 2024), a network of many depths; with weights that grow
  with depth, hierarchical self-distillation as ModularStarEncoder has it (arXiv 2503.03008): deep losses shape what
  shallow exits read, and nobody copies anybody.
* Teachers: frozen targets, one for all exits or one for each, which makes one drafter for several targets. A target
  that teaches a copy of itself keeps its text by the last exit, while the others learn to draft for it.
* No teachers and `soft > 0`: the last exit teaches the others, and feels nothing of it.

What training leaves behind is a target directory. `scripts.convert --from model --exits` makes a drafter of it
(`decoding/drafters/nested.py`); as a target it drafts for itself, `--drafter early_exit:LAYERS`.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array

from models import schema, transformer
from models.errors import UserError
from models.formats.hf import load_config
from models.formats.target import check_same_tokens, check_vocabulary, load_target
from models.formats.tokenizer import Tokenizer
from train.objectives import vocabulary
from train.objectives.divergences import Divergence, Rows, Student, divergence_measures, divergence_sums
from train.objectives.lm import LM, LMConfig
from train.objectives.objective import Batch, Compute, Params, Sums
from train.objectives.shift import label_mask, labels_at
from train.objectives.target_features import layout_of

_START = "init_from"  # As a teacher's name.


@dataclasses.dataclass(frozen=True)
class ExitsConfig(LMConfig):
    """The section `objective` of a job that trains exits; `model`, `init_from` and `labels` are those of `lm`.

    Attributes:
      exits: layers after which the network may end before its last, rising, or none; its end is the last exit.
      layers: of `init_from`, how many of its first layers the network is made of; None is all.
      weights: of the exits, the last included; empty gives every exit its share of the layers.
      hard: weight of the text's own tokens.
      soft: weight of the divergence from the teacher.
      teachers: directories of targets, or `init_from`, what the network begins from as it was: one for all exits, or
        one for each, the last included; none is the last exit.
      divergence: which.
    """

    name: Literal["exits"]  # type: ignore[assignment]
    exits: tuple[int, ...] = ()
    layers: int | None = None
    weights: tuple[float, ...] = ()
    hard: float = 1.0
    soft: float = 0.0
    teachers: tuple[str, ...] = ()
    divergence: Divergence = dataclasses.field(default_factory=Divergence)

    def __post_init__(self):
        super().__post_init__()
        rising = all(lo < hi for lo, hi in itertools.pairwise((0, *self.exits)))
        schema.require(rising, "objective.exits must be numbers of layers that rise", list(self.exits))
        count = len(self.exits) + 1
        finite = all(0 < weight < math.inf for weight in self.weights)
        if self.weights and (len(self.weights) != count or not finite):
            raise UserError(
                f"objective.weights must be {count} finite numbers above 0, one for each exit and one for the end, or "
                f"none, got {list(self.weights)}"
            )
        schema.require_weights(self, "hard", "soft")
        if self.soft and not self.teachers and not self.exits:
            raise UserError("objective.soft has no use with neither objective.exits nor objective.teachers")
        if not self.hard and (not self.soft or not self.teachers):
            raise UserError("with objective.hard at 0 the last exit learns nothing, unless objective.teachers teach it")
        if len(self.teachers) not in (0, 1, count):
            raise UserError(
                f"objective.teachers must be one directory for all exits, or {count}, one for each and one for the "
                f"end, got {len(self.teachers)}"
            )
        if self.teachers and not self.soft:
            raise UserError("objective.teachers have nothing to teach while objective.soft is 0")
        if not self.soft and self.divergence != Divergence():
            raise UserError("objective.divergence has no use while objective.soft is 0")
        if self.init_from is None and (self.layers is not None or _START in self.teachers):
            what = "layers cuts" if self.layers is not None else "teachers name"
            raise UserError(f"objective.{what} objective.init_from, which is not given")

    @property
    def base(self) -> str | None:
        """What the job starts from, else a teacher, whose tokenizer the data must have."""
        return self.init_from or next(iter(self.teachers), None)

    @property
    def taught_by(self) -> tuple[str, ...]:
        """The teachers' directories."""
        return tuple(str(self.init_from) if name == _START else name for name in self.teachers)


class Lesson(NamedTuple):
    """What some of the exits are compared with.

    Attributes:
      exits: which, by their number in the list.
      soft: weight of the divergence.
      read: from rows of `scored` to the teacher's logits.
      scored: what it reads, at every position.
    """

    exits: list[int]
    soft: float
    read: Any
    scored: Array


class Exits(LM):
    """The `exits` objective.

    Attributes:
      exits: all of them, in layers.
      teachers: directory -> shape.
    """

    Config: ClassVar[type] = ExitsConfig
    _config: ExitsConfig

    def __init__(self, config: ExitsConfig, tokenizer: Tokenizer):
        """As `LM`; also raises UserError for exits that the network does not have, and for teachers of other tokens."""
        super().__init__(config, tokenizer)
        if config.layers is not None:
            most = self.model.num_layers
            schema.require(1 <= config.layers <= most, f"objective.layers must lie in 1..{most}", config.layers)
            self.model = dataclasses.replace(
                self.model, num_layers=config.layers, windows=self.model.windows[: config.layers]
            )
        if max(config.exits, default=0) >= self.model.num_layers:
            raise UserError(
                f"objective.exits must lie before the end of the network's {self.model.num_layers} layers, which is an "
                f"exit anyway, got {list(config.exits)}"
            )
        self.exits = (*config.exits, self.model.num_layers)
        self.teachers = {path: load_config(path) for path in config.taught_by}
        for path, teacher in self.teachers.items():
            if teacher.encoder_layers:
                raise UserError(f"the teacher {path} is an encoder-decoder, expected a decoder")
            check_vocabulary(teacher, tokenizer, path)
            own = Tokenizer.load(path).fingerprint
            check_same_tokens(f"the teacher {path}", own, "the data set", tokenizer.fingerprint)
        self._size = vocabulary.shared(self.model, *self.teachers.values())
        self.prepare(Compute())

    def prepare(self, compute: Compute) -> None:
        """Also decides the dtype of teachers."""
        super().prepare(compute)
        # Of what is read from disk.
        shapes: dict[str, Any] = {}
        if self._config.init_from is not None:
            shapes["start"] = transformer.param_shapes(self.model, jnp.float32)
        if self.teachers:
            shapes["teachers"] = [
                jax.eval_shape(transformer.stack_layers, transformer.param_shapes(teacher, compute.dtype))
                for teacher in self.teachers.values()
            ]
        self.base = shapes or None

    def check(self, length: int | None) -> None:
        """Also refuses rows that are longer than a teacher reads."""
        super().check(length)
        for path, teacher in self.teachers.items():
            if length is not None and length > teacher.max_position:
                longest = teacher.max_position
                raise UserError(
                    f"config.length ({length}) exceeds the longest sequence of the teacher {path} ({longest})"
                )

    @property
    def inputs(self) -> Mapping[str, str | None]:
        """What it starts from, and the teachers."""
        named = {f"objective.teachers[{i}]": path for i, path in enumerate(self._config.taught_by)}
        return {**super().inputs, **named}

    def load_base(self, mesh: Mesh) -> Params:
        """What training starts from in float32, and the teachers in the dtype of the computation."""
        loaded: dict[str, Any] = {}
        if self._config.init_from is not None:
            whole = super().load_base(mesh)
            loaded["start"] = {**whole, "layers": whole["layers"][: self.model.num_layers]}
        if self.teachers:
            loaded["teachers"] = [
                transformer.stack_layers(load_target(path, dtype=self.compute.dtype, mesh=mesh).params)
                for path in self.teachers
            ]
        return loaded

    def frozen_part(self, base: Params | None) -> Params | None:
        """The teachers."""
        return None if base is None else base.get("teachers")

    def init(self, key: Array, base: Params | None) -> Params:
        """As `LM`."""
        return super().init(key, None if base is None else base.get("start"))

    def loss(self, trainable: Params, frozen: Params | None, batch: Batch, key: Array, progress: Array | float):
        """One term per exit; metrics hold each exit's mean before its weight."""
        config, students, rows = self._config, self.students(trainable, batch), self._rows(batch)
        if config.divergence.drawn:
            rows = rows._replace(uniform=jax.random.uniform(key, (*rows.counted.shape, 2)))
        sums: dict[int, Array] = {}
        for lesson in self.lessons(students, frozen, batch):
            found = divergence_sums(
                config.divergence,
                [students[i] for i in lesson.exits],
                lesson.read,
                rows._replace(scored=lesson.scored),
                soft=lesson.soft,
                hard=config.hard,
                devices=self.compute.devices,
            )
            sums.update(zip(lesson.exits, found, strict=True))
        totals = jnp.stack([sums[i] for i in range(len(students))])
        counts = jnp.broadcast_to(jnp.sum(rows.counted).astype(totals.dtype), totals.shape)
        told = {f"loss_{e}": pair for e, pair in zip(self.exits, zip(totals, counts, strict=True), strict=True)}
        weights = config.weights or [e / self.model.num_layers for e in self.exits]
        return (jnp.asarray(weights, totals.dtype) * totals, counts), told

    def evaluate(self, trainable: Params, frozen: Params | None, batch: Batch) -> Sums:
        """By exit, cross-entropy with the text, and how much of its drafts its teacher would keep, sampled (`alpha`)
        and greedy (`agreement`); where there is no teacher, the last exit."""
        students, rows, sums = self.students(trainable, batch), self._rows(batch), {}
        count = jnp.sum(rows.counted).astype(jnp.float32)
        for lesson in self.lessons(students, frozen, batch):
            found = divergence_measures(
                self._config.divergence,
                [students[i] for i in lesson.exits],
                lesson.read,
                rows._replace(scored=lesson.scored),
                self.compute.devices,
            )
            for i, of_exit in zip(lesson.exits, found, strict=True):
                sums.update({f"{name}_{self.exits[i]}": (of_exit[name], count) for name in _SHOWN})
        return sums

    def report(self, means: dict[str, float]) -> dict[str, float]:
        """The means, exit by exit."""
        return {f"{name}_{e}": means[f"{name}_{e}"] for e in self.exits for name in _SHOWN}

    def students(self, trainable: Params, batch: Batch) -> list[Student]:
        """What every exit says at every position of the text."""
        params, last = self.compute.cast(trainable), self.model.num_layers
        names = [f"layer:{e}" if e < last else "pre_norm" for e in self.exits]
        layout = layout_of(batch, self.compute.attention)
        out = transformer.forward(self.model, params, batch["tokens"], layout, taps=names, remat=self.compute.remat)
        read = vocabulary.reader(self.model, params, self._size)
        return [Student(transformer.final_norm(self.model, params, out.taps[name]), read) for name in names]

    def lessons(self, students: list[Student], frozen: Params | None, batch: Batch) -> list[Lesson]:
        """What the exits are compared with, those of one teacher together; no gradient enters a teacher."""
        every = list(range(len(students)))
        if not self.teachers:
            last = jax.lax.stop_gradient(students[-1])
            taught = Lesson(every[:-1], self._config.soft, last.read, last.hidden)
            return [taught] * bool(every[:-1]) + [taught._replace(exits=every[-1:], soft=0.0)]
        assert frozen is not None
        found, layout = [], layout_of(batch, self.compute.attention)
        for (path, model), params in zip(self.teachers.items(), jax.lax.stop_gradient(frozen), strict=True):
            hidden = transformer.forward(model, params, batch["tokens"], layout).hidden
            paths = self._config.taught_by
            exits = every if len(paths) == 1 else [i for i in every if paths[i] == path]
            found.append(Lesson(exits, self._config.soft, vocabulary.reader(model, params, self._size), hidden))
        return found

    def _rows(self, batch: Batch) -> Rows:
        tokens, counted = labels_at({**batch, "mask": label_mask(batch, self._config.labels)}, 1)
        return Rows(counted, None, tokens)


_SHOWN = ("cross_entropy", "alpha", "agreement")
