"""DSpark and Domino on a frozen target: a block's network and the serial head that tells slots what stands before them.

Both learn with the true tokens as predecessors. DSpark (`dspark`) brings the slots' distributions close to the
target's, 0.1 CE + 0.9 |q - p|, and its confidence head learns by cross-entropy how much of q survives verification,
sum min(p, q), which is taken as constant. Slot k counts exp(-k / 4), and only while all slots before it count. With a
draft vocabulary the first two compare q with p as renormalised over it, where it holds label and first choice; what
survives is of p as it is, and is learnt at every label.

Domino (`domino`) learns the text's tokens. U are a slot's logits by themselves and U' those with what the head adds:

    (1 - lambda) l(U') + lambda l(U),  lambda from 1 in a line to 0 once `decay` of the run is done

so that the network first learns to do without the head.
"""

import dataclasses
import functools
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from decoding.drafters.dspark import DSpark
from decoding.policies import Static
from decoding.trees import chain
from models import schema
from models.config import TransformerConfig
from models.heads.serial import SerialHead
from train.objectives import block_losses, divergences
from train.objectives.block_losses import Terms
from train.objectives.blocks import BlockConfig, BlockObjective


@dataclasses.dataclass(frozen=True, kw_only=True)
class DSparkConfig(BlockConfig):
    """The section `objective` of a DSpark job, where all rows of a block draft; the rest is `BlockConfig`'s.

    Attributes:
      name: `dspark`.
      head: the serial head: `vanilla`, `gated` or `rnn`.
      rank: of it.
      candidates: tokens of a slot, its best by itself, that drafts score after its predecessor; None is all. Training
        scores all.
      hybrid_of: whether `hybrid` is blended by every `slot`'s acceptance or by the `batch`'s mean.
      confident: weight of the confidence head's loss; 0 is without the head.
    """

    temperature: ClassVar[float] = 1.0

    name: Literal["dspark"]
    block: int = 7
    head: Literal["vanilla", "gated", "rnn"] = "vanilla"
    rank: int = 256
    candidates: int | None = None
    terms: Terms = dataclasses.field(default_factory=functools.partial(Terms, hard=0.1, l1=0.9))
    pace: float | None = 4.0
    hybrid_of: Literal["slot", "batch"] = "slot"
    confident: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        schema.require(self.rank >= 1, "objective.rank must be at least 1", self.rank)
        schema.require(self.confident >= 0, "objective.confident must not be negative", self.confident)
        schema.require(
            not self.confident or self.terms.soft,
            "objective.confident needs the target's distribution: one of objective.terms but hard must be positive, or "
            "objective.confident 0",
            dataclasses.asdict(self.terms),
        )

    def untrained(self, model: TransformerConfig) -> DSpark:
        """The drafter without parameters."""
        serial = SerialHead(self.head, self.rank, confidence="both" if self.confident else "none")
        return _chain(self, model, serial, shifted=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DominoConfig(BlockConfig):
    """The section `objective` of a Domino job; what is not named here is as in `DSparkConfig` and `BlockConfig`.

    Attributes:
      name: `domino`.
      shifted: every row of a block drafts the token behind its own; else the anchor's drafts none.
      state: width of the GRU's state.
      plain: first slots that the head leaves as they are.
      decay: share of the run after which U counts no more for itself.
    """

    temperature: ClassVar[float] = 1.0
    hybrid_of: ClassVar[str] = "slot"

    name: Literal["domino"]
    shifted: bool = True
    rank: int = 256
    state: int = 1024
    plain: int = 1
    candidates: int | None = None
    pace: float | None = 7.0
    decay: float = 0.5
    anchors: int = 256

    def __post_init__(self):
        super().__post_init__()
        for name in ("rank", "state"):
            schema.require(getattr(self, name) >= 1, f"objective.{name} must be at least 1", getattr(self, name))
        depth = self.block if self.shifted else self.block - 1
        schema.require(
            0 <= self.plain < depth, f"objective.plain must leave the head some of a block's {depth} slots", self.plain
        )
        schema.require(0 < self.decay <= 1, "objective.decay must lie in 0..1, 0 excluded", self.decay)

    def untrained(self, model: TransformerConfig) -> DSpark:
        """The drafter without parameters."""
        serial = SerialHead("gru", self.rank, self.state, self.plain, confidence="none")
        return _chain(self, model, serial, shifted=self.shifted)


def _chain(config: DSparkConfig | DominoConfig, model: TransformerConfig, serial: SerialHead, shifted: bool) -> DSpark:
    heads = config.network(model, shifted=shifted)
    return DSpark(heads, Static(chain(heads.depth)), serial, config.candidates)


class SerialObjective(BlockObjective):
    """What `dspark` and `domino` share: logits with what the serial head adds."""

    def __init__(self, config, tokenizer):
        """As `DraftObjective`."""
        super().__init__(config, tokenizer)
        self.serial = self.drafter.serial

    def head_params(self, params):
        """The network's, and `serial`."""
        return {**super().head_params(params), "serial": params["serial"]}

    def scores(self, read, frozen, hidden, before):
        """Of every slot, given its true predecessors."""
        own = read["serial"]
        latent = self.serial.latents(own, hidden, self.serial.embed(own, frozen, before))
        return self.read_head(read, frozen, hidden) + self.serial.scores(own, latent)


class DSparkObjective(SerialObjective):
    """The `dspark` objective."""

    Config: ClassVar[type] = DSparkConfig
    unbroken: ClassVar[bool] = True

    @property
    def asks_mass(self):
        return self._config.confident > 0

    def counted_loss(self, read, frozen, hidden, logits, log_p, slots):
        """The confidence head's cross-entropy."""
        if not self._config.confident:
            return 0.0
        if slots.log_mass is not None:
            log_p = log_p + slots.log_mass[..., None]
        survives = divergences.acceptance(jax.nn.log_softmax(logits, axis=-1), log_p)
        own = read["serial"]
        sure = self.serial.confidence_logit(own, hidden, self.serial.embed(own, frozen, slots.before))
        return self._config.confident * block_losses.confidence_loss(sure, survives)


class DominoObjective(SerialObjective):
    """The `domino` objective."""

    Config: ClassVar[type] = DominoConfig

    def more_loss(self, read, frozen, hidden, logits, log_p, slots, progress):
        """lambda (l(U) - l(U')), beside the l(U') that there is."""
        share = jnp.maximum(1 - progress / self._config.decay, 0)
        alone = self.loss_of(self.read_head(read, frozen, hidden), slots, log_p)
        return share * (alone - self.loss_of(logits, slots, log_p))
