"""Draft heads on a frozen target: Medusa-1 (Cai et al. 2024), Hydra and Hydra++ (Ankner et al. 2024).

Head i at position p reads the target's feature at p and, in Hydra, the embeddings of the true tokens x_{p+1} ..
x_{p+1+i}; it is guess i of the loss in `drafting.py`. Medusa-1 and Hydra are hard = 1; Hydra++ is soft = 1.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from decoding.drafters.head_drafter import HeadDrafter
from decoding.drafters.registry import DRAFTERS
from decoding.trees import MC_SIM_7B_63
from models import schema, transformer
from models.config import TransformerConfig
from models.errors import UserError
from train.objectives.drafting import DraftObjective
from train.objectives.guess import Compared, Guess, Weights, divergence_of
from train.objectives.shift import ahead


@dataclasses.dataclass(frozen=True)
class DraftHeadsConfig:
    """The section `objective` of a draft-head job.

    Attributes:
      name: `draft_heads`.
      target: directory of the target, which stays as it is.
      drafter: which heads: the name of a drafter made of them.
      heads: their hyper-parameters: the fields of their shape, such as `MedusaHeads`.
      hard: weight of the cross-entropy with the text.
      soft: weight of the cross-entropy with the target's distribution.
      feature: weight of the smooth L1 distance to the target's feature.
      divergence: what `soft` weighs: the `cross_entropy`, or one of `divergences.py` with its default numbers.
      head_decay: rho; 1 weighs all heads alike, Medusa's later recipe has 0.8.
      d_pace: D-PACE's weights in its place, for `hard` alone: how much a draft's expected length gains by each head
        (arXiv 2605.18810).
      labels: which tokens are learnt: `assistant`, those that the data set marks, or `all`.
      noise: alpha of the uniform noise on embeddings and, but for Hydra++, features, alpha / sqrt(length * H)
        (NEFTune, Jain et al. 2023); 0 is none.
      loop_prompts: prompts from the valid split that every evaluation decodes with the heads, at most a batch; 0 is
        none.
      loop_tokens: new tokens per such prompt; 0 decodes nothing.
    """

    reads: ClassVar[str] = "text"

    name: Literal["draft_heads"]
    target: str | None
    drafter: str
    heads: Mapping[str, Any]
    hard: float = 1.0
    soft: float = 0.0
    feature: float = 0.0
    divergence: Compared = "cross_entropy"
    head_decay: float = 1.0
    d_pace: bool = False
    labels: Literal["assistant", "all"] = "assistant"
    noise: float = 0.0
    loop_prompts: int = 4
    loop_tokens: int = 64

    def __post_init__(self):
        if self.target is None:
            raise UserError("objective.target must be the directory of the target that the heads are for")
        for name in ("hard", "soft", "feature", "noise", "loop_prompts", "loop_tokens"):
            schema.require(getattr(self, name) >= 0, f"objective.{name} must not be negative", getattr(self, name))
        if not self.hard + self.soft + self.feature:
            raise UserError("objective.hard, objective.soft and objective.feature are all 0: there is nothing to learn")
        schema.require(0 < self.head_decay <= 1, "objective.head_decay must lie in 0..1, 0 excluded", self.head_decay)
        if self.d_pace:
            others = [name for name in ("soft", "feature") if getattr(self, name)]
            schema.require(not others and self.hard > 0, "objective.d_pace weighs objective.hard alone", others)
            schema.require(
                self.head_decay == 1, "objective.d_pace takes the place of objective.head_decay", self.head_decay
            )
        self.untrained()

    @property
    def weights(self) -> Weights:
        """Of the loss's terms."""
        divergence = divergence_of(self.divergence)
        return Weights(self.hard, self.soft, self.feature, self.head_decay, divergence=divergence, d_pace=self.d_pace)

    @property
    def base(self) -> str:
        """The target that the heads are for."""
        return str(self.target)

    def untrained(self, model: TransformerConfig | None = None) -> HeadDrafter:
        """The drafter without parameters, its tree the published one as far down as there are heads."""
        kinds = {name: kind for name, kind in DRAFTERS.items() if issubclass(kind, HeadDrafter)}
        if self.drafter not in kinds:
            meant = schema.nearest(self.drafter, kinds)
            raise UserError(f"objective.drafter must be one of {', '.join(kinds)}, got {self.drafter!r}{meant}")
        drafter: Any = kinds[self.drafter]
        heads = schema.parse(type(drafter().heads), self.heads, "objective.heads")
        return drafter(heads, MC_SIM_7B_63.down_to(heads.num_heads))


class DraftHeads(DraftObjective):
    """The `draft_heads` objective."""

    Config: ClassVar[type] = DraftHeadsConfig

    def __init__(self, config, tokenizer):
        """As `DraftObjective`."""
        super().__init__(config, tokenizer)
        self.heads = self.drafter.heads

    @property
    def depth(self) -> int:
        """One guess per head."""
        return self.heads.num_heads

    def guesses(self, params, frozen, batch, target, layout, key):
        """Every head at every position."""
        tokens_BT = batch["tokens"]
        feature_BTH, embedding_BTH = target.hidden, transformer.lookup(frozen, tokens_BT)
        if key is not None and self._config.noise:
            key, noise_key = jax.random.split(key)
            size = self._config.noise / (tokens_BT.shape[1] * self.model.width) ** 0.5
            noise_BTH = size * jax.random.uniform(noise_key, feature_BTH.shape, feature_BTH.dtype, -1.0, 1.0)
            embedding_BTH = embedding_BTH + noise_BTH
            if not self.heads.prefix:
                feature_BTH = feature_BTH + noise_BTH
        feature_BTH = self.heads.features(self.model, params, feature_BTH, layout)
        outputs = []
        for i in range(self.heads.num_heads):
            path_BTPH = jnp.stack([ahead(embedding_BTH, step) for step in range(1, i + 2)], axis=2)
            dropout_key = None if key is None else jax.random.fold_in(key, i)
            hidden_BTH = self.heads.hidden(params, i, feature_BTH, path_BTPH, dropout_key)
            read = Partial(functools.partial(_read, self.heads, i), params["heads"][i]["vocab"])
            outputs.append(Guess(hidden_BTH, None, self.labels(batch, i), read))
        return outputs


def _read(heads, i, vocab, hidden):
    """The logits of head i, of its vocabulary map alone."""
    return heads.vocab({"heads": {i: {"vocab": vocab}}}, i, hidden)
