"""What every objective shares that trains a drafter on a frozen target.

Guess i of position p answers for x_{p+2+i}. Its path, the true tokens x_{p+1} .. x_{p+1+i}, is given, and its teacher
is the target's distribution at p+1+i, the one that verification would consult there (`shift.py`, distance i + 2). With
rho the decay, and means over the labels of each depth:

    loss = sum_i rho^i mean( hard * -log q_i(x) + soft * -sum_v t(v) log q_i(v) + feature * SmoothL1(g_i, h_{p+1+i}) )

where q_i is the guess, t the teacher, g_i what the guess's vocabulary map reads and h the target's post-norm feature
(`guess.py`).
A drafter with a vocabulary of its own is compared with the teacher on that vocabulary, renormalised, and only where it
holds the target's first choice (EAGLE-3), and the label where that is learnt.
"""

import abc
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int

from decoding.drafters.registry import save_drafter
from decoding.generate import generate
from decoding.replay import is_replayable, replay_acceptance
from decoding.trees import chain
from models import processes, schema, transformer
from models.errors import UserError
from models.formats.target import Target
from models.formats.tokenizer import Tokenizer
from models.heads import vocabulary
from models.layout import Layout
from train.objectives.divergences import Divergence
from train.objectives.frozen_target import BesideFrozenTarget
from train.objectives.guess import Guess, Labels, Teacher, first_choices, losses, measures, picked
from train.objectives.objective import Batch, Compute, Params, Sums
from train.objectives.shift import label_mask, labels_at
from train.objectives.target_features import LOGITS, TargetFeatures, layout_of, target_features

if TYPE_CHECKING:  # Training steps are timed where TFDS is not installed.
    from train.data.texts import Documents


class OnFrozenTarget(BesideFrozenTarget):
    """Base of the objectives that make a drafter, of any kind that has parameters, on a target that stays as it is.

    A subclass gives `Config`, whose objects have what `asks_of_config` names, `untrained(model)` being the drafter
    without parameters, and `depth`, `loss_on` and `evaluate_on`.

    Attributes:
      drafter: the drafter without parameters.
    """

    product: ClassVar[str] = "drafter"
    asks_of_config: ClassVar[tuple[str, ...]] = ("labels", "loop_prompts", "loop_tokens", "weights", "untrained")

    def __init__(self, config: Any, tokenizer: Tokenizer):
        """`tokenizer` is the target's, and the data's. Raises UserError for a missing or broken target."""
        super().__init__(config, tokenizer)
        self.drafter = config.untrained(self.model)
        self.drafter.check(self.model)
        self.prepare(Compute())

    @property
    def target_taps(self) -> tuple[str, ...]:  # type: ignore[override]
        """What the drafter reads, and what the loss compares it with."""
        weights = self._config.weights
        compared = ("post_norm",) * (weights.feature > 0) + (LOGITS,) * (weights.soft > 0)
        return (*self.drafter.taps, *compared)

    @property
    def divergences(self) -> tuple[Divergence, ...]:  # type: ignore[override]
        """That of the loss, where it has one."""
        weights = self._config.weights
        return (weights.divergence,) if weights.soft and weights.divergence else ()

    @property
    @abc.abstractmethod
    def depth(self) -> int:
        """Guesses that evaluations look at."""

    def check(self, length: int | None) -> None:
        """Also refuses guesses that can have no labels, and a drafter that the probe cannot give its chain."""
        super().check(length)
        # Guess i answers for the token i + 2 places ahead.
        if length is not None and self.depth + 2 > length:
            raise UserError(
                f"{self.depth} guesses in a row need rows of at least {self.depth + 2} tokens, or the last has no "
                f"labels: config.length is {length}"
            )
        if self._config.loop_prompts and self._config.loop_tokens:
            try:
                self.drafter.with_tree(chain(self.depth))
            except (AttributeError, UserError) as error:
                raise UserError(
                    f"evaluations decode with a chain of {self.depth}, which {type(self.drafter).__name__} cannot be "
                    f"given ({error}): set objective.loop_prompts to 0, or define its with_tree"
                ) from None

    def scan_data(self, documents: "Documents") -> None:
        """Refuses documents so short that the last guess has no labels."""
        longest = int(documents.lengths.max(initial=0))
        if self.depth + 2 > longest:
            raise UserError(
                f"{self.depth} guesses in a row need documents of at least {self.depth + 2} tokens, or the last has no "
                f"labels: the longest to learn from has {longest}"
            )

    def load_base(self, mesh: Mesh) -> Params:
        """The target, in the dtype of the computation, and what belongs to it."""
        return {**self.load_target(mesh), **self.beside_target(mesh)}

    def beside_target(self, mesh: Mesh) -> Params:
        """The rest of the base."""
        return {}

    def init(self, key: Array, base: Params) -> Params:
        """A fresh drafter in float32, whatever the target's dtype: small updates must not round away."""
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), self.drafter.init_params(self.model, base, key))

    def drafter_params(self, trainable: Params, frozen: Params) -> Params:
        """All parameters of the drafter, as a drafter directory has them."""
        return trainable

    def loss(self, trainable: Params, frozen: Params, batch: Batch, key: Array, progress: Array | float):
        """As for any objective; no gradient enters the target, whoever asks for one."""
        frozen = jax.lax.stop_gradient(frozen)
        return self.loss_on(self.read_target(frozen, batch), trainable, frozen, batch, key, progress)

    @abc.abstractmethod
    def loss_on(
        self,
        target: TargetFeatures,
        trainable: Params,
        frozen: Params,
        batch: Batch,
        key: Array,
        progress: Array | float,
    ) -> tuple[tuple[Array, Array], Sums]:
        """`loss`, given the target's features on the batch."""

    def evaluate(self, trainable: Params, frozen: Params, batch: Batch) -> Sums:
        """By depth: the loss; how often the first choice is the text's token (accuracy); how often it is the target's
        first choice there (agreement), which is what greedy verification would accept on this text."""
        return self.evaluate_on(self.read_target(frozen, batch), trainable, frozen, batch)

    @abc.abstractmethod
    def evaluate_on(self, target: TargetFeatures, trainable: Params, frozen: Params, batch: Batch) -> Sums:
        """`evaluate`, given the target's features on the batch."""

    def report(self, means: dict[str, float]) -> dict[str, float]:
        """The means, in the order of depth."""
        measures = ("loss", "accuracy", "agreement")
        return {f"{name}_{i + 1}": means[f"{name}_{i + 1}"] for name in measures for i in range(self.depth)}

    def probe(self, trainable: Params, frozen: Params, batches: Iterator[Batch]) -> dict[str, float]:
        """Share of decoding steps that accept depth d: in the loop, and by the training-time forward on its text.

        The loop decodes greedily from where labels begin in held-out rows (`prompts_of`), with the rank-0 chain as its
        tree. The two shares must be equal (`decoding/replay.py`, which not every drafter knows); a difference means
        that drafters are not served as they are trained. Empty when nothing is to be decoded, or the target has no room
        for it, or there are several processes.
        """
        if processes.count() > 1:
            return {}
        batch = next(batches)
        batch = {**batch, "mask": label_mask(batch, self._config.labels)}
        arrays = {name: np.asarray(values) for name, values in batch.items()}
        prompts = prompts_of(arrays, self.model.max_position - self._config.loop_tokens)[: self._config.loop_prompts]
        new_tokens = min(self._config.loop_tokens, self.model.max_position - max(map(len, prompts), default=0))
        if not prompts or new_tokens <= 0:
            return {}
        params = self.drafter_params(self.compute.cast(trainable), frozen)
        target = Target(self.model, transformer.unstack_layers(frozen), self._tokenizer)
        drafter = self.drafter.with_tree(chain(self.depth))
        decoded = generate(target, prompts, drafter=drafter, drafter_params=params, max_new_tokens=new_tokens)
        stats = sum(decoded.stats[1:], decoded.stats[0])
        shares = {"loop": stats.accepted_by_depth}
        if is_replayable(drafter):
            shares["replay"] = replay_acceptance(target, drafter, params, prompts, decoded).sum(axis=0)
        return {
            f"{name}_{i + 1}": float(hits[i]) / max(stats.steps, 1)
            for name, hits in shares.items()
            for i in range(self.depth)
        }

    def export(self, directory: Path, trainable: Params, frozen: Params) -> None:
        """Writes a drafter directory that names the base that `load_base` read."""
        params = self.drafter_params(trainable, frozen)
        save_drafter(directory, self.drafter, params, self.fingerprint, overwrite=True)

    def read_target(self, frozen: Params, batch: Batch) -> TargetFeatures:
        """The target's features on a batch: `target_taps`, and more where the batch carries more."""
        return target_features(self.model, frozen, batch, self.target_taps, self.compute.attention)


class DraftObjective(OnFrozenTarget):
    """Base of those whose drafter guesses depth by depth; a subclass gives `guesses` in place of the losses."""

    @abc.abstractmethod
    def guesses(
        self, params: Params, frozen: Params, batch: Batch, target: TargetFeatures, layout: Layout, key: Array | None
    ) -> list[Guess]:
        """The drafter at every position, or at some, depth by depth, with the true tokens as its path.

        Args:
          params: the drafter's, in the dtype of the target.
          frozen: the target.
          batch: as for `loss`.
          target: its features on the batch, the drafter's taps among them.
          layout: of the batch.
          key: for noise and dropout; None, in evaluation, is without either.
        """

    def labels(self, batch: Batch, i: int, at: Int[Array, "B S"] | None = None) -> Labels:
        """What guess i answers for, from the positions `at`, or from all."""
        batch = {**batch, "mask": label_mask(batch, self._config.labels)}
        return Labels(*(picked(values, at) for values in labels_at(batch, i + 2)))

    def known(self, frozen: Params) -> Int[Array, "W"] | None:
        """Tokens that the guesses' logits are of; None means all, in order."""
        return None

    def loss_on(
        self,
        target: TargetFeatures,
        trainable: Params,
        frozen: Params,
        batch: Batch,
        key: Array,
        progress: Array | float,
    ):
        """One term per depth: (sums, weights); metrics hold each depth's mean before its decay."""
        guesses = self.teacher_forced(target, trainable, frozen, batch, key)
        teacher = self.teacher(target, frozen, asked=False)
        totals, weights = losses(guesses, teacher, self._config.weights, self.compute.devices)
        decay = self._config.weights.decay ** jnp.arange(len(guesses), dtype=totals.dtype)
        told = {f"loss_{i + 1}": pair for i, pair in enumerate(zip(totals, weights, strict=True))}
        return (decay * totals, weights), told

    def evaluate_on(self, target: TargetFeatures, trainable: Params, frozen: Params, batch: Batch) -> Sums:
        """`evaluate`, given the target's features on the batch."""
        guesses = self.teacher_forced(target, trainable, frozen, batch, None)
        teacher = self.teacher(target, frozen, asked=True)
        found = measures(guesses, teacher, self._config.weights, self.compute.devices)
        return {f"{name}_{i + 1}": pair for i, of_depth in enumerate(found) for name, pair in of_depth.items()}

    def teacher_forced(
        self, target: TargetFeatures, trainable: Params, frozen: Params, batch: Batch, key: Array | None
    ) -> list[Guess]:
        """The drafter at every position of the text.

        Args:
          target: its features on the batch.
          trainable: the drafter.
          frozen: the target.
          batch: `tokens` and `segments`, int [B, T].
          key: for noise and dropout; None is without either.
        """
        layout = layout_of(batch, self.compute.attention)
        return self.guesses(self.compute.cast(trainable), frozen, batch, target, layout, key)

    def teacher(self, target: TargetFeatures, frozen: Params, asked: bool) -> Teacher:
        """The target as guesses are compared with it; `asked` for its first choices."""
        known_W, choice_BT, learnt_BT = self.known(frozen), None, None
        if asked or known_W is not None:
            choice_BT = first_choices(target.read, target.scored, self.compute.devices)
        if known_W is not None and choice_BT is not None:
            learnt_BT = vocabulary.outputs_of(known_W, choice_BT) >= 0
        read = functools.partial(target.read, known=known_W)
        return Teacher(target.scored, read, target.taps.get("post_norm"), known_W, choice_BT, learnt_BT)


def prompts_of(batch: Mapping[str, np.ndarray], room: int) -> list[list[int]]:
    """What a decoder would be given before it writes what is learnt: the text up to where labels begin.

    A drafter is asked for the answers of a chat, not for the questions. First the first answer of every row, then the
    second ones, without those of more than `room` tokens where there are others. Texts that a row begins with come
    last: they may lack their beginning, which stands in another row. Where labels begin nowhere, because all is learnt,
    it is the first quarter of every row.

    Args:
      batch: `tokens`, `segments` and `mask`, [B, T], the mask true for labels.
      room: tokens of a prompt that leaves the target enough to write.
    """
    segments_BT, mask_BT = batch["segments"], batch["mask"].astype(bool)
    same_BT = (segments_BT[:, 1:] == segments_BT[:, :-1]) & (segments_BT[:, 1:] > 0)
    found = []
    for row, begins_T in enumerate(same_BT & mask_BT[:, 1:] & ~mask_BT[:, :-1]):
        for rank, place in enumerate(np.flatnonzero(begins_T) + 1):
            first = int(np.argmax(segments_BT[row] == segments_BT[row, place]))
            found.append((first == 0, rank, row, batch["tokens"][row, first:place].tolist()))
    if found:
        prompts = [prompt for *_, prompt in sorted(found)]
        return [prompt for prompt in prompts if len(prompt) <= room] or prompts
    size = max(segments_BT.shape[1] // 4, 1)
    return batch["tokens"][:, :size][(segments_BT[:, :size] > 0).all(axis=1)].tolist()


def check_drafting(config: Any) -> None:
    """Rules that the configs share. Raises UserError."""
    schema.require(
        config.target is not None, "objective.target must be the directory of the target to draft for", config.target
    )
    for name in ("loop_prompts", "loop_tokens"):
        schema.require(getattr(config, name) >= 0, f"objective.{name} must not be negative", getattr(config, name))
