"""What drafters made of draft heads share: heads, a static tree, and the feature at the last committed position."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from decoding.drafter import Drafter
from decoding.trees import MC_SIM_7B_63, Topology
from models.errors import UserError
from models.heads.hydra import HydraHeads
from models.heads.medusa import MedusaHeads


@dataclasses.dataclass(frozen=True)
class HeadDrafter(Drafter):
    """Heads with a tree.

    Attributes:
      heads: shape of the heads.
      tree: the candidates; at most as deep as there are heads.
    """

    heads: MedusaHeads | HydraHeads
    tree: Topology = MC_SIM_7B_63

    @property
    def max_nodes(self) -> int:
        return self.tree.size

    @property
    def max_depth(self) -> int:
        return self.tree.max_depth

    def init_params(self, config, target, key):
        return self.heads.init(config, target, key)

    def check(self, config):
        if not self.tree.paths:
            raise UserError(f"the draft tree of {self.name} is empty: it needs at least one candidate")
        self.tree.check(heads=self.heads.num_heads, vocab_size=config.vocab_size)


def last_feature(
    state: Float[Array, "B H"], features: Float[Array, "B R H"], count: Int[Array, "B"]
) -> Float[Array, "B H"]:
    """Feature of the last of `count` true rows; the old state where there are none."""
    last = jnp.maximum(count - 1, 0)[:, None, None]
    newest = jnp.take_along_axis(features, last, axis=1)[:, 0]
    return jnp.where((count > 0)[:, None], newest.astype(state.dtype), state)
