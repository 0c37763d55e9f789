"""Static trees: the topology is given, the network fills it level by level.

How children are chosen decides the rule, and which published method this is:

* `top`: the best tokens, rule `point`: greedy drafting on a chain, EAGLE-1 at temperature 0 on its tree.
* `without`: drawn without replacement by Gumbel-top-k (Kool et al. 2019), rule `swor`: RSD-C (Jeon et al. 2024) on
  trees of constant branching, Sequoia (Chen et al. 2024) on trees by dynamic programming
  (`decoding/tree_search.py`), and speculative decoding as in Leviathan et al. 2023 on a chain.
* `with`: drawn with replacement, rule `iid`: SpecInfer (Miao et al. 2024).

Where every row of a batch decodes greedily there is nothing to draw, and all three rank.
"""

import dataclasses
from typing import ClassVar, Literal

import jax.numpy as jnp
import numpy as np

from decoding.policies.policy import (
    Grown,
    TreePolicy,
    draft_log_probabilities,
    gumbel_for,
    of_target,
    over_target,
)
from decoding.sampling import argmax, best_tokens
from decoding.tree_search import NETWORK_DEPTH, Acceptance, best_part, best_tree, probing_tree
from decoding.trees import Topology, chain
from models.errors import UserError

RULE_OF = {"top": "point", "without": "swor", "with": "iid"}


@dataclasses.dataclass(frozen=True)
class Static(TreePolicy):
    """A fixed topology.

    Attributes:
      tree: the candidates.
      draws: how siblings are chosen: `top`, `without` or `with` replacement.
    """

    tree: Topology = dataclasses.field(default_factory=lambda: chain(4))
    draws: Literal["top", "without", "with"] = "without"
    kind: ClassVar[str] = "static"

    def __post_init__(self):
        if not self.tree.paths:
            raise UserError("the draft tree is empty: it needs at least one candidate")

    @property
    def max_nodes(self) -> int:
        return self.tree.size

    @property
    def max_depth(self) -> int:
        return self.tree.max_depth

    @property
    def levels(self) -> tuple[int, ...]:
        return tuple(len(self.tree.expanded(depth)) for depth in range(self.max_depth))

    def check(self, vocab_size: int) -> None:
        self.tree.check(heads=self.max_depth, vocab_size=vocab_size)

    def rule(self, greedy):
        return "point" if greedy else RULE_OF[self.draws]

    def grow(self, network, root, keys, sampling):
        tree, batch = self.tree, root.shape[0]
        rule = self.rule(sampling.greedy)
        slot_of_node = np.full(tree.size, -1, np.int32)
        levels, proposals = [root[:, None]], []
        at = 0
        for depth in range(tree.max_depth):
            parents = tree.expanded(depth)
            slot_of_node[parents] = at + np.arange(len(parents))
            if depth == 0:
                logits_BW, scratch = network.begin(root, self.slots)
                logits_BMW = logits_BW[:, None]
            else:
                above = tree.ancestors[parents].copy()
                above[np.arange(len(parents)), parents] = False
                seen = above @ (slot_of_node[:, None] == np.arange(self.slots))
                logits_BMW, scratch = network.extend(
                    scratch,
                    at,
                    levels[depth][:, np.searchsorted(tree.level(depth), parents)],
                    _rows(slot_of_node[tree.parent[parents]], batch),
                    _rows(np.full(len(parents), depth, np.int32), batch),
                    _rows(seen, batch),
                )
            at += len(parents)
            nodes = tree.level(depth + 1)
            chosen_BMK = self._choose(logits_BMW, rule, keys, sampling, depth, int(tree.rank[nodes].max()) + 1)
            chosen_BM = chosen_BMK[:, np.searchsorted(parents, tree.parent[nodes]), tree.rank[nodes]]
            levels.append(of_target(network, chosen_BM))
            if rule != "point":
                proposals.append(over_target(network, jnp.exp(draft_log_probabilities(logits_BMW, sampling))))
        drawn_from = jnp.concatenate(proposals, axis=1) if proposals else None
        filled = tree.fill(jnp.concatenate(levels, axis=1), rule, drawn_from)
        return Grown(filled, jnp.asarray(slot_of_node)[None], scratch)

    def _choose(self, logits_BMW, rule, keys, sampling, depth, count):
        """Outputs of the network `[B, M, K]` for the children of each row, in the order in which they are offered."""
        if rule == "point":
            return best_tokens(logits_BMW, count)
        logq_BMW = draft_log_probabilities(logits_BMW, sampling)
        if rule == "swor":
            return best_tokens(logq_BMW + gumbel_for(keys, sampling, depth, logq_BMW.shape[1:], logq_BMW.dtype), count)
        noise_BMKW = gumbel_for(keys, sampling, depth, (*logq_BMW.shape[1:2], count, logq_BMW.shape[2]), logq_BMW.dtype)
        return argmax(logq_BMW[:, :, None] + noise_BMKW)

    @property
    def ranked_tree(self):
        return self.tree if self.draws == "top" else None

    @property
    def topology(self):
        return self.tree

    def probing(self):
        return Static(probing_tree(NETWORK_DEPTH), self.draws)

    def with_budget(self, candidates, acceptance=None):
        tree = self.best(candidates, acceptance)
        return None if tree is None else Static(tree, self.draws)

    def best(self, candidates: int, acceptance: Acceptance | None) -> Topology | None:
        """The topology of that many candidates that the counts favour: the most expected tokens."""
        if acceptance is None:
            return best_part(self.tree, candidates)
        return best_tree(acceptance.accuracy, candidates)


def _rows(values: np.ndarray, batch: int):
    """The same values in every batch row."""
    return jnp.broadcast_to(jnp.asarray(values), (batch, *values.shape))
