"""A drafter's best tree of a given size, chosen alike for every method whose tree is static.

1. The drafter decodes calibration prompts with a probing tree that is much wider than what is asked for, and the loop's
   own counters say how often the k-th guess below an accepted node of depth d was accepted. Counting in the loop, at
   the places where steps start and with the drafts' own verification, needs no teacher-forced forward, so it serves
   heads, networks and tables, greedy and sampled.
2. `decoding.trees.greedy_search` grows the tree with the largest expected acceptance from these accuracies.

Two methods bring a rule of their own for the second step and use it on the same counts: Sequoia its dynamic program,
RSD-C the best constant branching. A policy whose tree is dynamic (EAGLE-2's, DySpec's) chooses for itself and is only
told its size.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, cast

import numpy as np
from jaxtyping import Float

from decoding.drafter import Drafter
from decoding.drafters.lookahead import Lookahead
from decoding.drafters.prompt_lookup import PromptLookup
from decoding.policies import Confidence, DySpec, Static, StochasticBeam, TreePolicy
from decoding.policies.sequoia import constant_branching, measured_acceptance, sequoia_table
from decoding.stats import Stats
from decoding.trees import Topology, chain, expected_acceptance, greedy_search
from models.errors import UserError

PROBE_CANDIDATES = 128
RANKS = 10  # Most children of a candidate.
NETWORK_DEPTH = 6  # Of trees that a network grows, as EAGLE-2 was published.
BEAM_DEPTH = 4
LONGEST_CHAIN = 16

# How an autoregressive network may grow its tree: the best guesses in the best static tree (EAGLE-1), the dynamic tree
# by confidence (EAGLE-2), and those that draw candidates from the network's distribution when there is a temperature.
SAMPLED = ("chain", "specinfer", "sequoia", "rsd-c", "rsd-s", "dyspec")
POLICIES = ("top", "confidence", *SAMPLED)


def probing_tree(depth: int, candidates: int = PROBE_CANDIDATES) -> Topology:
    """The best tree if guess k were right in proportion to 1 / (k + 1.4): wide at the top, and deep all the same."""
    prior = np.tile(1 / (1.4 + np.arange(RANKS)), (depth, 1))
    return Topology(tuple(path for path, _ in greedy_search(prior, candidates)))


def counted_accuracy(tree: Topology, stats: Stats) -> Float[np.ndarray, "D K"]:
    """Share of visits that accepted the k-th guess at depth d, over all nodes of that depth and rank.

    A node is visited when its parent was accepted. Ranks and depths that no visited parent offers have accuracy 0.
    """
    visits, hits = np.zeros((2, tree.max_depth, int(tree.rank.max()) + 1))
    accepted = np.concatenate([[stats.steps], stats.accepted_by_node[1:]])
    for node in range(1, tree.size):
        place = tree.depth[node] - 1, tree.rank[node]
        visits[place] += accepted[tree.parent[node]]
        hits[place] += accepted[node]
    return hits / np.maximum(visits, 1)


def best_tree(accuracy: Float[np.ndarray, "D K"], candidates: int) -> Topology:
    """The tree of exactly that many candidates with the largest expected acceptance.

    Raises:
      UserError: so many candidates cannot be arranged in as many depths and ranks.
    """
    chosen = greedy_search(accuracy, candidates)
    if len(chosen) < candidates:
        raise UserError(f"a tree of {accuracy.shape[0]} depths and {accuracy.shape[1]} ranks has no {candidates} nodes")
    return Topology(tuple(path for path, _ in chosen))


class Fitter:
    """Fits one drafter to budgets. Calibrates once, where there is a static topology to choose."""

    def __init__(self, drafter: Drafter, policy: str, decode: Callable[[Drafter], Stats]):
        """Prepares the fits.

        Args:
          drafter: to be fitted.
          policy: for drafters that have a policy one of `POLICIES`; "" for all others.
          decode: decodes the calibration prompts with a drafter.

        Raises:
          UserError: a policy for a drafter without, or none for one with.
        """
        self._drafter, self._policy, self._decode = drafter, policy, decode
        fields = {field.name for field in dataclasses.fields(drafter)}  # type: ignore[arg-type]
        self._grows, self._has_tree = "policy" in fields, "tree" in fields
        if self._grows and not policy:
            raise UserError(f"how shall {drafter.name} grow its tree? Say @GROWTH, one of {', '.join(POLICIES)}")
        if policy and not self._grows:
            raise UserError(f"{drafter.name} has one way to grow its tree, so @{policy} has no meaning for it")

    def fit(self, budget: int) -> Drafter | None:
        """The drafter with exactly `budget` candidates; None where it cannot have so many."""
        if self._grows:
            policy = self._fit_policy(budget)
            return None if policy is None else _with(self._drafter, policy=policy)
        if self._has_tree:
            return _with(self._drafter, tree=best_tree(self._accuracy, budget))
        if isinstance(self._drafter, PromptLookup):
            return _with(self._drafter, depth=budget)
        if isinstance(self._drafter, Lookahead):
            guesses = budget // self._drafter.max_depth
            return _with(self._drafter, guesses=guesses) if guesses else None
        raise UserError(f"{self._drafter.name} cannot be fitted to a budget")

    def _fit_policy(self, budget: int) -> TreePolicy | None:
        if self._policy == "top":
            return Static(best_tree(self._accuracy, budget), "top")
        if self._policy == "specinfer":
            return Static(best_tree(self._accuracy, budget), "with")
        if self._policy == "sequoia":
            table = sequoia_table(self._by_rank.tolist(), budget + 1, NETWORK_DEPTH)
            return Static(table.tree(budget + 1, NETWORK_DEPTH), "without")
        if self._policy == "rsd-c":
            trees = (constant_branching(counts) for counts in branchings(budget, NETWORK_DEPTH, RANKS))
            return Static(max(trees, key=lambda tree: expected_acceptance(tree, self._accuracy)), "without")
        if self._policy == "rsd-s":
            width, rest = divmod(budget, BEAM_DEPTH)
            return StochasticBeam(width, BEAM_DEPTH) if width and not rest else None
        if self._policy == "dyspec":
            return DySpec(budget, NETWORK_DEPTH, width=min(budget, 16), branch=RANKS)
        if self._policy == "chain":
            return Static(chain(budget), "without") if budget <= LONGEST_CHAIN else None
        return Confidence(RANKS, NETWORK_DEPTH, budget + 1)

    @functools.cached_property
    def _probe(self) -> tuple[Topology, Stats]:
        """The probing tree, and what came of it."""
        heads = getattr(self._drafter, "heads", None)
        tree = probing_tree(NETWORK_DEPTH if self._grows or heads is None else heads.num_heads)
        draws: Any = {"top": "top", "specinfer": "with"}.get(self._policy, "without")
        grown = {"policy": Static(tree, draws)} if self._grows else {"tree": tree}
        return tree, self._decode(_with(self._drafter, **grown))

    @functools.cached_property
    def _accuracy(self) -> Float[np.ndarray, "D K"]:
        return counted_accuracy(*self._probe)

    @functools.cached_property
    def _by_rank(self) -> Float[np.ndarray, "K"]:
        tree, stats = self._probe
        shares = measured_acceptance(tree, stats.accepted_by_node, stats.steps)
        # Ranks are offered at different places, so that their shares need not be parts of one whole.
        return shares / max(1.0, shares.sum())


def branchings(candidates: int, depth: int, widest: int) -> list[tuple[int, ...]]:
    """Every way to give each depth a constant number of children, 1 to `widest`, so that there are `candidates`."""
    found: list[tuple[int, ...]] = []

    def extend(counts: tuple[int, ...], level: int, total: int) -> None:
        if total == candidates:
            found.append(counts)
        elif len(counts) < depth:
            for count in range(1, widest + 1):
                if total + level * count <= candidates:
                    extend((*counts, count), level * count, total + level * count)

    extend((), 1, 0)
    return found


def _with(drafter: Drafter, **changes: Any) -> Drafter:
    return dataclasses.replace(cast(Any, drafter), **changes)
