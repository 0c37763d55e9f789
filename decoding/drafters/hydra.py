"""Hydra's drafter: level by level, each head reads the path of candidates that it continues.

Level d evaluates head d once, on all nodes of depth d that have children. Hydra++ adds a one-layer KV cache of its own
that follows the target's: `ingest` runs its prefix block over exactly the rows that became text.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from decoding.cache import commit, init_cache
from decoding.drafters.heads import HeadDrafter, last_feature
from decoding.sampling import best_tokens
from models.heads.hydra import HydraHeads
from models.layout import Layout


@dataclasses.dataclass(frozen=True)
class Hydra(HeadDrafter):
    """Hydra or Hydra++ heads (`heads.prefix`) with a tree."""

    heads: HydraHeads = HydraHeads()
    name: ClassVar[str] = "hydra"
    taps: ClassVar[tuple[str, ...]] = ("post_norm",)

    def init(self, config, batch, capacity, dtype):
        """`feature` `[B, H]` that the heads read, and Hydra++'s one-layer `cache`."""
        state = {"feature": jnp.zeros((batch, config.width), dtype)}
        if self.heads.prefix:
            state["cache"] = init_cache(config, batch, capacity, dtype, layers=1)
        return state

    def ingest(self, params, target, state, rows):
        features_BRH = rows.taps["post_norm"]
        if self.heads.prefix:
            layout = Layout.extend(rows.start, features_BRH.shape[1])
            features_BRH, fresh = self.heads.prefix_rows(target.config, params, features_BRH, layout, state["cache"][0])
            state = {**state, "cache": commit(state["cache"], [fresh], None, rows.start)}
        return {**state, "feature": last_feature(state["feature"], features_BRH, rows.count)}

    def draft(self, params, target, state, root, keys):
        tree = self.tree
        tokens_BN = jnp.zeros((root.shape[0], tree.size), jnp.int32).at[:, 0].set(root)
        for i in range(tree.max_depth):
            parents = tree.expanded(i)
            path_BMPH = target.embed(tokens_BN[:, tree.lineage[parents, : i + 1]])
            feature_BMH = jnp.broadcast_to(state["feature"][:, None], (*path_BMPH.shape[:2], path_BMPH.shape[-1]))
            hidden_BMH = self.heads.hidden(params, i, feature_BMH, path_BMPH)
            nodes = tree.level(i + 1)
            best_BMK = best_tokens(self.heads.vocab(params, i, hidden_BMH), int(tree.rank[nodes].max()) + 1)
            row = [list(parents).index(tree.parent[node]) for node in nodes]
            tokens_BN = tokens_BN.at[:, nodes].set(best_BMK[:, row, tree.rank[nodes]])
        return tree.fill(tokens_BN, law="point")
