"""Early exit: the target's own first layers, its final norm and its head are the draft model.

Nothing is trained and nothing is stored. Keys and values of the first layers are the target's own, because the layers
are; rows of candidates stay in scratch until verification runs them through the whole stack. How much of the text the
first layers can guess depends on the target: those trained with a loss at every layer leave early, others hardly
(Elhoushi et al. 2024, LayerSkip; Zhang et al. 2024, Draft & Verify).
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from decoding.drafters.draft_model import ModelNetwork
from decoding.drafters.network_drafter import NetworkDrafter
from decoding.policies import Static, TreePolicy
from models.errors import UserError


@dataclasses.dataclass(frozen=True)
class EarlyExit(NetworkDrafter):
    """The first layers of the target.

    Attributes:
      layers: how many; each candidate with children costs as much of a target row as they are of the stack.
      policy: how they grow a tree.
    """

    layers: int
    policy: TreePolicy = dataclasses.field(default_factory=Static)
    name: ClassVar[str] = "early_exit"
    bare_names: ClassVar[tuple[str, ...]] = ("early_exit:LAYERS",)

    @classmethod
    def from_name(cls, argument):
        return cls(int(argument)) if argument.isdecimal() else None

    def check(self, config):
        if not 1 <= self.layers <= config.num_layers:
            raise UserError(f"{self.name} needs 1 to {config.num_layers} layers of this target, got {self.layers}")
        super().check(config)

    def network(self, params, target, state):
        """The first layers in the middle of the text."""
        nothing = jnp.zeros((target.length.shape[0], 0), jnp.int32)
        # The cache is the target's own, in which there is more than text.
        place = dataclasses.replace(target.place, length=target.place.slots)
        return ModelNetwork(
            target.config,
            target.params,
            target.cache,
            place,
            nothing,
            target.config.vocab_size,
            self.layers,
        )
