"""Topologies against golden tables and published trees, closure errors, and files."""

import itertools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding.tree_search import best_tree
from decoding.trees import MC_SIM_7B_63, TokenTree, Topology, chain, load_topology
from models.errors import UserError

GOLDEN = Topology(((0, 0, 0), (1, 0), (0,), (0, 1), (1,), (0, 0)))


def test_golden_tree() -> None:
    assert GOLDEN.paths == ((0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0))
    assert GOLDEN.depth.tolist() == [0, 1, 1, 2, 2, 2, 3]
    assert GOLDEN.rank.tolist() == [0, 0, 1, 0, 1, 0, 0]
    assert GOLDEN.parent.tolist() == [-1, 0, 0, 1, 1, 2, 3]
    assert GOLDEN.children.tolist() == [[1, 2], [3, 4], [5, -1], [6, -1], [-1, -1], [-1, -1], [-1, -1]]
    rows = ["".join(map(str, row)) for row in GOLDEN.ancestors.astype(int)]
    assert rows == ["1000000", "1100000", "1010000", "1101000", "1100100", "1010010", "1101001"]
    assert (GOLDEN.size, GOLDEN.max_depth, GOLDEN.max_rank) == (7, 3, 2)
    assert GOLDEN.level(2).tolist() == [3, 4, 5] and GOLDEN.expanded(1).tolist() == [1, 2]


def test_order_of_paths_does_not_matter() -> None:
    assert hash(GOLDEN) == hash(Topology(tuple(reversed(GOLDEN.paths)))) and Topology(GOLDEN.paths[::-1]) == GOLDEN


def test_bare_root_and_chain() -> None:
    root = Topology(())
    assert (root.size, root.max_depth, root.max_rank) == (1, 0, 0) and root.children.tolist() == [[-1]]
    assert chain(3).parent.tolist() == [-1, 0, 1, 2] and chain(3).ancestors.sum() == 10


def test_chains_as_data_are_the_static_ones() -> None:
    """Around every power of two, where one step more is needed to carry ancestors all the way down."""
    depths = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 40]

    @jax.jit
    def grown():
        trees = []
        for depth in depths:
            row = jnp.arange(depth + 1, dtype=jnp.int32)[None]
            trees.append(TokenTree.grown(row, row - 1, row, row >= 0, 0 * row, 1, "match"))
        return trees

    for depth, tree in zip(depths, grown(), strict=True):
        assert np.array_equal(tree.ancestors[0], np.tri(depth + 1, dtype=bool)), depth
        assert np.array_equal(tree.ancestors[0], chain(depth).ancestors)
        assert np.array_equal(tree.children[0], chain(depth).children)


def test_random_trees_as_data_against_brute_force() -> None:
    """Deep ones and flat ones, with invalid nodes, whose own ranks and children's places do not count."""
    rng, batch, nodes, width = np.random.default_rng(0), 300, 33, 5
    parent, rank, valid = (np.zeros((batch, nodes), int) for _ in range(3))
    depth = np.zeros((batch, nodes), int)
    parent[:, 0], valid[:, 0] = -1, 1
    for row, node in itertools.product(range(batch), range(1, nodes)):
        # The nearest few above it, or any.
        reach = rng.integers(1, node + 1) if row % 2 else 2
        above = int(rng.integers(max(0, node - reach), node))
        younger = (valid[row] > 0) & (parent[row] == above)
        parent[row, node], depth[row, node] = above, depth[row, above] + 1
        valid[row, node] = valid[row, above] and younger.sum() < width and rng.random() < 0.95
        rank[row, node] = younger.sum() if valid[row, node] else rng.integers(width)
    # Siblings are offered in another order than that of their numbers.
    rank = np.where(valid, (rank + 2) % width, rank)
    arguments = [jnp.asarray(x, jnp.int32) for x in (rng.integers(9, size=(batch, nodes)), parent, depth)]
    tree = jax.jit(TokenTree.grown, static_argnums=(5, 6))(
        *arguments, jnp.asarray(valid > 0), jnp.asarray(rank, jnp.int32), width, "match"
    )
    ancestors, children = np.zeros((batch, nodes, nodes), bool), np.full((batch, nodes, width), -1)
    for row, node in itertools.product(range(batch), range(nodes)):
        up = node
        while up >= 0:
            ancestors[row, node, up] = True
            up = parent[row, up]
        if node and valid[row, node]:
            children[row, parent[row, node], rank[row, node]] = node
    assert np.array_equal(tree.ancestors, ancestors) and np.array_equal(tree.children, children)
    assert depth[0::2].max() > 16 and 0 < (valid[:, 1:] == 0).mean() < 0.9


def test_published_default() -> None:
    assert MC_SIM_7B_63.size == 64
    assert np.bincount(MC_SIM_7B_63.depth).tolist() == [1, 10, 28, 23, 2]
    assert int((MC_SIM_7B_63.children[:, 0] < 0).sum()) == 42
    expanded = [MC_SIM_7B_63.expanded(d) for d in range(4)]
    assert list(map(len, expanded)) == [1, 10, 10, 1]
    counts = [[int((MC_SIM_7B_63.children[node] >= 0).sum()) for node in level] for level in expanded]
    assert counts == [[10], [10, 7, 3, 2, 1, 1, 1, 1, 1, 1], [10, 3, 2, 1, 1, 1, 1, 1, 2, 1], [2]]


def test_every_published_tree_loads(shared_data: pathlib.Path) -> None:
    published = json.loads((shared_data / "fixtures" / "tree_choices.json").read_text())
    for name, tree in published.items():
        topology = load_topology(tree["choices"], name)
        assert topology.size == tree["nodes"] + 1 and topology.max_depth == tree["depth"]
        assert np.bincount(topology.depth).max() == tree["max_width"]
    for name in ("medusa/mc_sim_7b_63", "hydra/mc_sim_7b_63", "specbench_medusa/mc_sim_7b_63"):
        assert load_topology(published[name]["choices"]) == MC_SIM_7B_63


@pytest.mark.parametrize(
    ("paths", "complaint"),
    [
        (((0,), (1, 0)), r"path \[1, 0\] without its parent \[1\]"),
        (((0,), (2,)), r"path \[2\] without its better-ranked sibling \[1\]"),
        (((0,), (0, 1)), r"path \[0, 1\] without its better-ranked sibling \[0, 0\]"),
        (((0,), (0,)), r"path \[0\] twice"),
        (((0,), (-1,)), r"the path \[-1\]"),
        (((0,), ()), r"the path \[\]"),
    ],
)
def test_open_trees_are_named(paths, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        Topology(paths)


def test_check_against_heads_and_vocabulary() -> None:
    GOLDEN.check(heads=3, vocab_size=2)
    with pytest.raises(UserError, match="3 deep, but the drafter has 2 heads"):
        GOLDEN.check(heads=2, vocab_size=10)
    with pytest.raises(UserError, match="asks for 2 candidates, but the vocabulary has 1"):
        GOLDEN.check(heads=3, vocab_size=1)


def test_load_topology(tmp_path: pathlib.Path) -> None:
    assert load_topology("mc_sim_7b_63") is MC_SIM_7B_63
    assert load_topology("chain:2") == chain(2)
    file = tmp_path / "tree.json"
    file.write_text(json.dumps([list(path) for path in GOLDEN.paths]))
    assert load_topology(str(file)) == load_topology(file) == GOLDEN
    with pytest.raises(UserError, match="neither a published tree"):
        load_topology("mc_sim_8b")
    with pytest.raises(UserError, match="neither a published tree"):
        load_topology(tmp_path / "absent.json")
    file.write_text("[[0")
    with pytest.raises(UserError, match=r"tree\.json is not valid JSON"):
        load_topology(file)
    for wrong in ('{"a": 1}', "[0, 1]", '[["0"]]', "[[0.5]]"):
        file.write_text(wrong)
        with pytest.raises(UserError, match=r"tree\.json must be a list of paths"):
            load_topology(file)


@pytest.mark.parametrize("make", [chain, lambda n: best_tree(np.full((n, 1), 0.5), n)])
def test_a_mistyped_number_of_candidates_is_refused_before_they_are_made(make) -> None:
    with pytest.raises(UserError, match=r"a draft tree has at most 4096 candidates and as many levels, got 10000"):
        make(10_000)
