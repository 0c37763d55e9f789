"""Accuracies are counted right; every search finds the best of all trees; the walk steps as the loop does."""

import itertools
import math

import numpy as np
import pytest

from decoding.stats import Stats
from decoding.tree_search import (
    Acceptance,
    best_tree,
    branching_tree,
    branchings,
    constant_branching,
    expected_acceptance,
    greedy_search,
    nested_trees,
    probing_tree,
    sequoia_table,
    sequoia_tree,
    walk,
)
from decoding.trees import Topology, chain, from_child_counts
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


def counts(tree: Topology, steps: int, accepted: dict[tuple[int, ...], int]) -> Stats:
    by_node = np.array([0, *(accepted.get(path, 0) for path in tree.paths)])
    by_depth = np.bincount(tree.depth, by_node, tree.max_depth + 1)[1:].astype(int)
    return Stats(steps, steps + int(by_node.sum()), by_depth, by_node)


def test_accuracy_is_hits_over_visits_of_every_depth_and_rank() -> None:
    tree = from_child_counts({(): 2, (0,): 2, (1,): 1})
    stats = counts(tree, 10, {(0,): 6, (1,): 2, (0, 0): 3, (0, 1): 1, (1, 0): 2})
    # Depth 2, rank 0: 3 + 2 of the 6 + 2 visits to the parents; rank 1 is offered below the first alone.
    assert Acceptance.counted(tree, stats).accuracy.tolist() == [[0.6, 0.2], [5 / 8, 1 / 6]]
    assert Acceptance.counted(chain(2), counts(chain(2), 4, {})).accuracy.tolist() == [[0.0], [0.0]]


def test_acceptance_by_rank_is_read_off_the_nodes_that_were_offered() -> None:
    tree = Topology(((0,), (1,), (2,), (0, 0), (0, 1)))
    stats = counts(tree, 100, {(0,): 50, (1,): 20, (2,): 5, (0, 0): 30, (0, 1): 10})
    assert Acceptance.counted(tree, stats).by_rank == pytest.approx([80 / 150, 30 / 150, 5 / 100])


def test_accuracy_of_ranks() -> None:
    ranks = np.array([[0, 0, 1, 4], [4, 4, 4, 2]])
    assert Acceptance.of_ranks(ranks, 4).accuracy.tolist() == [[0.5, 0.25, 0, 0], [0, 0, 0.25, 0]]


def test_sequoia_and_constant_branching_fit_a_budget_or_say_that_nothing_does() -> None:
    tree = Topology(((0,), (1,), (0, 0)))
    acceptance = Acceptance.counted(tree, counts(tree, 100, {(0,): 60, (1,): 30, (0, 0): 50}))
    # Rank 0 is right in 110 of 160, rank 1 in 30 of 100: a second level under the first child is worth 0.47.
    assert sequoia_tree(acceptance, 2, 2) == chain(2)
    assert sequoia_tree(acceptance, 7, 2) is None, "two levels of two children hold six"
    # By depth and rank: 0.6 + 0.3 side by side, 0.6 + 0.6 * 5/6 below each other.
    assert branching_tree(acceptance, 2, 2, 2) == chain(2)
    assert branching_tree(acceptance, 5, 2, 2) is None


def test_nested_trees_reach_every_depth_and_hold_nothing_hopeless() -> None:
    trees = nested_trees(np.array([[0.5, 0.0], [0.2, 0.1]]), 4)
    assert [tree.paths for tree in trees] == [((0,),), ((0,), (0, 0)), ((0,), (0, 0), (0, 1))]


def closed_trees(depths: int, ranks: int, size: int) -> list[Topology]:
    every = [path for d in range(1, depths + 1) for path in itertools.product(range(ranks), repeat=d)]
    trees = []
    for paths in itertools.combinations(every, size):
        try:
            trees.append(Topology(paths))
        except UserError:
            continue
    return trees


@pytest.mark.parametrize("seed", range(4))
def test_greedy_search_finds_the_best_tree(seed: int) -> None:
    accuracy = -np.sort(-np.random.default_rng(seed).dirichlet(np.ones(4), size=2), axis=1)[:, :3]
    found = greedy_search(accuracy, 6)
    for size in range(1, 7):
        tree = Topology(tuple(path for path, _ in found[:size]))
        best = max(expected_acceptance(other, accuracy) for other in closed_trees(2, 3, size))
        assert math.isclose(expected_acceptance(tree, accuracy), best, rel_tol=1e-12)
        assert math.isclose(expected_acceptance(tree, accuracy), 1 + sum(score for _, score in found[:size]))
    assert [score for _, score in found] == sorted((score for _, score in found), reverse=True)


def test_greedy_search_ends_when_nothing_is_left() -> None:
    assert len(greedy_search(np.array([[0.5, 0.0], [0.2, 0.1]]), 100)) == 6


def test_best_tree_has_the_size_and_no_tree_of_it_expects_more() -> None:
    accuracy = np.array([[0.6, 0.2, 0.1], [0.5, 0.25, 0.05]])
    assert best_tree(accuracy, 3) == Topology(((0,), (0, 0), (1,)))
    for candidates in range(1, 12):
        tree = best_tree(accuracy, candidates)
        assert len(tree.paths) == candidates
        rivals = [from_child_counts({(): 3}), from_child_counts({(): 2, (0,): 2, (1,): 2}), chain(2)]
        for rival in rivals:
            if len(rival.paths) == candidates:
                assert expected_acceptance(tree, accuracy) >= expected_acceptance(rival, accuracy)
    assert best_tree(accuracy, 13) is None, "two depths of three ranks hold twelve"


def test_probing_tree_is_wide_and_deep() -> None:
    for depth in (1, 4, 6):
        tree = probing_tree(depth)
        assert tree.max_depth == depth and len(tree.paths) == min(128, 10**depth)
        assert tree.rank[tree.level(1)].max() == 9
    assert tree.rank[tree.level(3)].max() >= 3


def test_branchings_are_all_and_exact() -> None:
    assert sorted(branchings(6, 2, 6)) == [(1, 5), (2, 2), (3, 1), (6,)]
    assert all(len(counts) <= 3 and max(counts) <= 4 for counts in branchings(16, 3, 4))


def test_walk_starts_where_the_last_step_ended() -> None:
    # Depth 1 is right at places 0, 1, 3; depth 2 at 0 and 3. By rank 1 place 4 is right at depth 1.
    ranks = np.array([[0, 0, 9, 0, 1, 9], [0, 9, 9, 0, 9, 9]])
    # Steps with the chain: place 0 accepts two (to 3), 3 accepts two (to 6): two steps, six tokens.
    assert walk([ranks], chain(2)) == 3.0
    # With one guess: 0 -> 2 -> 3 -> 5 -> 6.
    assert walk([ranks], chain(1)) == 6 / 4
    # A second choice at depth 1 changes nothing here, because no step starts at place 4.
    assert walk([ranks], Topology(((0,), (1,), (0, 0)))) == 3.0
    assert walk([ranks[:, 4:]], Topology(((0,), (1,)))) == 2 / 1


def test_bare_root_commits_one_token_a_step() -> None:
    assert walk([np.zeros((2, 5), np.int64)], Topology(())) == 1.0


@pytest.mark.parametrize(("nodes", "depth"), [(2, 1), (4, 2), (6, 2), (6, 5), (7, 3)])
def test_best_of_all_trees(nodes: int, depth: int) -> None:
    table = sequoia_table(ACCEPTANCE, nodes, depth)
    best = max(expected_tokens(Topology(paths)) for paths in all_trees(nodes, depth, len(ACCEPTANCE)))
    tree = table.tree(nodes, depth)
    assert tree.size == nodes and tree.max_depth <= depth
    assert table.value(nodes, depth) == pytest.approx(best) == pytest.approx(expected_tokens(tree))


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
