"""Static trees: the topology is given, the network fills it level by level.

How children are chosen decides the rule, and which published method this is:

* `top`: the best tokens, rule `point`: greedy drafting on a chain, EAGLE-1 at temperature 0 on its tree.
* `without`: drawn without replacement by Gumbel-top-k (Kool et al. 2019), rule `swor`: RSD-C (Jeon et al. 2024) on
  trees of constant branching, Sequoia (Chen et al. 2024) on trees by dynamic programming
  (`decoding/tree_search.py`), and speculative decoding as in Leviathan et al. 2023 on a chain.
* `with`: drawn with replacement, rule `iid`: SpecInfer (Miao et al. 2024).

Where every row of a batch decodes greedily there is nothing to draw, and all three rank.

Candidates that share a distribution share one list of draws, of which each of their parents takes the beginning. That
is exact because how much of it a parent takes was decided before anything was drawn.
"""

import dataclasses
from typing import ClassVar, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from decoding.policies.policy import (
    Grown,
    TreePolicy,
    draft_log_probabilities,
    gumbel_for,
)
from decoding.sampling import argmax, best_tokens
from decoding.tree_search import NETWORK_DEPTH, Acceptance, best_part, best_tree, probing_tree
from decoding.trees import SAMPLED_RULES, Topology, chain
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
        levels, proposals, proposal_of = [root[:, None]], [], []
        at = distributions = 0
        for depth in range(tree.max_depth):
            parents = tree.expanded(depth)
            slot_of_node[parents] = at + np.arange(len(parents))
            if depth == 0:
                scores, scratch = network.begin(root, self.slots)
            else:
                above = tree.ancestors[parents].copy()
                above[np.arange(len(parents)), parents] = False
                seen = above @ (slot_of_node[:, None] == np.arange(self.slots))
                scores, scratch = network.extend(
                    scratch,
                    depth,
                    at,
                    levels[depth][:, np.searchsorted(tree.level(depth), parents)],
                    _rows(slot_of_node[tree.parent[parents]], batch),
                    _rows(seen, batch),
                )
            at += len(parents)
            nodes = tree.level(depth + 1)
            chosen_BPK = self._choose(scores.logits, rule, keys, sampling, depth, int(tree.rank[nodes].max()) + 1)
            offered_BMK = scores.of_rows(scores.of_target(chosen_BPK))
            levels.append(offered_BMK[:, np.searchsorted(parents, tree.parent[nodes]), tree.rank[nodes]])
            if rule in SAMPLED_RULES:
                q_BPW = jnp.exp(draft_log_probabilities(scores.logits, sampling))
                proposals.append(scores.over_target(q_BPW, network.vocab_size))
                row = np.arange(len(parents), dtype=np.int32)[None] if scores.row is None else scores.row
                proposal_of.append(distributions + row)
                distributions += q_BPW.shape[1]
        drawn_from = (jnp.concatenate(proposals, axis=1), _side_by_side(proposal_of)) if proposals else ()
        filled = tree.fill(jnp.concatenate(levels, axis=1), rule, *drawn_from)
        return Grown(filled, jnp.asarray(slot_of_node)[None], scratch)

    def _choose(self, logits_BPW, rule, keys, sampling, depth, count):
        """Outputs `[B, P, K]` of each distribution, in the order in which they are offered."""
        if rule == "point":
            return best_tokens(logits_BPW, count)
        logq_BPW = draft_log_probabilities(logits_BPW, sampling)
        if rule == "swor":
            return best_tokens(logq_BPW + gumbel_for(keys, sampling, depth, logq_BPW.shape[1:], logq_BPW.dtype), count)
        noise_BPKW = gumbel_for(keys, sampling, depth, (*logq_BPW.shape[1:2], count, logq_BPW.shape[2]), logq_BPW.dtype)
        drawn_BPK = argmax(logq_BPW[:, :, None] + noise_BPKW)
        # Of greedy rows the noise is none, and as many equal candidates would be a waste: they take the best.
        return jnp.where(sampling.temperature[:, None, None] > 0, drawn_BPK, best_tokens(logq_BPW, count))

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


def _side_by_side(columns: list) -> Int[np.ndarray, "1 P"] | Int[Array, "#B P"]:
    """Numbers of parents level by level; constants stay constants."""
    if all(isinstance(column, np.ndarray) for column in columns):
        return np.concatenate(columns, axis=1)
    batch = max(column.shape[0] for column in columns)
    return jnp.concatenate([jnp.broadcast_to(x, (batch, x.shape[1])) for x in columns], axis=1)


def _rows(values: np.ndarray, batch: int):
    """The same values in every batch row."""
    return jnp.broadcast_to(jnp.asarray(values), (batch, *values.shape))
