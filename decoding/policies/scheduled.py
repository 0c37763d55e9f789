"""A chain of which as many slots are verified as the network vouches for (DSpark, section 4).

The chain is drawn as `Static` draws it, or ranked; then confidences decide how much of it is offered, of none to all,
by `admission.py`: up to the first slot below `threshold`, and, where `speed` says how fast the target is, greedily over
all rows of the batch until a slot does not pay. Neither looks at a token's own slot or a later one, so the rule stays
that of the chain. With `speed` what a row drafts depends on its neighbours, though never its text's distribution.

A slot that is not admitted costs no verification where only valid rows are run; this loop runs all rows of its bucket,
and gains nothing from cutting a chain but a shorter walk.
"""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from decoding.policies.admission import admit, reach, until
from decoding.policies.policy import DraftNetwork, Scores, TreePolicy
from decoding.policies.static import Static
from decoding.trees import chain
from models.errors import UserError

_UNSURE = "the policy scheduled cuts chains by confidence, and this draft network has no confidence head"


@dataclasses.dataclass(frozen=True)
class Scheduled(TreePolicy):
    """A chain cut by confidence.

    Attributes:
      depth: slots.
      threshold: confidence below which a slot and all behind it are left out; 0 leaves none out.
      speed: steps per second of target forwards over 1, 2, .. rows, of the whole batch, as `eval.tree --calibrate
        --speed` measures them; empty admits all.
      temperatures: of the confidences' logits, by slot (`decoding/calibration.py`); empty is 1 for all.
      draws: `without` draws every slot, `top` takes its best token.
    """

    depth: int = 7
    threshold: float = 0.0
    speed: tuple[float, ...] = ()
    temperatures: tuple[float, ...] = ()
    draws: Literal["top", "without"] = "without"
    kind: ClassVar[str] = "scheduled"

    def __post_init__(self):
        if self.depth < 1:
            raise UserError(f"a scheduled chain needs a depth of at least 1, got {self.depth}")
        if not 0 <= self.threshold <= 1:
            raise UserError(f"a scheduled chain's threshold must lie in [0, 1], got {self.threshold}")
        if min(self.speed, default=1) <= 0:
            raise UserError(f"a scheduled chain's speed must be steps per second above 0, got {min(self.speed)}")
        if self.temperatures and (len(self.temperatures) != self.depth or min(self.temperatures) <= 0):
            raise UserError(
                f"a scheduled chain of {self.depth} needs {self.depth} temperatures above 0, or none, got "
                f"{list(self.temperatures)}"
            )

    @property
    def _chain(self) -> Static:
        return Static(chain(self.depth), self.draws)

    @property
    def max_nodes(self) -> int:
        return 1 + self.depth

    @property
    def max_depth(self) -> int:
        return self.depth

    @property
    def levels(self) -> tuple[int, ...]:
        return (1,) * self.depth

    def rule(self, greedy):
        return self._chain.rule(greedy)

    def check_network(self, blind: int, confident: bool) -> None:
        if not confident:
            raise UserError(_UNSURE)

    def grow(self, network, root, keys, sampling):
        grown, confidence_BD = self.uncut(network, root, keys, sampling)
        lengths_B = self._lengths(confidence_BD)
        valid_BN = jnp.arange(self.max_nodes, dtype=jnp.int32) <= lengths_B[:, None]
        return grown._replace(tree=dataclasses.replace(grown.tree, valid=valid_BN))

    def uncut(self, network, root, keys, sampling):
        heard = _Heard(network)
        grown = self._chain.grow(heard, root, keys, sampling)
        return grown, jnp.concatenate(heard.confidences, axis=1)

    def calibrated(self, temperatures, speed=()):
        return dataclasses.replace(self, temperatures=tuple(temperatures), speed=tuple(speed) or self.speed)

    def _lengths(self, confidence_BD: Float[Array, "B D"]):
        if self.temperatures:
            logit_BD = jnp.log(confidence_BD) - jnp.log1p(-confidence_BD)
            confidence_BD = jax.nn.sigmoid(logit_BD / jnp.asarray(self.temperatures, confidence_BD.dtype))
        lengths_B = until(confidence_BD, self.threshold)
        if not self.speed:
            return lengths_B
        return jnp.minimum(lengths_B, admit(reach(confidence_BD), jnp.asarray(self.speed, confidence_BD.dtype)))

    def with_budget(self, candidates, acceptance=None):
        # Temperatures are those of slots, which a shorter chain has too.
        if self.temperatures and candidates > self.depth:
            return None
        return dataclasses.replace(self, depth=candidates, temperatures=self.temperatures[:candidates])


class _Heard:
    """A network whose confidences are kept, level by level."""

    def __init__(self, network: DraftNetwork):
        self.confidences: list[Array] = []
        self._network = network

    @property
    def vocab_size(self) -> int:
        return self._network.vocab_size

    def begin(self, root, slots):
        return self._kept(*self._network.begin(root, slots))

    def extend(self, scratch, level, at, tokens, parents, seen):
        return self._kept(*self._network.extend(scratch, level, at, tokens, parents, seen))

    def _kept(self, scores: Scores, scratch: Any):
        if scores.confidence is None:
            raise UserError(_UNSURE)
        self.confidences.append(scores.confidence)
        return scores, scratch
