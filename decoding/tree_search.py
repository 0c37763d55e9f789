"""Which draft tree: how good a topology is expected to be, and the searches for the best one.

Everything starts from how often the k-th guess at each depth is right (`Acceptance`), counted in the loop or read off
ranks that are known. A topology is then scored by the expectation (`expected_acceptance`) or by walking through a text
(`walk`), and found by a greedy search, which is exact where each depth and rank has an accuracy of its own
(`greedy_search`; Medusa, section 3.2), by dynamic programming where ranks alone have one (`sequoia_table`; Chen et al.
2024, section 3.1), or among those that branch constantly (`branchings`; RSD-C, Jeon et al. 2024).
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from decoding.stats import Stats
from decoding.trees import Topology, refuse_huge
from models.errors import UserError

PROBE_CANDIDATES = 128
RANKS = 10  # Most children of a candidate.
NETWORK_DEPTH = 6  # Of trees that a network or a table grows, as EAGLE-2 was published.


@dataclasses.dataclass(frozen=True)
class Acceptance:
    """How often guesses were right, by depth (from 1) and rank.

    Attributes:
      hits: float `[D, K]`, times that the guess was the true token.
      visits: float `[D, K]`, times that it could have been: its parent was on the true path.
    """

    hits: Float[np.ndarray, "D K"]
    visits: Float[np.ndarray, "D K"]

    @classmethod
    def counted(cls, tree: Topology, stats: Stats) -> "Acceptance":
        """Over the nodes of a static tree that the loop has decoded with: a visit is an accepted parent."""
        visits, hits = np.zeros((2, tree.max_depth, tree.max_rank))
        accepted = np.concatenate([[stats.steps], stats.accepted_by_node[1:]])
        for node in range(1, tree.size):
            place = tree.depth[node] - 1, tree.rank[node]
            visits[place] += accepted[tree.parent[node]]
            hits[place] += accepted[node]
        return cls(hits, visits)

    @classmethod
    def of_ranks(cls, ranks: Int[np.ndarray, "D N"], width: int) -> "Acceptance":
        """Over N places of a text, given the true path above each; a rank of `width` or more is no hit."""
        hits = np.stack([np.bincount(row, minlength=width + 1)[:width] for row in ranks]).astype(np.float64)
        return cls(hits, np.full(hits.shape, float(ranks.shape[1])))

    @property
    def accuracy(self) -> Float[np.ndarray, "D K"]:
        """Share of visits that were hits, by depth and rank; 0 where nothing was visited."""
        return self.hits / np.maximum(self.visits, 1)

    @property
    def by_rank(self) -> Float[np.ndarray, "K"]:
        """The same by rank alone, all depths together."""
        return self.hits.sum(axis=0) / np.maximum(self.visits.sum(axis=0), 1)


def expected_acceptance(topology: Topology, accuracy: Float[np.ndarray, "D K"]) -> float:
    """1 + the sum over nodes of the product of accuracies along their path: predicted acceptance length."""
    return 1.0 + sum(math.prod(accuracy[d, rank] for d, rank in enumerate(path)) for path in topology.paths)


def walk(ranks: Sequence[Int[np.ndarray, "D N"]], tree: Topology) -> float:
    """Acceptance length that the loop with `tree` has on texts whose ranks are known.

    Steps start where the one before ended, as in the loop, so this is no average over all places.

    Args:
      ranks: per text `[d, p]`, the rank among the guesses of depth d + 1 of the token that is true there, for a step
        that starts at place p.
      tree: at most D deep.
    """
    committed = steps = 0
    width = tree.children.shape[1]
    for ranks_DN in ranks:
        node = np.zeros(ranks_DN.shape[1], np.int32)
        accepted = np.zeros_like(node)
        alive = np.ones(len(node), bool)
        for rank in ranks_DN[: tree.max_depth]:
            child = np.where(rank < width, tree.children[node, np.minimum(rank, width - 1)], -1)
            alive &= child >= 0
            node = np.where(alive, child, node)
            accepted += alive
        place = 0
        while place < len(accepted):
            place += int(accepted[place]) + 1
            steps += 1
        committed += place
    return committed / steps


def greedy_search(accuracy: Float[np.ndarray, "D K"], candidates: int) -> list[tuple[tuple[int, ...], float]]:
    """Grows the tree with the largest expected acceptance, one candidate at a time (Medusa, section 3.2).

    Args:
      accuracy: the probability that the rank-k guess at depth d is right given that its parent is.
      candidates: how many to choose.

    Returns:
      (path, score) in the order chosen, score = product of accuracies along the path; the first n of them are the best
      tree of n candidates, and 1 + the sum of their scores is its expected acceptance length.
    """
    depths, ranks = accuracy.shape
    frontier: dict[tuple[int, ...], float] = {(0,): float(accuracy[0, 0])}
    chosen: list[tuple[tuple[int, ...], float]] = []
    refuse_huge(candidates)
    while frontier and len(chosen) < candidates:
        path = max(frontier, key=lambda p: (frontier[p], -len(p), tuple(-r for r in p)))
        score = frontier.pop(path)
        chosen.append((path, score))
        depth, rank = len(path) - 1, path[-1]
        if rank + 1 < ranks:
            above = score / accuracy[depth, rank] if accuracy[depth, rank] > 0 else 0.0
            frontier[(*path[:-1], rank + 1)] = above * float(accuracy[depth, rank + 1])
        if depth + 1 < depths:
            frontier[(*path, 0)] = score * float(accuracy[depth + 1, 0])
    return chosen


def best_tree(accuracy: Float[np.ndarray, "D K"], candidates: int) -> Topology | None:
    """The tree of exactly that many candidates with the largest expected acceptance.

    None where so many cannot be arranged in as many depths and ranks.
    """
    chosen = greedy_search(accuracy, candidates)
    return Topology(tuple(path for path, _ in chosen)) if len(chosen) == candidates else None


def best_part(tree: Topology, candidates: int) -> Topology | None:
    """The best of a tree's parts of exactly that many candidates, if guess k is right in proportion to 1 / (k + 1.4).

    None where the tree has fewer.
    """
    if candidates > len(tree.paths):
        return None
    # Products of what never grows with depth or rank: no path comes before its parent or an elder sibling.
    order = sorted(tree.paths, key=lambda path: (-math.prod(map(_prior, path)), len(path), path))
    return Topology(tuple(order[:candidates]))


def nested_trees(accuracy: Float[np.ndarray, "D K"], candidates: int) -> list[Topology]:
    """For every limit on the depth the best trees of 1, 2, ... candidates that reach it and hold no hopeless one."""
    trees: list[Topology] = []
    for depth in range(1, len(accuracy) + 1):
        grown = [path for path, score in greedy_search(accuracy[:depth], candidates) if score > 0]
        nested = (Topology(tuple(grown[:count])) for count in range(1, len(grown) + 1))
        trees += [tree for tree in nested if tree.max_depth == depth]
    return trees


def _prior(rank: int) -> float:
    """How often a guess of that rank is right, before anything was counted."""
    return 1 / (1.4 + rank)


def probing_tree(depth: int, candidates: int = PROBE_CANDIDATES) -> Topology:
    """The best tree if guess k were right in proportion to 1 / (k + 1.4): wide at the top, and deep all the same."""
    prior = np.tile([_prior(rank) for rank in range(RANKS)], (depth, 1))
    return Topology(tuple(path for path, _ in greedy_search(prior, candidates)))


@dataclasses.dataclass(frozen=True)
class SequoiaTable:
    """Best expected tokens per target forward, for every size and depth.

    The model of acceptance is positional: when verification stands at a node, its b-th child is the accepted one with
    probability a[b], whatever the node and the depth. Then a tree's expected tokens are a sum over children of a[b]
    times those of the child's subtree, and the best tree of m nodes is made of best subtrees.

    Attributes:
      acceptance: a, float `[C]`.
      expected: `[m, l, b]`: of trees of m nodes (root included) and at most l levels below the root, whose root has
        exactly b children; -inf where there is none.
      first: `[m, l, b]`: nodes of such a tree without its root's last child and that child's subtree.
    """

    acceptance: Float[np.ndarray, "C"]
    expected: Float[np.ndarray, "M L B"]
    first: Int[np.ndarray, "M L B"]

    def value(self, nodes: int, depth: int) -> float:
        """Expected tokens of the best tree of exactly `nodes` nodes and at most `depth` levels; -inf for none."""
        return float(self.expected[nodes, depth].max())

    def tree(self, nodes: int, depth: int) -> Topology:
        """The tree itself. Raises UserError when no tree has these sizes."""
        if not np.isfinite(self.value(nodes, depth)):
            widest = len(self.acceptance)
            raise UserError(f"no tree of {nodes} nodes is at most {depth} deep and {widest} children wide")
        return Topology(tuple(self._paths(nodes, depth)))

    def _paths(self, nodes: int, depth: int) -> list[tuple[int, ...]]:
        paths: list[tuple[int, ...]] = []
        for b in range(int(np.argmax(self.expected[nodes, depth])), 0, -1):
            rest = int(self.first[nodes, depth, b])
            below = self._paths(nodes - rest, depth - 1)
            paths += [(b - 1,), *((b - 1, *path) for path in below)]
            nodes = rest
        return paths


def sequoia_table(acceptance: Sequence[float], nodes: int, depth: int) -> SequoiaTable:
    """Fills the table for trees of up to `nodes` nodes and `depth` levels.

    Args:
      acceptance: a[b], the probability that the b-th child is the accepted one; sums to at most 1.
      nodes: root included.
      depth: levels below the root.

    Raises:
      UserError: probabilities that are none.
    """
    a = np.asarray(acceptance, np.float64)
    if a.ndim != 1 or not len(a) or (a < 0).any() or a.sum() > 1 + 1e-6:
        raise UserError(f"an acceptance vector holds probabilities that sum to at most 1, got {list(acceptance)}")
    expected = np.full((nodes + 1, depth + 1, len(a) + 1), -np.inf)
    first = np.zeros(expected.shape, np.int64)
    expected[1, :, 0] = 1.0
    for level in range(1, depth + 1):
        below = expected[:, level - 1].max(axis=1)
        for b in range(1, len(a) + 1):
            for m in range(2, nodes + 1):
                # y nodes for the root and its first b - 1 children, m - y for the last child and what is under it.
                y = np.arange(1, m)
                total = expected[y, level, b - 1] + a[b - 1] * below[m - y]
                best = int(np.argmax(total))
                expected[m, level, b], first[m, level, b] = total[best], y[best]
    return SequoiaTable(a, expected, first)


def sequoia_tree(acceptance: Acceptance, candidates: int, depth: int) -> Topology | None:
    """The best tree of exactly that many candidates under the positional model; None where there is none."""
    # Ranks are offered at different places, so that their shares need not be parts of one whole.
    shares = acceptance.by_rank / max(1.0, acceptance.by_rank.sum())
    table = sequoia_table(shares.tolist(), candidates + 1, depth)
    return table.tree(candidates + 1, depth) if np.isfinite(table.value(candidates + 1, depth)) else None


def constant_branching(counts: Sequence[int]) -> Topology:
    """RSD-C's trees: every node of depth d has `counts[d]` children (Jeon et al. 2024)."""
    level: list[tuple[int, ...]] = [()]
    paths: list[tuple[int, ...]] = []
    for count in counts:
        level = [(*path, rank) for path in level for rank in range(count)]
        paths += level
    return Topology(tuple(paths))


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


def branching_tree(acceptance: Acceptance, candidates: int, depth: int, widest: int) -> Topology | None:
    """The constantly branching tree of that many candidates with the largest expected acceptance; None for none."""
    trees = [constant_branching(counts) for counts in branchings(candidates, depth, widest)]
    return max(trees, key=lambda tree: expected_acceptance(tree, acceptance.accuracy), default=None)
