"""MiniLLM (Gu et al. 2024): reverse KL of whole texts, learnt by a policy gradient with its variance reductions.

The student q writes y behind a prompt, in a mixture with its teacher p, (1 - mix) q + mix p, so that it stays sensible.
With o the student as it wrote, token by token:

    r_t = clip((log p(y_t) - log o(y_t)) / scaling)            the reward, scaling 0.5
    R_t = sum_{s >= t} discount^(s - t) r_s / (tokens from t)   over what remains of the text, y_t included
    A_t = R_t, less its mean, over its deviation, over the written tokens of the batch
    ratio_t = q(y_t) / o(y_t) * o(y_t) / mixture(y_t)

    loss = mean(max(-A ratio, -A clip(ratio, 1 - clip, 1 + clip)))     the policy gradient
         + single * mean(KL(q || p))                                   its next step, exactly, at every place
         + pretrain * mean(-log q(x) + KL(p || q)) / 2                 on the batch of the data set

What is written once serves `reuse` steps. Padding takes no part in the mean and the deviation, which the published
code does let in.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from decoding.blend import blend
from decoding.drafters.draft_model import DraftModel
from models import schema
from models.config import TransformerConfig
from train.objectives.distill import MEASURES, DraftModelObjective, check_distilling, labels_per_row, student_of
from train.objectives.divergences import (
    Divergence,
    Rows,
    Student,
    divergence_measures,
    divergence_sums,
    log_probabilities,
    reverse_kl,
)
from train.objectives.guess import Weights
from train.objectives.objective import Batch
from train.objectives.pieces import mapped, pieces_of, separable_sums
from train.objectives.shift import label_mask, labels_at, log_likelihood
from train.objectives.written import as_rows, openings

_WRITTEN = "written/"  # Begins the names of what a batch carries of the student's text.


@dataclasses.dataclass(frozen=True)
class MiniLLMConfig:
    """The section `objective` of a MiniLLM job; what is not named here is as in `DistillConfig`.

    Attributes:
      name: `minillm`.
      mix: share of the teacher in what is written.
      scaling: that rewards are divided by.
      reward_clip: largest size of a reward, once it is scaled.
      discount: of later rewards.
      clip: how far the ratio may leave 1.
      single: weight of the exact next step.
      pretrain: weight of the data set's text.
      reuse: steps that learn from what was written once.
    """

    reads: ClassVar[str] = "text"

    name: Literal["minillm"]
    target: str | None
    model: Mapping[str, Any] | None = None
    init_from: str | None = None
    mix: float = 0.2
    scaling: float = 0.5
    reward_clip: float = 100.0
    discount: float = 0.95
    clip: float = 0.2
    single: float = 1.0
    pretrain: float = 1.0
    new_tokens: int = 128
    draft: int = 4
    reuse: int = 4
    teacher_mesh: str | None = None
    labels: Literal["assistant", "all"] = "all"
    loop_prompts: int = 4
    loop_tokens: int = 64

    def __post_init__(self):
        check_distilling(self)
        for name in ("scaling", "reward_clip"):
            schema.require(getattr(self, name) > 0, f"objective.{name} must be positive", getattr(self, name))
        schema.require_weights(self, "scaling", "single", "pretrain", "clip")
        for name in ("mix", "discount"):
            schema.require(0 <= getattr(self, name) <= 1, f"objective.{name} must lie in 0..1", getattr(self, name))

    @property
    def weights(self) -> Weights:
        """Of the loss's terms, as far as they say what is read of the target."""
        return Weights(0.5, 0.5, 0.0, 1.0)

    @property
    def base(self) -> str:
        """The target."""
        return str(self.target)

    def untrained(self, model: TransformerConfig) -> DraftModel:
        """The student as a drafter of chains, without parameters."""
        return student_of(self, model)


class _Written(NamedTuple):
    """The student's text, at the places that answer for its tokens.

    Attributes:
      counted: where.
      scored: what the teacher's logits are made from.
      labels: the tokens.
      old: their log-probabilities when they were written.
      weight: student over mixture, then.
      advantage: of them.
    """

    counted: Bool[Array, "B S"]
    scored: Any
    labels: Int[Array, "B S"]
    old: Float[Array, "B S"]
    weight: Float[Array, "B S"]
    advantage: Float[Array, "B S"]


class MiniLLMObjective(DraftModelObjective):
    """The `minillm` objective."""

    Config: ClassVar[type] = MiniLLMConfig

    @property
    def refresh_every(self) -> int:  # type: ignore[override]
        """Text is written for so many steps."""
        return self._config.reuse

    def refresh(self, trainable, frozen, batch, key):
        """The student's text, with what the loss needs of how it came about."""
        config = self._config
        marked = {**batch, "mask": np.asarray(label_mask(batch, config.labels), np.uint8)}
        length = batch["tokens"].shape[1]
        room = length - config.new_tokens
        rows = {name: np.zeros_like(values) for name, values in marked.items()}
        if prompts := openings(marked, room):
            teacher, student = self.writers(trainable, frozen)
            seeds = np.asarray(jax.random.bits(key, (len(prompts),)), np.uint32).tolist()
            made = blend(student, teacher, config.mix, prompts, config.new_tokens, seeds, room)
            rows = as_rows(prompts, made, [[True] * len(new) for new in made], length)
        likely = np.asarray(_likelihoods(self, trainable, frozen, {name: jnp.asarray(x) for name, x in rows.items()}))
        old, taught = likely[..., 0], likely[..., 1]
        counted = np.asarray(labels_at(rows, 1)[1])
        mixture = np.logaddexp(np.log1p(-config.mix) + old, np.log(config.mix) + taught) if config.mix else old
        reward = np.clip((taught - old) / config.scaling, -config.reward_clip, config.reward_clip)
        told = {"old": old, "weight": np.exp(old - mixture), "advantage": advantages(reward, counted, config.discount)}
        return {
            **{f"{_WRITTEN}{name}": values for name, values in rows.items()},
            **{f"{_WRITTEN}{name}": np.where(counted, x, 0).astype(np.float32) for name, x in told.items()},
        }

    def refreshed(self, length):
        """Tokens, and what is known of them."""
        whole, real = np.dtype(np.int32), np.dtype(np.float32)
        dtypes = {"tokens": whole, "segments": whole, "mask": np.dtype(np.uint8)}
        dtypes |= {"old": real, "weight": real, "advantage": real}
        return {f"{_WRITTEN}{name}": ((length,), dtype) for name, dtype in dtypes.items()}

    def loss_on(self, target, trainable, frozen, batch, key, progress):
        """Two terms: over what was written, and over the data set's text."""
        config = self._config
        written = {name.removeprefix(_WRITTEN): values for name, values in batch.items() if name.startswith(_WRITTEN)}
        labels, counted = labels_at(written, 1)
        of_written = self.read_target(frozen, written)
        told = (written[name] for name in ("old", "weight", "advantage"))
        rows = _Written(counted, of_written.scored, labels, *told)
        student = self.student(trainable, written)
        first = policy_sums(config, student, self.teacher(of_written), rows, self.compute.devices)
        known = self._known(target, batch)
        (second,) = divergence_sums(
            Divergence(),
            [self.student(trainable, batch)],
            self.teacher(target),
            known,
            soft=config.pretrain / 2,
            hard=config.pretrain / 2,
            devices=self.compute.devices,
        )
        weights = jnp.stack([jnp.sum(counted), jnp.sum(known.counted)]).astype(first.dtype)
        return (jnp.stack([first, second]), weights), labels_per_row(jnp.sum(weights), counted)

    def evaluate_on(self, target, trainable, frozen, batch):
        """As `DistillObjective`'s, of reverse KL."""
        known = self._known(target, batch)
        students = [self.student(trainable, batch)]
        (sums,) = divergence_measures(
            Divergence("reverse_kl"), students, self.teacher(target), known, self.compute.devices
        )
        weight = jnp.sum(known.counted).astype(jnp.float32)
        return {name: (value, weight) for name, value in sums.items()}

    def report(self, means):
        """The means."""
        return {name: float(means[name]) for name in MEASURES}

    def _known(self, target, batch: Batch) -> Rows:
        tokens, counted = labels_at({**batch, "mask": label_mask(batch, self._config.labels)}, 1)
        return Rows(counted, target.scored, tokens)


@functools.partial(jax.jit, static_argnames="objective")
def _likelihoods(objective: MiniLLMObjective, trainable, frozen, rows: Batch) -> Float[Array, "B S 2"]:
    """log q and log p of the next token at every place."""
    student, target = objective.student(trainable, rows), objective.read_target(frozen, rows)
    labels, _ = labels_at(rows, 1)
    taught = objective.teacher(target)

    def both(piece):
        hidden, scored, labels = piece
        return jnp.stack([log_likelihood(student.read(hidden), labels), log_likelihood(taught(scored), labels)], -1)

    heads: list[tuple[Callable, Any]] = [(student.read, student.hidden), (taught, target.scored)]
    return mapped(both, (student.hidden, target.scored, labels), pieces_of(heads, objective.compute.devices))


def advantages(
    reward: Float[np.ndarray, "B S"], counted: Bool[np.ndarray, "B S"], discount: float
) -> Float[np.ndarray, "B S"]:
    """A_t of every counted place, 0 elsewhere; see the module."""
    total, number = np.zeros(len(reward)), np.zeros(len(reward))
    returns = np.zeros(reward.shape)
    for place in reversed(range(reward.shape[1])):
        here = counted[:, place]
        total = np.where(here, reward[:, place] + discount * total, total)
        number = number + here
        returns[:, place] = total / np.maximum(number, 1)
    kept = returns[counted]
    if len(kept) < 2:
        return np.zeros(reward.shape)
    return np.where(counted, (returns - kept.mean()) / np.sqrt(kept.var(ddof=1) + 1e-8), 0)


def policy_sums(
    config: MiniLLMConfig, student: Student, teacher: Any, rows: _Written, devices: int = 1
) -> Float[Array, ""]:
    """The policy gradient's loss and the exact next step's, over what was written."""

    def share(rows):
        return log_probabilities(teacher(rows.scored)) if config.single else None

    def score(_, read, hidden, rows, log_p):
        log_q = log_probabilities(read(hidden))
        likely = log_likelihood(log_q, rows.labels)
        ratio = jnp.exp(likely - rows.old) * rows.weight
        near = jnp.clip(ratio, 1 - config.clip, 1 + config.clip)
        loss = jnp.maximum(-rows.advantage * ratio, -rows.advantage * near)
        if config.single:
            loss += config.single * reverse_kl(log_q, log_p)
        return jnp.sum(jnp.where(rows.counted, loss, 0))

    pieces = pieces_of([(student.read, student.hidden), (teacher, rows.scored)], devices)
    return separable_sums(share, score, [student.read], [student.hidden], rows, pieces)[0]
