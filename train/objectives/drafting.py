"""What every objective shares that trains a drafter on a frozen target.

Guess i of position p answers for x_{p+2+i}. Its path, the true tokens x_{p+1} .. x_{p+1+i}, is given, and its teacher
is the target's distribution at p+1+i, the one that verification would consult there (`shift.py`, distance i + 2). With
rho the decay, and means over the labels of each depth:

    loss = sum_i rho^i mean( hard * -log q_i(x) + soft * -sum_v t(v) log q_i(v) + feature * SmoothL1(g_i, h_{p+1+i}) )

where q_i is the guess, t the teacher, g_i what the guess's vocabulary map reads and h the target's post-norm feature.
A drafter with a vocabulary of its own is compared with the teacher on that vocabulary, renormalised, and only where it
holds the target's first choice (EAGLE-3).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from decoding.drafters.registry import save_drafter
from decoding.generate import generate
from decoding.replay import replay_acceptance
from decoding.sampling import argmax
from decoding.trees import chain
from models import schema, transformer
from models.formats.hf import load_config
from models.formats.target import Target, check_vocabulary, load_target
from models.formats.tokenizer import Tokenizer
from models.layout import Layout
from models.transformer import Output
from train.data.texts import Documents
from train.objectives.objective import Batch, Params, Sums
from train.objectives.shift import ahead, label_mask, labels_at, log_likelihood


class Weights(NamedTuple):
    """Weights of the loss's terms, and rho."""

    hard: float
    soft: float
    feature: float
    decay: float


class Guess(NamedTuple):
    """What is guessed at one depth from every position: logits, and what the vocabulary map read."""

    logits: Float[Array, "B T W"]
    hidden: Float[Array, "B T H"]


class DraftObjective:
    """Base of the objectives that make a drafter (see `objective.py` for the protocol).

    A subclass gives `Config`, whose objects have `base`, `labels`, `loop_prompts`, `loop_tokens`, `weights` and
    `untrained(model)`, and `depth` and `guesses`.
    """

    Config: ClassVar[type]
    product: ClassVar[str] = "drafter"

    def __init__(self, config: Any, tokenizer: Tokenizer):
        """`tokenizer` is the target's, and the data's. Raises UserError for a missing or broken target."""
        self._config, self._tokenizer = config, tokenizer
        self.model = load_config(config.base)
        self.drafter = config.untrained(self.model)
        self.heads = self.drafter.heads
        self.drafter.check(self.model)
        check_vocabulary(self.model, tokenizer, config.base)
        self._fingerprint: dict[str, int | str | None] = {}
        self._dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
        self.base: Params = transformer.param_shapes(self.model, self._dtype)

    @property
    def depth(self) -> int:
        """Guesses that evaluations look at."""
        raise AttributeError(f"{type(self).__name__} must say depth")

    def guesses(
        self, params: Params, frozen: Params, batch: Batch, target: Output, layout: Layout, key: Array | None
    ) -> list[Guess]:
        """The drafter at every position, depth by depth, with the true tokens as its path.

        Args:
          params: the drafter's, in the dtype of the target.
          frozen: the target.
          batch: as for `loss`.
          target: its output on the batch, with the drafter's taps.
          layout: of the batch.
          key: for noise and dropout; None, in evaluation, is without either.
        """
        raise AttributeError(f"{type(self).__name__} must define guesses")

    def survey(self, documents: Documents) -> None:
        """Nothing is to be learnt from the data as a whole."""

    def load_base(self, mesh: Mesh) -> Params:
        """The target, float32 on CPU and bfloat16 on accelerators."""
        target = load_target(self._config.base, dtype=self._dtype, mesh=mesh)
        # Now, while every process takes part: no single one may be able to read the whole embedding at the export.
        self._fingerprint = target.fingerprint()
        return target.params

    def frozen_part(self, base: Params) -> Params:
        """All of it: the target stays as it is."""
        return base

    def init(self, key: Array, base: Params) -> Params:
        """A fresh drafter in float32, whatever the target's dtype: small updates must not round away."""
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), self.heads.init(self.model, base, key))

    def drafter_params(self, trainable: Params, frozen: Params) -> Params:
        """All parameters of the drafter, as a drafter directory has them."""
        return trainable

    def known(self, frozen: Params) -> Int[Array, "W"] | None:
        """Tokens that the guesses' logits are of; None means all, in order."""
        return None

    def loss(self, trainable: Params, frozen: Params, batch: Batch, key: Array, progress: Array | float):
        """One term per depth: (sums, weights); metrics hold each depth's mean before its decay."""
        target, guesses = self.teacher_forced(trainable, frozen, batch, key)
        terms = self._terms(guesses, target, frozen, batch)
        totals, weights = (jnp.stack(values) for values in zip(*terms, strict=True))
        decay = self._config.weights.decay ** jnp.arange(len(terms), dtype=totals.dtype)
        return (decay * totals, weights), {f"loss_{i + 1}": term for i, term in enumerate(terms)}

    def renew(
        self, trainable: Params, frozen: Params | None, batch: Batch, step: Array, progress: Array, key: Array
    ) -> Params:
        """Nothing: gradients do it all."""
        return trainable

    def evaluate(self, trainable: Params, frozen: Params, batch: Batch) -> Sums:
        """By depth: the loss; how often the first choice is the text's token (accuracy); how often it is the target's
        first choice there (agreement), which is what greedy verification would accept on this text."""
        target, guesses = self.teacher_forced(trainable, frozen, batch, None)
        preferred_BT, known_W = argmax(target.logits), self.known(frozen)
        sums: Sums = {f"loss_{i + 1}": term for i, term in enumerate(self._terms(guesses, target, frozen, batch))}
        for i, guess in enumerate(guesses):
            labels_BT, weight_BT = self._labels(i, batch)
            choice_BT = argmax(guess.logits)
            choice_BT = choice_BT if known_W is None else known_W[choice_BT]
            weight = jnp.sum(weight_BT)
            sums[f"accuracy_{i + 1}"] = (jnp.sum((choice_BT == labels_BT) * weight_BT), weight)
            sums[f"agreement_{i + 1}"] = (jnp.sum((choice_BT == ahead(preferred_BT, i + 1)) * weight_BT), weight)
        return sums

    def report(self, means: dict[str, float]) -> dict[str, float]:
        """The means, in the order of depth."""
        measures = ("loss", "accuracy", "agreement")
        return {f"{name}_{i + 1}": means[f"{name}_{i + 1}"] for name in measures for i in range(self.depth)}

    def probe(self, trainable: Params, frozen: Params, batches: Iterator[Batch]) -> dict[str, float]:
        """Share of decoding steps that accept depth d: in the loop, and by the training-time forward on its text.

        The loop decodes the beginnings of held-out rows greedily, with the rank-0 chain as its tree. The two shares
        must be equal (`decoding/replay.py`); a difference means that drafters are not served as they are trained. Empty
        when nothing is to be decoded, or the target has no room for it, or there are several processes.
        """
        if jax.process_count() > 1:
            return {}
        batch = next(batches)
        size = max(batch["tokens"].shape[1] // 4, 1)
        tokens_BT, segments_BT = (np.asarray(batch[name])[:, :size] for name in ("tokens", "segments"))
        prompts = tokens_BT[(segments_BT > 0).all(axis=1)][: self._config.loop_prompts].tolist()
        new_tokens = min(self._config.loop_tokens, self.model.max_position - size)
        if not prompts or new_tokens <= 0:
            return {}
        params = self.drafter_params(self._cast(trainable), frozen)
        target = Target(self.model, frozen, self._tokenizer)
        drafter = self.drafter.with_tree(chain(self.depth))
        decoded = generate(target, prompts, drafter=drafter, drafter_params=params, max_new_tokens=new_tokens)
        replayed = replay_acceptance(target, drafter, params, prompts, decoded)
        stats = sum(decoded.stats[1:], decoded.stats[0])
        shares = {"loop": stats.accepted_by_depth, "replay": replayed.sum(axis=0)}
        return {
            f"{name}_{i + 1}": float(hits[i]) / max(stats.steps, 1)
            for name, hits in shares.items()
            for i in range(self.depth)
        }

    def export(self, directory: Path, trainable: Params, frozen: Params) -> None:
        """Writes a drafter directory that names the base that `load_base` read."""
        params = self.drafter_params(trainable, frozen)
        save_drafter(directory, self.drafter, params, self._fingerprint, overwrite=True)

    def teacher_forced(
        self, trainable: Params, frozen: Params, batch: Batch, key: Array | None
    ) -> tuple[Output, list[Guess]]:
        """The target on the text, and the drafter at every position.

        Args:
          trainable: the drafter.
          frozen: the target.
          batch: `tokens` and `segments`, int [B, T].
          key: for noise and dropout; None is without either.
        """
        tokens_BT = batch["tokens"]
        layout = Layout.causal(tokens_BT.shape[0], tokens_BT.shape[1], batch["segments"])
        target = transformer.forward(self.model, frozen, tokens_BT, layout, taps=self.drafter.taps)
        return target, self.guesses(self._cast(trainable), frozen, batch, target, layout, key)

    def _cast(self, trainable):
        return jax.tree.map(lambda leaf: leaf.astype(self._dtype), trainable)

    def _labels(self, i, batch):
        return labels_at({**batch, "mask": label_mask(batch, self._config.labels)}, i + 2)

    def _terms(self, guesses, target, frozen, batch):
        """(sum, weight) of the loss at each depth over the labels of the batch."""
        known_W = self.known(frozen)
        logits_BTW = target.logits if known_W is None else target.logits[..., known_W]
        teacher_BTW = jax.nn.softmax(logits_BTW, axis=-1)
        learnt_BT = jnp.ones(batch["tokens"].shape, bool)
        if known_W is not None:
            learnt_BT = jnp.zeros(target.logits.shape[-1], bool).at[known_W].set(True)[argmax(target.logits)]
        return [self._term(i, guess, target, teacher_BTW, learnt_BT, batch) for i, guess in enumerate(guesses)]

    def _term(self, i, guess, target, teacher_BTW, learnt_BT, batch):
        weights = self._config.weights
        labels_BT, weight_BT = self._labels(i, batch)
        loss_BT = jnp.zeros(labels_BT.shape, guess.logits.dtype)
        if weights.hard:
            loss_BT -= weights.hard * log_likelihood(guess.logits, labels_BT)
        if weights.soft:
            expected_BT = jnp.sum(ahead(teacher_BTW, i + 1) * guess.logits, axis=-1)
            loss_BT += weights.soft * (jax.nn.logsumexp(guess.logits, axis=-1) - expected_BT)
        if weights.feature:
            distance_BTH = optax.huber_loss(guess.hidden, ahead(target.hidden, i + 1))
            loss_BT += weights.feature * jnp.mean(distance_BTH, axis=-1)
        weight_BT = (weight_BT & ahead(learnt_BT, i + 1)).astype(loss_BT.dtype)
        return jnp.sum(loss_BT * weight_BT), jnp.sum(weight_BT)


def check_drafting(config: Any) -> None:
    """Rules that the configs share. Raises UserError."""
    schema.require(
        config.target is not None, "objective.target must be the directory of the target to draft for", config.target
    )
    for name in ("loop_prompts", "loop_tokens"):
        schema.require(getattr(config, name) >= 0, f"objective.{name} must not be negative", getattr(config, name))
