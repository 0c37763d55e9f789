"""Medusa's drafter: the products of the heads' best guesses, arranged in a static tree.

The heads do not see each other's guesses, so every node at depth d with rank k holds the same token, head d-1's k-th
best, and one evaluation per head fills the whole tree.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from decoding.drafters.head_drafter import HeadDrafter, last_feature
from decoding.sampling import best_tokens
from models.heads.medusa import MedusaHeads


@dataclasses.dataclass(frozen=True)
class Medusa(HeadDrafter):
    """Medusa heads with a tree."""

    heads: MedusaHeads = dataclasses.field(default_factory=MedusaHeads)
    name: ClassVar[str] = "medusa"
    taps: ClassVar[tuple[str, ...]] = ("post_norm",)

    def init(self, config, batch, capacity, dtype, mesh=None):
        """The feature that the heads read, `[B, H]`."""
        return jnp.zeros((batch, config.width), dtype)

    def ingest(self, params, target, state, rows):
        return last_feature(state, rows.taps["post_norm"], rows.count)

    def draft(self, params, target, state, root, keys):
        levels = []
        for i in range(self.tree.max_depth):
            nodes = self.tree.level(i + 1)
            hidden_BH = self.heads.hidden(params, i, state, jnp.zeros((*state.shape[:1], 0, state.shape[-1])))
            best_BK = best_tokens(self.heads.vocab(params, i, hidden_BH), int(self.tree.rank[nodes].max()) + 1)
            levels.append(best_BK[:, np.asarray(self.tree.rank[nodes])])
        return self.tree.fill(
            jnp.concatenate([root[:, None], *levels], axis=1), self.rule(target.sampling.greedy)
        ), None
