"""DFlash and JetSpec on a frozen target: one network, whose blocks are bidirectional or causal, and losses to choose.

Released DFlash networks learn the text's tokens, slots weighted by exp(-k/7) or by D-PACE; JetSpec's learn the target's
distribution by forward KL, all slots alike (`configs/jetspec.py`). With DFlash2's selector each slot also has the
cross-entropy of its label among the candidates, given the true token before it; slots whose label is not among them
have none, and nothing of it reaches the network below.
"""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from decoding.drafters.dflash import DFlash
from decoding.policies import Static
from decoding.sampling import argmax, best_logits
from decoding.trees import chain
from models import schema
from models.config import TransformerConfig
from models.heads import vocabulary
from models.heads.dflash import Selector
from train.objectives.blocks import BlockConfig, BlockObjective


@dataclasses.dataclass(frozen=True, kw_only=True)
class DFlashConfig(BlockConfig):
    """The section `objective` of a DFlash job; the rest is `BlockConfig`'s.

    Attributes:
      name: `dflash`.
      causal: rows of a block see none behind them (JetSpec).
      convolution: DFlash2's.
      candidates: tokens of a slot among which DFlash2's selector chooses; 0 is without.
      rank: of the selector's codebooks.
      temperature: of both distributions in `forward_kl`.
      hybrid_of: whether `hybrid` is blended by every `slot`'s acceptance or by the `batch`'s mean.
      selecting: weight of the selector's loss.
    """

    name: Literal["dflash"]
    causal: bool = False
    convolution: bool = False
    candidates: int = 0
    rank: int = 256
    temperature: float = 1.0
    hybrid_of: Literal["slot", "batch"] = "slot"
    selecting: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        schema.require(self.candidates >= 0, "objective.candidates must not be negative", self.candidates)
        schema.require(self.selecting >= 0, "objective.selecting must not be negative", self.selecting)
        if not self.candidates:
            schema.require_defaults(self, "rank", "selecting", why="is for a selector (objective.candidates)")

    def untrained(self, model: TransformerConfig) -> DFlash:
        """The drafter without parameters."""
        selector = Selector(self.rank, self.candidates) if self.candidates else None
        heads = self.network(model, causal=self.causal, convolution=self.convolution, selector=selector)
        return DFlash(heads, Static(chain(heads.depth), "top"))


class DFlashObjective(BlockObjective):
    """The `dflash` objective."""

    Config: ClassVar[type] = DFlashConfig

    def head_params(self, params):
        """The network's, and the selector."""
        return super().head_params(params) | ({"selector": params["selector"]} if self.heads.selector else {})

    def choices(self, read, frozen, logits, hidden, before):
        """The selector's, where there is one."""
        if not self.heads.selector:
            return super().choices(read, frozen, logits, hidden, before)
        scores, tokens = self._selected(read, frozen, logits, hidden, before)
        return jnp.take_along_axis(tokens, argmax(scores)[..., None], axis=-1)[..., 0]

    def more_loss(self, read, frozen, hidden, logits, log_p, slots, progress):
        """The selector's cross-entropy."""
        if not self.heads.selector:
            return 0.0
        logits, hidden = jax.lax.stop_gradient((logits, hidden))
        scores, tokens = self._selected(read, frozen, logits, hidden, slots.before)
        label = tokens == slots.labels[..., None]
        of_label = jnp.sum(jnp.where(label, jax.nn.log_softmax(scores, axis=-1), 0), axis=-1)
        return -self._config.selecting * of_label

    def _selected(self, read, frozen, logits, hidden, before):
        """Scores of the candidates of every slot, and these."""
        assert self.heads.selector is not None
        best, outputs = best_logits(logits, self.heads.selector.candidates)
        tokens = vocabulary.tokens_of(self.known(frozen), outputs)
        return self.heads.scores_after(read, best, tokens, hidden, before[..., None])[..., 0, :], tokens
