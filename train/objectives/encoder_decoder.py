"""Encoder-decoders: answers behind their prompts, from the text and from a decoder as teacher (Return of the Encoder).

The prompt x_1..x_m goes to the encoder; the decoder reads the begin token and y_1..y_n and learns y_1..y_n and what
ends them. The teacher reads both as one text, x_1..x_m y_1..y_n. What it says behind x_m y_1..y_j answers for y_{j+1},
as the decoder's row j does: with prompts padded on their left to S tokens, its rows S - 1 and on lie beside the
decoder's, whatever the prompts' lengths. Positions count from where each text begins. With means over labels

    loss = soft * mean(divergence(p, q)) + hard * mean(-log q(y))

over the tokens that both vocabularies have; the larger one is cut before the softmax. `source` says whose answers
teacher and student are compared on: the data set's, or, as published, those that the student draws (`student`), while
`hard` always learns the data set's. Without a teacher it is next-token cross-entropy.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from decoding.generate import bucket, generate, slots_needed
from decoding.sampling import Sampling
from models import processes, schema, transformer
from models.config import TransformerConfig
from models.encoder_decoder import Memory, beside, encode
from models.errors import UserError
from models.formats.hf import load_config
from models.formats.target import Target, check_same_tokens, load_target
from models.formats.tokenizer import Tokenizer
from models.layout import Layout
from train.objectives import vocabulary
from train.objectives.divergences import Divergence, Rows, Student, divergence_measures, divergence_sums
from train.objectives.lm import LM, LMConfig
from train.objectives.objective import Batch, Params, Sums
from train.objectives.shift import labels_at
from train.objectives.target_features import layout_of
from train.objectives.written import Writer

_WRITTEN = "written"  # In a batch: what the student wrote, and beside it what of it is text.
_BESIDE = "written_segments"


@dataclasses.dataclass(frozen=True)
class EncoderDecoderConfig(LMConfig):
    """The section `objective` of an encoder-decoder's job.

    Attributes:
      name: `encoder_decoder`.
      model: fields of `models.config.TransformerConfig`, `encoder_layers` among them, but those that the tokenizer
        decides and the family; or None.
      init_from: an encoder-decoder's target directory to go on from; or None. Exactly one of the two is given.
      labels: as `lm` has it; a row being one answer, both mean the same.
      source_length: tokens of the longest prompt; `config.length` is that of the longest answer, one more.
      target: directory of the teacher, a decoder of the same tokenizer, which stays as it is; None learns from the text
        alone.
      divergence: which (`divergences.py`).
      soft: weight of the divergence; 0 without a teacher.
      hard: weight of the cross-entropy with the data set's answers.
      source: whose answers the divergence is of, `dataset` or `student`.
      sampling: temperature at which the student draws.
      top_k: tokens that it draws from; 0 is all.
      reuse: steps that learn from what was drawn once, and from the data set's answers to the same prompts.
    """

    name: Literal["encoder_decoder"]  # type: ignore[assignment]
    source_length: int = 1024
    target: str | None = None
    divergence: Divergence = dataclasses.field(default_factory=Divergence)
    soft: float = 0.0
    hard: float = 1.0
    source: Literal["dataset", "student"] = "dataset"
    sampling: float = 0.9
    top_k: int = 128
    reuse: int = 1

    def __post_init__(self):
        super().__post_init__()
        if "family" in (self.model or {}):
            raise UserError("objective.model.family is that of all encoder-decoders; leave it out")
        schema.require_weights(self, "soft", "hard", "sampling", "top_k")
        for name in ("source_length", "reuse"):
            schema.require(getattr(self, name) >= 1, f"objective.{name} must be at least 1", getattr(self, name))
        if not self.hard + self.soft:
            raise UserError("objective.hard and objective.soft are both 0: there is nothing to learn")
        if (self.target is None) != (self.soft == 0):
            raise UserError(
                f"objective.soft must be positive with a teacher (objective.target) and 0 without, got {self.soft}"
            )
        if self.source == "student" and self.target is None:
            raise UserError("objective.source 'student' is for a teacher to judge: set objective.target")
        if self.target is None and self.divergence != Divergence():
            raise UserError("objective.divergence has no use without a teacher: set objective.target")
        if self.source != "student":
            why = "is for answers that the student writes (objective.source 'student')"
            schema.require_defaults(self, "sampling", "top_k", "reuse", why=why)
        if self.divergence.drawn:
            raise UserError(f"objective.divergence.name {self.divergence.name!r} is not for encoder-decoders")

    @property
    def base(self) -> str | None:
        """Whose tokenizer the data must be of."""
        return self.init_from or self.target

    def shape(self, vocab_size: int, bos_id: int | None, eos_ids: tuple[int, ...]) -> TransformerConfig:
        """As of any language model."""
        facts = {"vocab_size": vocab_size, "bos_id": bos_id, "eos_ids": eos_ids, "family": "mu"}
        return schema.parse(TransformerConfig, {**(self.model or {}), **facts}, "objective.model")


class EncoderDecoder(LM):
    """The `encoder_decoder` objective."""

    Config: ClassVar[type] = EncoderDecoderConfig
    encodes: ClassVar[bool] = True
    _config: EncoderDecoderConfig

    def __init__(self, config: EncoderDecoderConfig, tokenizer: Tokenizer):
        """As `LM`. Raises UserError, too, for a teacher that is none, or reads other tokens."""
        super().__init__(config, tokenizer)
        self._student, self.teacher, self._writer = self.base, None, Writer(self.model, tokenizer)
        if config.target is None:
            return
        self.teacher = load_config(config.target)
        if self.teacher.encoder_layers:
            raise UserError(f"objective.target ({config.target}) is an encoder-decoder, expected a decoder")
        own = Tokenizer.load(config.target).fingerprint
        check_same_tokens(f"objective.target {config.target}", own, "the student", tokenizer.fingerprint)

    def prepare(self, compute):
        """Also says what is read from disk, the teacher in the dtype of the computation."""
        super().prepare(compute)
        found = {} if self._student is None else {"student": self._student}
        if self.teacher is not None:
            shapes = transformer.param_shapes(self.teacher, compute.dtype)
            found["teacher"] = jax.eval_shape(transformer.stack_layers, shapes)
        self.base = found or None

    def check(self, length):
        """Refuses rows that are longer than student or teacher read, and a model that names no token to begin with."""
        super().check(length)
        Target(self.model, {}).opening([])
        longest = self._config.source_length
        if longest > self.model.max_position:
            raise UserError(
                f"objective.source_length ({longest}) exceeds the longest text of the encoder "
                f"({self.model.max_position}): set objective.model.max_position"
            )
        if self.teacher is not None and longest + length - 1 > self.teacher.max_position:
            raise UserError(
                f"a prompt of {longest} tokens (objective.source_length) and an answer of {length - 1} exceed the "
                f"teacher's longest sequence ({self.teacher.max_position})"
            )
        if self.refresh_every and processes.count() > 1:
            raise UserError("text is written by one process: with several, objective.source must be 'dataset'")

    @property
    def inputs(self) -> Mapping[str, str | None]:
        """What it goes on from, and the teacher."""
        return {**super().inputs, "objective.target": self._config.target}

    def load_base(self, mesh: Mesh) -> Params:
        """What the student begins as, in float32, and the teacher."""
        found = {} if self._student is None else {"student": super().load_base(mesh)}
        if self._config.target is not None:
            teacher = load_target(self._config.target, dtype=self.compute.dtype, mesh=mesh).params
            found["teacher"] = transformer.stack_layers(teacher)
        return found

    def frozen_part(self, base: Params | None) -> Params | None:
        """The teacher."""
        return (base or {}).get("teacher")

    def init(self, key: Array, base: Params | None) -> Params:
        """Random parameters, or what the student goes on from; layers stacked, in float32."""
        return super().init(key, (base or {}).get("student"))

    @property
    def refresh_every(self) -> int:  # type: ignore[override]
        """The student writes for so many steps."""
        return self._config.reuse if self._config.source == "student" else 0

    def refresh(self, trainable, frozen, batch, key):
        """The batch, with answers that the student draws to its prompts."""
        length, rows = batch["tokens"].shape[1], zip(batch["source"], batch["source_length"], strict=True)
        made = generate(
            self._writer.of(trainable, self.compute),
            [source[:count].tolist() for source, count in rows],
            max_new_tokens=length - 1,
            sampling=Sampling(self._config.sampling, top_k=self._config.top_k),
            seeds=np.asarray(jax.random.bits(key, (len(batch["tokens"]),)), np.uint32).tolist(),
            capacity=bucket(slots_needed(1, length - 1, 0)),
        )
        written, segments = np.zeros_like(batch["tokens"]), np.zeros_like(batch["segments"])
        for row, new in enumerate(made.tokens):
            written[row, 1 : 1 + len(new)], segments[row, : 1 + len(new)] = new, 1
        return {**batch, _WRITTEN: written, _BESIDE: segments}

    def refreshed(self, length):
        """What the student wrote, where it writes."""
        return dict.fromkeys((_WRITTEN, _BESIDE) if self.refresh_every else (), ((length,), np.dtype(np.int32)))

    def loss(self, trainable: Params, frozen: Params | None, batch: Batch, key: Array, progress: Array | float):
        """One term per weight: without a teacher cross-entropy; with one divergence, and cross-entropy beside it."""
        if frozen is None:
            (total, weight), told = super().loss(trainable, None, batch, key, progress)
            return (self._config.hard * total, weight), told
        params, config, frozen = self.compute.cast(trainable), self._config, jax.lax.stop_gradient(frozen)
        memory = self._memory(params, batch)
        mine = self._student_on(params, memory, batch)
        rows, labels = self._rows(frozen, batch), self._labels(batch)
        sums = functools.partial(divergence_sums, config.divergence, devices=self.compute.devices)
        if _WRITTEN not in batch:
            (total,) = sums([mine], self._read_teacher(frozen), rows, soft=config.soft, hard=config.hard)
            return (total, _count(rows)), {}
        written = {**batch, "tokens": batch[_WRITTEN], "segments": batch[_BESIDE], "mask": batch[_BESIDE]}
        theirs = self._rows(frozen, written)
        own = self._student_on(params, memory, written)
        (soft,) = sums([own], self._read_teacher(frozen), theirs, soft=config.soft)
        (hard,) = sums([mine], self._read_teacher(frozen), labels, soft=0.0, hard=config.hard)
        return (jnp.stack([soft, hard]), jnp.stack([_count(theirs), _count(labels)])), {}

    def evaluate(self, trainable: Params, frozen: Params | None, batch: Batch) -> Sums:
        """On the data set's answers: cross-entropy and first-choice accuracy; with a teacher also the divergence from
        it, `alpha`, sum of min(p, q), and `agreement` of first choices."""
        if frozen is None:
            return super().evaluate(trainable, None, batch)
        params = self.compute.cast(trainable)
        mine, rows = self._student_on(params, self._memory(params, batch), batch), self._rows(frozen, batch)
        (found,) = divergence_measures(
            self._config.divergence, [mine], self._read_teacher(frozen), rows, self.compute.devices
        )
        found["divergence"], found["loss"] = found["loss"], found.pop("cross_entropy")
        return {name: (value, _count(rows)) for name, value in found.items()}

    def report(self, means):
        """As `LM`, and what is compared with the teacher."""
        beside = ("divergence", "alpha", "agreement")
        return {**super().report(means), **{name: float(means[name]) for name in beside if name in means}}

    def hidden(self, params: Params, batch: Batch) -> Float[Array, "B T H"]:
        """Of the decoder, behind the encoder."""
        return self._decoded(params, self._memory(params, batch), batch)

    def _memory(self, params: Params, batch: Batch) -> Memory:
        compute = self.compute
        return encode(self.model, params, batch["source"], batch["source_length"], compute.attention, compute.remat)

    def _decoded(self, params: Params, memory: Memory, batch: Batch) -> Float[Array, "B T H"]:
        assert self.model.bos_id is not None
        tokens = batch["tokens"].at[:, 0].set(self.model.bos_id)
        seen = beside(memory, layout_of(batch, self.compute.attention))
        return transformer.forward(self.model, params, tokens, *seen, remat=self.compute.remat).hidden

    def _student_on(self, params: Params, memory: Memory, batch: Batch) -> Student:
        return Student(self._decoded(params, memory, batch), vocabulary.reader(self.model, params, self._shared))

    def _read_teacher(self, frozen: Params):
        assert self.teacher is not None
        return vocabulary.reader(self.teacher, frozen, self._shared)

    @property
    def _shared(self) -> int:
        assert self.teacher is not None
        return vocabulary.shared(self.model, self.teacher)

    def _labels(self, batch: Batch) -> Rows:
        labels, counted = labels_at(batch, 1)
        return Rows(counted, jnp.zeros((*counted.shape, 0)), labels)

    def _rows(self, frozen: Params, batch: Batch) -> Rows:
        """What the decoder's rows are compared with, place by place."""
        assert self.teacher is not None
        tokens, segments, first = joined(batch)
        layout = Layout.causal(tokens.shape[0], tokens.shape[1], segments, self.compute.attention)
        hidden = transformer.forward(self.teacher, frozen, tokens, layout).hidden
        rows = self._labels(batch)
        return rows._replace(scored=hidden[:, first : first + batch["tokens"].shape[1]])


def joined(batch: Batch) -> tuple[Int[Array, "B N"], Int[Array, "B N"], int]:
    """Prompts and answers as one text per row, N = S + T - 1.

    Returns:
      Tokens; segments, 0 for padding, which lies before the prompt and behind the answer; and S - 1, the row that
      answers for the answer's first token.
    """
    source, lengths, answer = batch["source"], batch["source_length"], batch["tokens"][:, 1:]
    size = source.shape[1]
    place = jnp.arange(size, dtype=jnp.int32) - (size - lengths)[:, None]
    moved = jnp.where(place >= 0, jnp.take_along_axis(source, jnp.maximum(place, 0), axis=1), 0)
    segments = jnp.concatenate([(place >= 0).astype(jnp.int32), batch["segments"][:, 1:]], axis=1)
    return jnp.concatenate([moved, answer], axis=1), segments, size - 1


def _count(rows: Rows) -> Float[Array, ""]:
    return jnp.sum(rows.counted).astype(jnp.float32)
