"""P-EAGLE on a frozen target (arXiv 2602.01469, section 4): several tokens ahead are learnt in one pass over the text.

Depth 0 is computed at every position, deeper rows behind some: of the rows of a depth that have a label, a share `keep`
has another behind it, drawn at random, but `keep_least` of all at the deepest (COD sampling of the paper). A row of
depth d learns the target's distribution of the token d + 2 places after its anchor, by cross-entropy, and every row of
every depth weighs the same; a label in another document than its anchor is none. The draft vocabulary is EAGLE-3's.

The number of rows is fixed for each depth by the length of the text, and what a text lacks in labels is filled up with
rows that do not count. Evaluations look at every depth behind every position.
"""

import dataclasses
from typing import ClassVar, Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from decoding.drafters.p_eagle import PEagle
from decoding.policies import Static
from decoding.trees import chain
from models import schema
from models.config import TransformerConfig
from models.heads.eagle import eagle3_layers
from models.heads.p_eagle import PEagleHeads, Rollouts, every_rollout, sampled_rollouts
from train.objectives.drafting import check_drafting
from train.objectives.eagle import Eagle3Objective
from train.objectives.guess import Compared, Guess, Labels, Weights, divergence_of
from train.objectives.shift import ahead


@dataclasses.dataclass(frozen=True)
class PEagleConfig:
    """The section `objective` of a P-EAGLE job.

    Attributes:
      name: `p_eagle`.
      target: directory of the target, which stays as it is.
      layers: the three layers whose incoming residual stream is read, low to high; None chooses by the target's depth.
      vocabulary: W, size of the draft vocabulary: the most frequent labels of the training split; 0 is all tokens.
      num_layers: of the network.
      own_embedding: the network learns an embedding of its own, which begins as the target's.
      depth: K, tokens that are learnt ahead.
      keep: share of the rows of a depth that have another behind them.
      keep_least: share of the text that has a row at every depth.
      divergence: what is learnt of the target's distribution: its `cross_entropy`, or one of `divergences.py` with its
        default numbers.
      fc_norm, norm_before_fc, norm_before_residual: as in `Eagle3Heads`.
      labels: which tokens are learnt: `assistant`, those that the data set marks, or `all`.
      loop_prompts: prompts from the valid split that every evaluation decodes, at most a batch; 0 is none.
      loop_tokens: new tokens per such prompt; 0 decodes nothing.
    """

    reads: ClassVar[str] = "text"

    name: Literal["p_eagle"]
    target: str | None
    layers: tuple[int, ...] | None = None
    vocabulary: int = 0
    num_layers: int = 4
    own_embedding: bool = False
    depth: int = 8
    keep: float = 0.8
    keep_least: float = 0.2
    divergence: Compared = "cross_entropy"
    fc_norm: bool = False
    norm_before_fc: bool = False
    norm_before_residual: bool = False
    labels: Literal["assistant", "all"] = "assistant"
    loop_prompts: int = 4
    loop_tokens: int = 64

    def __post_init__(self):
        check_drafting(self)
        if self.layers is not None:
            schema.require(len(self.layers) == 3, "objective.layers must name three layers", self.layers)
        schema.require(self.vocabulary >= 0, "objective.vocabulary must not be negative", self.vocabulary)
        for name in ("num_layers", "depth"):
            schema.require(getattr(self, name) >= 1, f"objective.{name} must be at least 1", getattr(self, name))
        schema.require(0 < self.keep <= 1, "objective.keep must lie in 0..1, 0 excluded", self.keep)
        schema.require(0 <= self.keep_least <= 1, "objective.keep_least must lie in 0..1", self.keep_least)
        both = self.fc_norm and self.norm_before_fc
        schema.require(not both, "objective must have only one of fc_norm and norm_before_fc", "both")

    @property
    def weights(self) -> Weights:
        """Of the loss's terms."""
        return Weights(0.0, 1.0, 0.0, 1.0, divergence=divergence_of(self.divergence))

    @property
    def base(self) -> str:
        """The target."""
        return str(self.target)

    def untrained(self, model: TransformerConfig) -> PEagle:
        """The drafter without parameters."""
        low, middle, high = self.layers or eagle3_layers(model.num_layers)
        size = 0 if self.vocabulary == model.vocab_size else self.vocabulary
        shared = ("fc_norm", "norm_before_fc", "norm_before_residual", "num_layers", "own_embedding")
        heads = PEagleHeads(low, middle, high, size, **{name: getattr(self, name) for name in shared})
        return PEagle(heads, Static(chain(self.depth), "top"))

    def share(self, d: int) -> float:
        """Of the text that has a row of depth d."""
        return max(self.keep**d, self.keep_least)


class PEagleObjective(Eagle3Objective):
    """The `p_eagle` objective."""

    Config: ClassVar[type] = PEagleConfig

    @property
    def depth(self) -> int:
        """As many tokens as are learnt ahead."""
        return self._config.depth

    def loss_on(self, target, trainable, frozen, batch, key, progress):
        """One term, in which every row of every depth weighs the same; metrics hold each depth's mean."""
        (totals, weights), told = super().loss_on(target, trainable, frozen, batch, key, progress)
        return (jnp.sum(totals, keepdims=True), jnp.sum(weights, keepdims=True)), told

    def guesses(self, params, frozen, batch, target, layout, key):
        """Every depth, in training behind positions at random, in evaluation behind all."""
        heads, tokens = self.heads, batch["tokens"]
        remat = self.compute.remat != "none"
        embedding_BTH = heads.lookup(params, frozen, ahead(tokens, 1))
        feature_BTH = heads.fuse(self.model, params, target.taps)
        hidden, rows = heads.run_layers(self.model, params, feature_BTH, embedding_BTH, layout, remat=remat)
        read = self.read(params, frozen)
        found = [Guess(hidden, None, self.labels(batch, 0), read)]
        if self.depth == 1:
            return found
        rows_of_text = len(tokens), tokens.shape[1]
        rollouts = self.sampled(batch, key) if key is not None else every_rollout(*rows_of_text, self.depth - 1)
        deeper = heads.roll_out(self.model, params, rows, layout, rollouts, remat)
        for d, (hidden, at, there) in enumerate(zip(deeper, rollouts.anchors, rollouts.counted, strict=True), start=1):
            places = None if key is None else at
            labels = self.labels(batch, d, places)
            found.append(Guess(hidden, places, Labels(labels.tokens, labels.counted & there), read))
        return found

    def sampled(self, batch: dict[str, Array], key: Array) -> Rollouts:
        """Rollouts behind positions of a batch whose rows have labels, fewer at every depth."""
        length, shares = batch["tokens"].shape[1], [self._config.share(d) for d in range(1, self.depth)]
        counted: list[Bool[Array, "B T"]] = [self.labels(batch, d).counted for d in range(self.depth)]
        labels_B1: Int[Array, "B 1"] = jnp.sum(counted[0], axis=1, keepdims=True)
        # A share of 1 of a few thousand labels must not lose one to rounding.
        most_BE = jnp.floor((labels_B1 - jnp.arange(1, self.depth)) * jnp.array(shares) + 1e-3).astype(jnp.int32)
        sizes = [max(int(share * length), 1) for share in shares]
        return sampled_rollouts(key, counted[1:], sizes, most_BE)
