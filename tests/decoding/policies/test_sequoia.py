"""Sequoia's dynamic program against enumeration, and where its numbers come from."""

import itertools

import numpy as np
import pytest

from decoding.policies.sequoia import constant_branching, fastest_tree, measured_acceptance, sequoia_table
from decoding.trees import Topology
from models.errors import UserError

ACCEPTANCE = (0.55, 0.2, 0.1)


def expected_tokens(tree: Topology, acceptance=ACCEPTANCE) -> float:
    """1 + the sum over nodes of the probability that verification reaches them."""
    return 1 + sum(float(np.prod([acceptance[rank] for rank in path])) for path in tree.paths)


def all_trees(nodes: int, depth: int, width: int) -> list[tuple[tuple[int, ...], ...]]:
    """Every closed set of rank paths of `nodes` nodes, root included, of at most that depth and width."""
    if nodes == 1:
        return [()]
    if depth == 0:
        return []
    found = []
    for count in range(1, min(width, nodes - 1) + 1):
        for sizes in itertools.product(range(1, nodes), repeat=count):
            if sum(sizes) == nodes - 1:
                choices = [all_trees(size, depth - 1, width) for size in sizes]
                for below in itertools.product(*choices):
                    paths = [(b, *path) for b, subtree in enumerate(below) for path in ((), *subtree)]
                    found.append(tuple(paths))
    return found


@pytest.mark.parametrize(("nodes", "depth"), [(2, 1), (4, 2), (6, 2), (6, 5), (7, 3)])
def test_best_of_all_trees(nodes: int, depth: int) -> None:
    table = sequoia_table(ACCEPTANCE, nodes, depth)
    best = max(expected_tokens(Topology(paths)) for paths in all_trees(nodes, depth, len(ACCEPTANCE)))
    tree = table.tree(nodes, depth)
    assert tree.size == nodes and tree.max_depth <= depth
    assert table.value(nodes, depth) == pytest.approx(best) == pytest.approx(expected_tokens(tree))


def test_fastest_tree_weighs_depth_against_size() -> None:
    table = sequoia_table(ACCEPTANCE, 12, 5)
    deep, _ = fastest_tree(table, lambda nodes: 10 + nodes, draft_ms=0.01)
    flat, cost = fastest_tree(table, lambda nodes: 10 + nodes, draft_ms=8.0)
    assert deep.max_depth > flat.max_depth
    assert cost == pytest.approx((flat.max_depth * 8.0 + 10 + flat.size) / expected_tokens(flat))


def test_acceptance_is_read_off_the_nodes_that_were_offered() -> None:
    tree = Topology(((0,), (1,), (2,), (0, 0), (0, 1)))
    #                 root (0) (1) (2) (0,0) (0,1)
    visits = np.array([0, 50, 20, 5, 30, 10])
    assert measured_acceptance(tree, visits, steps=100) == pytest.approx([80 / 150, 30 / 150, 5 / 100])


def test_constant_branching() -> None:
    assert constant_branching([2, 1]).paths == ((0,), (1,), (0, 0), (1, 0))
    assert constant_branching([3, 2]).size == 10


@pytest.mark.parametrize("acceptance", [[0.7, 0.6], [-0.1], []])
def test_probabilities_that_are_none(acceptance: list[float]) -> None:
    with pytest.raises(UserError, match="probabilities that sum to at most 1"):
        sequoia_table(acceptance, 4, 2)


def test_impossible_sizes() -> None:
    with pytest.raises(UserError, match="no tree of 9 nodes is at most 1 deep and 3 children wide"):
        sequoia_table(ACCEPTANCE, 9, 3).tree(9, 1)
