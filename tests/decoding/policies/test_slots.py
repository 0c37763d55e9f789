"""Trees of independent slots: the best of all trees by brute force, and JetSpec's order by its loop."""

import dataclasses
import heapq
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding.policies import Confidence, Expanding, Scores, Slots, parse_policy, read_policy
from decoding.sampling import Sampling, batch_sampling
from models.errors import UserError

VOCAB, DEPTH, ROWS = 5, 3, 5
# One block per batch row; slots of the later ones are less sure, and those of the last row of next to nothing.
LOGITS = np.random.default_rng(0).normal(size=(ROWS, DEPTH, VOCAB)) * np.array([2.0, 1.5, 0.7])[:, None]
LOGITS[-1] *= 0.02
LOGP = LOGITS - np.log(np.exp(LOGITS).sum(axis=-1, keepdims=True))
ROOTS = jnp.array([2, 0, 4, 1, 3])
WARM = batch_sampling([Sampling(temperature=1.0)] * ROWS)

pytestmark = pytest.mark.usefixtures("x64")


class Block:
    """A block network; `tokens` are those of its outputs."""

    vocab_size = VOCAB

    def __init__(self, tokens=None):
        self.tokens = tokens

    def begin(self, root, slots):
        return self.slot(root[:, None], 0), ()

    def extend(self, scratch, level, at, tokens, parents, seen):
        return self.slot(tokens, level), ()

    def slot(self, tokens, level):
        row = jnp.zeros((1, tokens.shape[1]), jnp.int32)
        return Scores(jnp.asarray(LOGITS)[:, level, None], row, self.tokens)


def grown(policy, network=None):
    """The tree, with arrays as NumPy, and the slot of every node."""
    tree, slots, _ = jax.jit(lambda: policy.grow(network or Block(), ROOTS, None, WARM))()
    names = ("tokens", "parent", "depth", "valid", "children")
    return types.SimpleNamespace(**{name: np.asarray(getattr(tree, name)) for name in names}), np.asarray(slots)


def paths(tree, row: int) -> list[tuple[int, ...]]:
    """Of the candidates, in the order of nodes, the root left out."""
    found = [()]
    for node in range(1, tree.tokens.shape[1]):
        found.append((*found[tree.parent[row, node]], int(tree.tokens[row, node])))
        assert tree.depth[row, node] == len(found[-1]) and tree.valid[row, node]
        assert node in tree.children[row, tree.parent[row, node]]
    return found[1:]


def worth(row: int, path) -> float:
    return sum(LOGP[row, slot, token] for slot, token in enumerate(path))


@pytest.mark.parametrize("total", [2, 5, 9, 40, 100])
def test_no_tree_is_worth_more_than_the_best_candidates(total: int) -> None:
    tree, slots = grown(Slots(DEPTH, total))
    for row in range(ROWS):
        every = [p for depth in range(1, DEPTH + 1) for p in itertools.product(range(VOCAB), repeat=depth)]
        best = sorted(every, key=lambda path, row=row: -worth(row, path))[: total - 1]
        found = paths(tree, row)
        assert set(found) == set(best) and len(found) == total - 1
        # No set of candidates, tree or not, has a larger sum of probabilities, the expected accepted tokens.
        ran = {path: slots[row, 1 + i] for i, path in enumerate(found) if slots[row, 1 + i] >= 0}
        chain = tuple(np.argmax(LOGP[row], axis=-1).tolist())
        assert ran == {chain[:d]: d for d in range(1, DEPTH) if chain[:d] in found} and slots[row, 0] == 0
    assert all(np.diff([worth(0, p) for p in paths(tree, 0) if len(p) == 1]) < 0)


def test_it_is_a_tree_by_confidence_whose_levels_are_as_wide_as_the_tree() -> None:
    total = 9
    ours, theirs = (grown(policy)[0] for policy in (Slots(DEPTH, total), Confidence(VOCAB, DEPTH, total)))
    assert all(set(paths(ours, row)) == set(paths(theirs, row)) for row in range(ROWS))


@pytest.mark.parametrize(("width", "total"), [(2, 9), (3, 12), (5, 31)])
def test_expansion_is_jetspecs_loop(width: int, total: int) -> None:
    tree, slots = grown(Expanding(DEPTH, total, width))
    order = np.argsort(-LOGP, axis=-1)
    for row in range(ROWS):
        nodes, heap = [()], [(0.0, 0)]
        while len(nodes) < total:
            value, oldest = heapq.heappop(heap)
            path = nodes[oldest]
            if len(path) == DEPTH:
                continue
            for rank in range(min(width, total - len(nodes))):
                token = int(order[row, len(path), rank])
                heapq.heappush(heap, (value - LOGP[row, len(path), token], len(nodes)))
                nodes.append((*path, token))
        assert paths(tree, row) == nodes[1:]
        best = [path == tuple(order[row, : len(path), 0]) and len(path) < DEPTH for path in nodes]
        assert slots[row].tolist() == [len(path) if ran else -1 for path, ran in zip(nodes, best, strict=True)]


def test_outputs_may_be_tokens_of_any_kind() -> None:
    names = jnp.array([7, 3, 11, 0, 5])
    for policy in (Slots(DEPTH, 9), Expanding(DEPTH, 9, 3)):
        ours, theirs = grown(policy), grown(policy, Block(names))
        assert np.array_equal(np.asarray(names)[ours[0].tokens[:, 1:]], theirs[0].tokens[:, 1:])


def test_a_network_whose_guesses_depend_on_the_path_is_refused() -> None:
    class Bigrams(Block):
        def slot(self, tokens, level):
            return Scores(jnp.asarray(LOGITS)[:, level, None])

    with pytest.raises(UserError, match="depend on the path, for which there is the policy 'confidence'"):
        grown(Slots(DEPTH, 9), Bigrams())


@pytest.mark.parametrize(("candidates", "depths"), [pytest.param(1, (1, 1, 1), marks=pytest.mark.slow), (2, (2, 1, 2))])
def test_small_budgets_read_no_slots_that_they_cannot_use(candidates: int, depths: tuple[int, ...]) -> None:
    whole = (Slots(DEPTH, 16), Expanding(DEPTH, 16, 3), Confidence(VOCAB, DEPTH, 16))
    for policy, depth in zip(whole, depths, strict=True):
        fitted = policy.with_budget(candidates)
        assert fitted is not None and fitted.max_depth == depth and fitted.max_nodes == candidates + 1
        assert fitted.slots <= policy.slots and fitted.with_budget(candidates) == fitted
        deep, flat = (grown(one)[0] for one in (dataclasses.replace(policy, total=candidates + 1), fitted))
        assert all(paths(deep, row) == paths(flat, row) for row in range(ROWS))


def test_records_and_budgets() -> None:
    policy = parse_policy("slots:depth=3,total=9")
    assert policy == Slots(3, 9) == read_policy(policy.to_record(), "policy", "here")
    assert policy.with_budget(20) == Slots(3, 21) and policy.levels == (1, 1, 1) and policy.rule(False) == "point"
    assert parse_policy("accum_logp:depth=2,total=6,width=2") == Expanding(2, 6, 2)
    assert Expanding(2, 6, 2).with_budget(7) is None
    for wrong, words in (
        ("slots:depth=0", "depth and a width of at least 1, got 0"),
        ("slots:total=1", "total must lie in 2"),
        ("slots:total=5000000", "a draft tree has at most 4096 candidates and as many levels, got 4999999"),
        ("accum_logp:depth=100000,total=64", "a draft tree has at most 4096 candidates and as many levels, got 100000"),
        ("accum_logp:depth=2,total=8,width=2", "makes 6 candidates: total must lie in 2..7, got 8"),
    ):
        with pytest.raises(UserError, match=words):
            parse_policy(wrong)
    with pytest.raises(UserError, match="the 7 best of 5 tokens"):
        Expanding().check(5)
