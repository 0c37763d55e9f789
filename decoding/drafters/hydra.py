"""Hydra's drafter: level by level, each head reads the path of candidates that it continues.

Level d evaluates head d once, on all nodes of depth d that have children; what a node's token contributes to the heads
below it is computed once and inherited along the tree. Hydra++ adds a one-layer KV cache of its own
that follows the target's: `ingest` runs its prefix block over exactly the rows that became text.
"""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from decoding.cache import commit, init_cache
from decoding.drafters.head_drafter import HeadDrafter, last_feature
from decoding.sampling import best_tokens
from models.heads.hydra import HydraHeads
from models.layout import Layout
from models.transformer import Params


@dataclasses.dataclass(frozen=True)
class Hydra(HeadDrafter):
    """Hydra or Hydra++ heads (`heads.prefix`) with a tree."""

    heads: HydraHeads = dataclasses.field(default_factory=HydraHeads)
    name: ClassVar[str] = "hydra"
    taps: ClassVar[tuple[str, ...]] = ("post_norm",)

    def rows_of_level(self, depth):
        return len(self.tree.expanded(depth))

    def init(self, config, batch, capacity, dtype, mesh=None):
        """`feature` `[B, H]` that the heads read, and Hydra++'s one-layer `cache`."""
        state: dict = {"feature": jnp.zeros((batch, config.width), dtype)}
        if self.heads.prefix:
            state["cache"] = init_cache(config, batch, capacity, dtype, layers=1, mesh=mesh)
        return state

    def ingest(self, params, target, state, rows):
        features_BRH = rows.taps["post_norm"]
        if self.heads.prefix:
            layout = Layout.extend(rows.start.length, features_BRH.shape[1])
            features_BRH, fresh = self.heads.prefix_rows(target.config, params, features_BRH, layout, state["cache"][0])
            cache = commit(state["cache"], [fresh], None, rows.start.length, after=features_BRH[:, 0])
            state = {**state, "cache": cache}
        return {**state, "feature": last_feature(state["feature"], features_BRH, rows.count)}

    def for_decoding(self, params, mesh=None):
        return params if "joined" in params else {**params, "joined": join_inputs(self.heads, params)}

    def draft(self, params, target, state, root, keys):
        tree, joined = self.tree, params["joined"]

        def read(source, x):
            readers = tree.max_depth - max(source - 1, 0)
            return jnp.einsum("...H,HKI->...KI", x, joined["sources"][source][:, :readers])

        summed_BMKI = (joined["bias"][: tree.max_depth] + read(0, state["feature"]))[:, None]
        above = np.array([0])
        levels = [root[:, None]]
        for i in range(tree.max_depth):
            parents = tree.expanded(i)
            picked_BM = levels[i][:, np.searchsorted(tree.level(i), parents)]
            inherited = np.searchsorted(above, tree.parent[parents]) if i else above
            summed_BMKI = summed_BMKI[:, inherited, min(i, 1) :] + read(i + 1, target.lookup(picked_BM))
            hidden_BMH = self.heads.hidden_joined(params, i, summed_BMKI[:, :, 0])
            nodes = tree.level(i + 1)
            best_BMK = best_tokens(self.heads.vocab(params, i, hidden_BMH), int(tree.rank[nodes].max()) + 1)
            levels.append(best_BMK[:, np.searchsorted(parents, tree.parent[nodes]), tree.rank[nodes]])
            above = parents
        return tree.fill(jnp.concatenate(levels, axis=1), self.rule(target.sampling.greedy)), None


@functools.partial(jax.jit, static_argnames=("heads",))
def join_inputs(heads: HydraHeads, params: Params) -> Params:
    """What drafting reads in place of the heads' first blocks (`HydraHeads.join_inputs`)."""
    return heads.join_inputs(params)
