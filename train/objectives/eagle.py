"""EAGLE on a frozen target: `eagle` trains EAGLE-1's network (and EAGLE-2's: it is the same), `eagle3` EAGLE-3's.

Both are the loss of `drafting.py`. EAGLE-1 (Li et al. 2024a, section 3.2) learns one step from the target's own
features, to which noise is added: smooth L1 distance to the next feature, and a tenth of the cross-entropy with the
target's distribution through the target's head. EAGLE-3 (Li et al. 2025, section 3.2) drops the first and unrolls the
draft during training, each step reading what the one before it wrote; step k counts 0.8^k.

EAGLE-3 has a draft vocabulary (`draft_vocabulary.py`).
"""

import dataclasses
import functools
from typing import ClassVar, Literal

import jax
from jax.tree_util import Partial

from decoding.drafters.eagle import Eagle, Eagle3
from models import schema, transformer
from models.config import TransformerConfig
from models.heads.eagle import EAGLE_31, Eagle3Heads, EagleHeads, eagle3_layers, unroll
from train.objectives.draft_vocabulary import WithDraftVocabulary
from train.objectives.drafting import DraftObjective, check_drafting
from train.objectives.guess import Compared, Guess, Weights, divergence_of
from train.objectives.shift import ahead


@dataclasses.dataclass(frozen=True)
class EagleConfig:
    """The section `objective` of an EAGLE-1 job.

    Attributes:
      name: `eagle`.
      target: directory of the target, which stays as it is.
      bias: whether fc has a bias.
      feature: weight of the smooth L1 distance to the target's next feature.
      soft: weight of the cross-entropy with the target's distribution.
      divergence: what `soft` weighs: the `cross_entropy`, or one of `divergences.py` with its default numbers.
      labels: which tokens are learnt: `assistant`, those that the data set marks, or `all`.
      noise: alpha of the uniform noise on features, alpha * 512 / length * U(-1/2, 1/2); 0 is none.
      depth: how many draft tokens evaluations look ahead.
      loop_prompts: prompts from the valid split that every evaluation decodes, at most a batch; 0 is none.
      loop_tokens: new tokens per such prompt; 0 decodes nothing.
    """

    reads: ClassVar[str] = "text"

    name: Literal["eagle"]
    target: str | None
    bias: bool = True
    feature: float = 1.0
    soft: float = 0.1
    divergence: Compared = "cross_entropy"
    labels: Literal["assistant", "all"] = "assistant"
    noise: float = 0.2
    depth: int = 5
    loop_prompts: int = 4
    loop_tokens: int = 64

    def __post_init__(self):
        check_drafting(self)
        for name in ("feature", "soft", "noise"):
            schema.require(getattr(self, name) >= 0, f"objective.{name} must not be negative", getattr(self, name))
        schema.require(self.feature + self.soft > 0, "objective.feature or objective.soft must be positive", 0)
        schema.require(self.depth >= 1, "objective.depth must be at least 1", self.depth)

    @property
    def weights(self) -> Weights:
        """Of the loss's terms."""
        return Weights(0.0, self.soft, self.feature, 1.0, divergence=divergence_of(self.divergence))

    @property
    def base(self) -> str:
        """The target."""
        return str(self.target)

    def untrained(self, model: TransformerConfig) -> Eagle:
        """The drafter without parameters."""
        return Eagle(EagleHeads(self.bias))


@dataclasses.dataclass(frozen=True)
class Eagle3Config:
    """The section `objective` of an EAGLE-3 job.

    Attributes:
      name: `eagle3`.
      target: directory of the target, which stays as it is.
      layers: the three layers whose incoming residual stream is read, low to high; None chooses by the target's depth.
      vocabulary: W, size of the draft vocabulary: the most frequent labels of the training split; 0 is all tokens.
      steps: how far training unrolls the draft.
      decay: weight of a step relative to the step before it.
      divergence: what is learnt of the target's distribution: its `cross_entropy`, or one of `divergences.py` with its
        default numbers.
      fc_norm, norm_before_fc, norm_before_residual, norm_output: EAGLE-3.1's norms, as in `Eagle3Heads`.
      labels: which tokens are learnt: `assistant`, those that the data set marks, or `all`.
      loop_prompts: prompts from the valid split that every evaluation decodes, at most a batch; 0 is none.
      loop_tokens: new tokens per such prompt; 0 decodes nothing.
    """

    reads: ClassVar[str] = "text"

    name: Literal["eagle3"]
    target: str | None
    layers: tuple[int, ...] | None = None
    vocabulary: int = 0
    steps: int = 7
    decay: float = 0.8
    divergence: Compared = "cross_entropy"
    fc_norm: bool = False
    norm_before_fc: bool = False
    norm_before_residual: bool = False
    norm_output: bool = False
    labels: Literal["assistant", "all"] = "assistant"
    loop_prompts: int = 4
    loop_tokens: int = 64

    def __post_init__(self):
        check_drafting(self)
        if self.layers is not None:
            schema.require(len(self.layers) == 3, "objective.layers must name three layers", self.layers)
        schema.require(self.vocabulary >= 0, "objective.vocabulary must not be negative", self.vocabulary)
        schema.require(self.steps >= 1, "objective.steps must be at least 1", self.steps)
        schema.require(0 < self.decay <= 1, "objective.decay must lie in 0..1, 0 excluded", self.decay)
        both = self.fc_norm and self.norm_before_fc
        schema.require(not both, "objective must have only one of fc_norm and norm_before_fc", "both")

    @property
    def weights(self) -> Weights:
        """Of the loss's terms."""
        return Weights(0.0, 1.0, 0.0, self.decay, divergence=divergence_of(self.divergence))

    @property
    def base(self) -> str:
        """The target."""
        return str(self.target)

    def untrained(self, model: TransformerConfig) -> Eagle3:
        """The drafter without parameters."""
        low, middle, high = self.layers or eagle3_layers(model.num_layers)
        size = 0 if self.vocabulary == model.vocab_size else self.vocabulary
        norms = {name: getattr(self, name) for name in EAGLE_31}
        return Eagle3(Eagle3Heads(low, middle, high, size, **norms))


class EagleObjective(DraftObjective):
    """The `eagle` objective."""

    Config: ClassVar[type] = EagleConfig
    recomputes = True

    def __init__(self, config, tokenizer):
        """As `DraftObjective`."""
        super().__init__(config, tokenizer)
        self.heads = self.drafter.heads

    @property
    def depth(self) -> int:
        """As the config says."""
        return self._config.depth

    def guesses(self, params, frozen, batch, target, layout, key):
        """One step with noise in training; in evaluation, `depth` steps without."""
        taps = target.taps
        if key is not None and self._config.noise:
            size = self._config.noise * 512 / batch["tokens"].shape[1]

            def noisy(feature):
                return feature + size * jax.random.uniform(key, feature.shape, feature.dtype, -0.5, 0.5)

            taps = {name: noisy(feature) for name, feature in taps.items()}
        return self._unrolled(params, frozen, batch, taps, layout, self.depth if key is None else 1)

    def _unrolled(self, params, frozen, batch, taps, layout, steps):
        embedding_BTH = transformer.lookup(frozen, batch["tokens"])
        embeddings = [ahead(embedding_BTH, 1 + k) for k in range(steps)]
        remat = self.compute.remat != "none"
        feature_BTH = self.heads.fuse(self.model, params, taps)
        outputs = unroll(self.heads, self.model, params, feature_BTH, embeddings, layout, remat)
        read = self.read(params, frozen)
        return [Guess(hidden, None, self.labels(batch, k), read) for k, hidden in enumerate(outputs)]

    def read(self, params, frozen) -> Partial:
        """The vocabulary map of guesses."""
        return Partial(functools.partial(_read, self.heads, self.model, frozen), self.heads.head_params(params))


class Eagle3Objective(WithDraftVocabulary, EagleObjective):
    """The `eagle3` objective."""

    Config: ClassVar[type] = Eagle3Config

    @property
    def depth(self) -> int:
        """As many steps as training unrolls."""
        return self._config.steps

    def guesses(self, params, frozen, batch, target, layout, key):
        """Every step of the draft, in training as in evaluation."""
        return self._unrolled(params, frozen, batch, target.taps, layout, self.depth)


def _read(heads, model, frozen, params, hidden):
    """The network's scores; of its parameters those that make them come last, because they are trained."""
    return heads.logits(model, params, frozen, hidden)
