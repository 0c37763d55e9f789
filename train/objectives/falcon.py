"""Falcon on a frozen target: coupled sequential glancing distillation (Gao et al. 2024, section 3.2).

Pair p, a feature h_p with the token x_{p+1}, answers for x_{p+k+1}; its teacher is the target k places on. A step reads
the text twice. The first time, without gradients, tells how many pairs of a text guess another token than the target
would, d. Then n = floor(lambda d) pairs, or runs of them inside their blocks, get the answers of the pairs k places on
in the place of their own inputs, feature and token together, and the loss is taken of the second reading:

    z~_p = (h_{p+k}, x_{p+k+1}) where p was chosen, (h_p + noise, x_{p+1}) elsewhere
    loss = feature * SmoothL1(g, h_{p+k}) + soft * -sum_v t(v) log q_T(v) + hard * -log q(one sample of t)

lambda falls with the share s of the run that is done: 0.1 + 0.35 (1 - s) in the published program, 0.4 (1 - s) in the
paper. So a network that knows nothing yet is shown much, and at last sees what it will see in decoding.

Blocks begin anywhere in a text, drawn for every text anew: decoding lines them up with where the text ends.
"""

import dataclasses
import functools
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int

from decoding.drafters.falcon import Falcon
from decoding.sampling import argmax
from models import schema, transformer
from models.config import TransformerConfig
from models.heads import vocabulary
from models.heads.falcon import FalconHeads, guesses_everywhere
from models.layout import BlockCausal
from train.objectives.draft_vocabulary import WithDraftVocabulary
from train.objectives.drafting import DraftObjective, check_drafting
from train.objectives.guess import Compared, Guess, Labels, Weights, divergence_of, first_choices, losses
from train.objectives.pieces import mapped, pieces_of
from train.objectives.shift import ahead, behind
from train.objectives.target_features import LOGITS, layout_of


@dataclasses.dataclass(frozen=True)
class FalconConfig:
    """The section `objective` of a Falcon job.

    Attributes:
      name: `falcon`.
      target: directory of the target, which stays as it is.
      block: k, tokens guessed per pass.
      layers: Llama layers behind the LSTM.
      lstm_mode: whether the LSTM begins every pair from zeros, as published (`per_position`), or goes on (`recurrent`).
      dropout: rate between the LSTM's layers; 0.1 as published.
      vocabulary: W, size of the draft vocabulary: the most frequent labels of the training split; 0 is all tokens.
      feature: weight of the smooth L1 distance to the target's feature.
      soft: weight of the cross-entropy with the target's distribution.
      hard: weight of the cross-entropy with one token drawn from it.
      temperature: of the guess in the soft term, where that is a cross-entropy.
      divergence: what `soft` weighs: the `cross_entropy`, or one of `divergences.py` with its default numbers.
      glancing: how many answers are shown: by the schedule of the published program (`code`) or of the `paper`, or none
        (`off`), which reads the text once.
      labels: which tokens are learnt: `assistant`, those that the data set marks, or `all`.
      noise: alpha of the uniform noise on features, alpha * 512 / length * U(-1/2, 1/2); 0 is none.
      depth: how many draft tokens evaluations look ahead; at least a block.
      loop_prompts: prompts from the valid split that every evaluation decodes, at most a batch; 0 is none.
      loop_tokens: new tokens per such prompt; 0 decodes nothing.
    """

    reads: ClassVar[str] = "text"

    name: Literal["falcon"]
    target: str | None
    block: int = 2
    layers: int = 1
    lstm_mode: Literal["per_position", "recurrent"] = "per_position"
    dropout: float = 0.0
    vocabulary: int = 0
    feature: float = 1.0
    soft: float = 0.09
    hard: float = 0.01
    temperature: float = 0.95
    divergence: Compared = "cross_entropy"
    glancing: Literal["code", "paper", "off"] = "code"
    labels: Literal["assistant", "all"] = "assistant"
    noise: float = 0.2
    depth: int = 6
    loop_prompts: int = 4
    loop_tokens: int = 64

    def __post_init__(self):
        check_drafting(self)
        for name in ("feature", "soft", "hard", "noise"):
            schema.require(getattr(self, name) >= 0, f"objective.{name} must not be negative", getattr(self, name))
        learnt = self.feature + self.soft + self.hard
        schema.require(learnt > 0, "objective.feature, objective.soft or objective.hard must be positive", learnt)
        schema.require(self.vocabulary >= 0, "objective.vocabulary must not be negative", self.vocabulary)
        schema.require(self.temperature > 0, "objective.temperature must be positive", self.temperature)
        schema.require(
            self.divergence == "cross_entropy" or self.temperature == 1,
            f"objective.divergence {self.divergence} needs an objective.temperature of 1",
            self.temperature,
        )
        if not self.soft:
            schema.require_defaults(self, "temperature", "divergence", why="is for the soft term (objective.soft)")
        schema.require(self.depth >= self.block, "objective.depth must be at least objective.block", self.depth)
        self.heads  # noqa: B018 - which refuses sizes that no network has

    @property
    def heads(self) -> FalconHeads:
        """Shape of the network."""
        return FalconHeads(self.block, self.layers, self.lstm_mode, self.dropout)

    @property
    def weights(self) -> Weights:
        """Of the loss's terms."""
        return Weights(self.hard, self.soft, self.feature, 1.0, self.temperature, divergence_of(self.divergence))

    @property
    def base(self) -> str:
        """The target."""
        return str(self.target)

    def untrained(self, model: TransformerConfig) -> Falcon:
        """The drafter without parameters."""
        size = 0 if self.vocabulary == model.vocab_size else self.vocabulary
        return Falcon(dataclasses.replace(self.heads, vocab_size=size))


class FalconObjective(WithDraftVocabulary, DraftObjective):
    """The `falcon` objective."""

    Config: ClassVar[type] = FalconConfig

    def __init__(self, config, tokenizer):
        """As `DraftObjective`."""
        super().__init__(config, tokenizer)
        self.heads = self.drafter.heads

    @property
    def depth(self) -> int:
        """As the config says."""
        return self._config.depth

    @property
    def target_taps(self) -> tuple[str, ...]:  # type: ignore[override]
        """Also the target's distribution, where it is asked what it would have chosen."""
        asks = self._config.hard > 0 or self._config.glancing != "off"
        return tuple(dict.fromkeys((*super().target_taps, *((LOGITS,) * asks))))

    def loss_on(self, target, trainable, frozen, batch, key, progress):
        """One term; metrics hold its mean, and the shares of pairs that guessed wrong and that were shown answers."""
        params, k = self.compute.cast(trainable), self.heads.block
        noise_key, phase_key, draw_key, glance_key, *drop_keys = jax.random.split(key, 6)
        counted_BT = self.labels(batch, k - 1).counted
        clean_BTH, embedding_BTH = target.hidden, transformer.lookup(frozen, ahead(batch["tokens"], 1))
        feature_BTH = clean_BTH + self._noise(noise_key, clean_BTH)
        phase_B = jax.random.randint(phase_key, (counted_BT.shape[0],), 0, k, jnp.int32)
        layout = dataclasses.replace(layout_of(batch, self.compute.attention), order=BlockCausal(k, phase_B))
        whole = functools.partial(self.heads.whole, self.model, params, layout=layout)
        choice_BT, drawn_BT = self._asked(draw_key, target)
        told = {}
        if self._config.glancing != "off":
            first_BTH = jax.lax.stop_gradient(whole(feature_BTH, embedding_BTH, dropout_key=drop_keys[0]))
            outputs_BT = first_choices(self._read(params, frozen), first_BTH, self.compute.devices)
            guessed_BT = vocabulary.tokens_of(self.known(frozen), outputs_BT)
            wrong_BT = counted_BT & (guessed_BT != ahead(choice_BT, k))
            number_B = jnp.floor(glancing_share(self._config.glancing, progress) * jnp.sum(wrong_BT, axis=1))
            shown_BT = shown_pairs(glance_key, counted_BT, phase_B, number_B.astype(jnp.int32), k)
            feature_BTH = jnp.where(shown_BT[:, :, None], ahead(clean_BTH, k), feature_BTH)
            embedding_BTH = jnp.where(shown_BT[:, :, None], ahead(embedding_BTH, k), embedding_BTH)
            told = {name: _share(x, counted_BT) for name, x in (("wrong", wrong_BT), ("shown", shown_BT))}
        hidden_BTH = whole(feature_BTH, embedding_BTH, dropout_key=drop_keys[1])
        # The guess of pair p is the first one of position p + k - 1, which has the same label and the same teacher.
        labels = Labels(ahead(drawn_BT, 1), behind(counted_BT, k - 1))
        guess = Guess(behind(hidden_BTH, k - 1), None, labels, self._read(params, frozen))
        teacher = self.teacher(target, frozen, asked=False)
        totals, weights = losses([guess], teacher, self._config.weights, self.compute.devices)
        return (totals, weights), {"loss_1": (totals[0], weights[0]), **told}

    def guesses(self, params, frozen, batch, target, layout, key):
        """What is drafted from every position, `depth` tokens deep, in as many passes as that takes."""
        embedding_BTH = transformer.lookup(frozen, batch["tokens"])
        embeddings = [ahead(embedding_BTH, 1 + i) for i in range(self.depth)]
        hiddens = guesses_everywhere(self.heads, self.model, params, target.hidden, embeddings, layout, self.depth)
        # A draft whose first block reaches back over the beginning of a document guesses with what is not there.
        within_BT = behind(batch["segments"], self.heads.block - 1) == batch["segments"]
        labels = [self.labels(batch, i) for i in range(self.depth)]
        labels = [label._replace(counted=label.counted & within_BT) for label in labels]
        read = self._read(params, frozen)
        return [Guess(h, None, label, read) for h, label in zip(hiddens, labels, strict=True)]

    def _noise(self, key, feature):
        size = self._config.noise * 512 / feature.shape[1]
        return size * jax.random.uniform(key, feature.shape, feature.dtype, -0.5, 0.5) if size else 0

    def _read(self, params, frozen) -> Partial:
        return Partial(functools.partial(_read, self.heads, self.model, frozen), self.heads.head_params(params))

    def _asked(self, key, target):
        """The target's first choice, and one token drawn from its distribution, at every position."""
        uniform_BT = jax.random.uniform(key, target.hidden.shape[:2], jnp.float32)

        def ask(rows):
            scored, uniform_BS = rows
            logits = target.read(scored)
            return jnp.stack([argmax(logits), drawn_tokens(logits, uniform_BS)], axis=-1)

        pieces = pieces_of([(target.read, target.scored)], self.compute.devices)
        return jnp.moveaxis(mapped(ask, (target.scored, uniform_BT), pieces), -1, 0)


def _read(heads, model, frozen, params, hidden):
    """The network's scores; of its parameters those that make them come last, because they are trained."""
    return heads.logits(model, params, frozen, hidden)


def _share(found: Bool[Array, "B T"], counted: Bool[Array, "B T"]) -> tuple[Array, Array]:
    return jnp.sum(found).astype(jnp.float32), jnp.sum(counted).astype(jnp.float32)


def drawn_tokens(logits: Float[Array, "B T V"], uniform: Float[Array, "B T"]) -> Int[Array, "B T"]:
    """One token from each distribution: the first whose cumulated probability exceeds a uniform number."""
    cumulated = jnp.cumsum(jax.nn.softmax(logits, axis=-1), axis=-1)
    below = cumulated[..., :-1] <= uniform[..., None].astype(logits.dtype) * cumulated[..., -1:]
    return jnp.sum(below, axis=-1, dtype=jnp.int32)


def glancing_share(schedule: str, progress: Array | float) -> Float[Array, ""]:
    """lambda, the share of a text's mistakes that decides how many answers are shown.

    Args:
      schedule: `code` or `paper`.
      progress: the share of the run that is done.
    """
    start, end = {"code": (0.45, 0.1), "paper": (0.4, 0.0)}[schedule]
    return end + (start - end) * (1 - jnp.asarray(progress, jnp.float32))


def shown_pairs(
    key: Array, counted: Bool[Array, "B T"], phase: Int[Array, "B"], number: Int[Array, "B"], k: int
) -> Bool[Array, "B T"]:
    """Pairs that are given the answer for their own.

    With k = 2 it is `number` pairs that begin a block. With more it is number // k runs, each of which begins with its
    block, of 1 to k - 1 pairs, so that no block is shown as a whole; the last block is left out, as published.

    Args:
      key: for what is drawn.
      counted: pairs whose answers are learnt; no other is shown.
      phase: of the blocks (`models.layout.BlockCausal`).
      number: of the mistakes that count.
      k: pairs of a block.
    """
    batch, length = counted.shape
    place_T = jnp.arange(length, dtype=jnp.int32)
    starts_BT = counted & ((place_T + phase[:, None]) % k == 0)
    if k > 2:
        starts_BT &= place_T < jnp.max(jnp.where(starts_BT, place_T, -1), axis=1, keepdims=True)
        number = number // k
    draw_key, length_key = jax.random.split(key)
    drawn_BT = jnp.where(starts_BT, jax.random.uniform(draw_key, (batch, length)), 2.0)
    rank_BT = jnp.argsort(jnp.argsort(drawn_BT, axis=1), axis=1)
    chosen_BT = starts_BT & (rank_BT < number[:, None])
    more_BT = jax.random.randint(length_key, (batch, length), 0, max(k - 1, 1), jnp.int32)
    shown_BT = chosen_BT
    for i in range(1, k - 1):
        shown_BT |= behind(chosen_BT & (more_BT >= i), i)
    return shown_BT & counted
