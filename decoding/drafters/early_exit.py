"""Early exit: the target's own first layers, its final norm and its head are the draft model.

Keys and values of the first layers are the target's own, because the layers are; rows of candidates stay in scratch
until verification runs them through the whole stack. How much of the text the first layers can guess depends on the
target: those trained with a loss at every layer leave early, others hardly (Elhoushi et al. 2024, LayerSkip; Zhang et
al. 2024, Draft & Verify). Nothing is trained and nothing is stored, unless there is a lens before the final norm
(`models/heads/early_exit.py`), which learns to guess by a target that stays as it is.
"""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import struct

from decoding.drafters.draft_model import ModelNetwork
from decoding.drafters.network_drafter import NetworkDrafter
from decoding.policies import Static, TreePolicy
from models import transformer
from models.errors import UserError
from models.heads import early_exit


@dataclasses.dataclass(frozen=True)
class EarlyExit(NetworkDrafter):
    """The first layers of the target.

    Attributes:
      layers: how many; each candidate with children costs as much of a target row as they are of the stack.
      policy: how they grow a tree.
      lens: whether there is a trained lens.
    """

    layers: int
    policy: TreePolicy = dataclasses.field(default_factory=Static)
    lens: bool = False
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
        # The cache is the target's own, in which there is more than text.
        place = dict(
            config=target.config,
            params=target.params,
            cache=target.cache,
            place=dataclasses.replace(target.place, length=target.place.slots),
            unread=jnp.zeros((target.length.shape[0], 0), jnp.int32),
            vocab_size=target.config.vocab_size,
            layers=self.layers,
            memory=target.memory,
        )
        return LensNetwork(**place, lens=params) if self.lens else ModelNetwork(**place)

    def init_params(self, config, target, key):
        return early_exit.init(config, key, target["embed"]["embedding"].dtype) if self.lens else None


@struct.dataclass
class LensNetwork(ModelNetwork):
    """The first layers, seen through a lens.

    Attributes:
      lens: its parameters.
    """

    lens: Any = None

    def logits(self, out):
        hidden = early_exit.hidden(self.config, self.lens, self.params, out.taps["pre_norm"])
        return transformer.head(self.config, self.params, hidden)
