"""Sequoia's trees: the topology with the most expected tokens, by dynamic programming (Chen et al. 2024, section 3.1).

The model of acceptance is positional: when verification stands at a node, its b-th child is the accepted one with
probability a[b], whatever the node and the depth. Then a tree's expected tokens are a sum over children of a[b] times
those of the child's subtree, and the best tree of m nodes is made of best subtrees. The result is a `Topology`, to be
grown as `Static(tree, draws="without")`.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Int

from decoding.trees import Topology
from models.errors import UserError


@dataclasses.dataclass(frozen=True)
class SequoiaTable:
    """Best expected tokens per target forward, for every size and depth.

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


def fastest_tree(table: SequoiaTable, target_ms: Callable[[int], float], draft_ms: float) -> tuple[Topology, float]:
    """The tree with the least time per token, (levels x draft + target(nodes)) / expected tokens, and that time.

    Args:
      table: of `sequoia_table`.
      target_ms: the target's forward on that many rows, in milliseconds.
      draft_ms: one pass of the draft network, in milliseconds.
    """
    sizes, depths = table.expected.shape[0] - 1, table.expected.shape[1] - 1

    def cost(size: tuple[int, int]) -> float:
        nodes, depth = size
        value = table.value(nodes, depth)
        return (depth * draft_ms + target_ms(nodes)) / value if np.isfinite(value) else np.inf

    best = min(((nodes, depth) for nodes in range(2, sizes + 1) for depth in range(1, depths + 1)), key=cost)
    return table.tree(*best), cost(best)


def measured_acceptance(tree: Topology, accepted_by_node: Int[np.ndarray, "N"], steps: int) -> Float[np.ndarray, "C"]:
    """a[b] from a decode with `tree`: of the visits to nodes with at least b children, those that went to the b-th.

    Args:
      tree: its widest node decides C.
      accepted_by_node: `Stats.accepted_by_node`.
      steps: `Stats.steps`.
    """
    visits = np.array(accepted_by_node, np.float64)
    visits[0] = steps
    hits, tries = np.zeros(tree.children.shape[1]), np.zeros(tree.children.shape[1])
    for node, children in enumerate(tree.children):
        for b, child in enumerate(children[children >= 0]):
            hits[b] += visits[child]
            tries[b] += visits[node]
    return np.divide(hits, tries, out=np.zeros_like(hits), where=tries > 0)


def constant_branching(counts: Sequence[int]) -> Topology:
    """RSD-C's trees: every node of depth d has `counts[d]` children (Jeon et al. 2024)."""
    level: list[tuple[int, ...]] = [()]
    paths: list[tuple[int, ...]] = []
    for count in counts:
        level = [(*path, rank) for path in level for rank in range(count)]
        paths += level
    return Topology(tuple(paths))
