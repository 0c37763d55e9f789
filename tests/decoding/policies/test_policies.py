"""Tree policies against plain references: which candidates, in which order, drawn from what.

The network here is a table from paths to distributions, so that every policy can be recomputed in NumPy.
"""

import dataclasses
import heapq
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding.policies import Confidence, DySpec, Scores, Static, StochasticBeam, TreePolicy
from decoding.policies.policy import Grown, gumbel_for
from decoding.policies.rsd import condition_maximum
from decoding.sampling import Sampling, batch_sampling
from decoding.tree_search import constant_branching
from decoding.trees import chain
from tests.decoding.drafter_cases import LOPSIDED

VOCAB, DEPTH = 5, 4
ROOTS = jnp.array([2, 0, 4])
WARM, GREEDY = (batch_sampling([Sampling(temperature=t)] * 3) for t in (1.0, 0.0))
KEYS = jax.vmap(jax.random.key)(jnp.arange(3))

pytestmark = pytest.mark.usefixtures("x64")


def seed_of(path) -> int:
    """A number for each path."""
    return sum((token + 1) * 7**place for place, token in enumerate(path))


def table(path) -> np.ndarray:
    """Logits after a path of tokens, the root first."""
    return 1.5 * np.random.default_rng(seed_of(path)).normal(size=VOCAB)


def softmax(x) -> np.ndarray:
    """Probabilities of a vector of logits."""
    e = np.exp(x - np.max(x))
    return e / e.sum()


# The table, by the seed of the path.
SCORES = np.zeros((7 ** (DEPTH + 1), VOCAB))
for _length in range(1, DEPTH + 2):
    for _path in itertools.product(range(VOCAB), repeat=_length):
        SCORES[seed_of(_path)] = table(_path)


@dataclasses.dataclass
class Table:
    """A draft network that knows its own past: it finds each row's path from what the row sees.

    Its scratch is what it was told of every slot: token, depth (-1 for one that did not run), parent, seen slots.
    """

    vocabulary: jax.Array | None = None
    vocab_size: int = VOCAB

    def begin(self, root, slots):
        empty = jnp.full((len(root), slots), -1)
        seen = jnp.zeros((len(root), slots, slots), bool)
        scratch = empty.at[:, 0].set(root), empty.at[:, 0].set(0), empty, seen
        return Scores(jnp.asarray(SCORES)[root + 1][:, None], tokens=self.vocabulary), scratch

    def extend(self, scratch, level, at, tokens, parents, seen):
        rows = (len(scratch[0]), tokens.shape[1])
        told = (
            *(jnp.broadcast_to(x, rows) for x in (tokens, level, parents)),
            jnp.broadcast_to(seen, (*rows, seen.shape[2])),
        )
        scratch = tuple(
            jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), at, 1)
            for old, new in zip(scratch, told, strict=True)
        )
        slot_tokens, depths, _, _ = scratch
        above = jnp.sum(jnp.where(told[3], ((slot_tokens + 1) * 7**depths)[:, None], 0), axis=-1)
        logits = jnp.asarray(SCORES)[above + (told[0] + 1) * 7 ** told[1]]
        return Scores(logits, tokens=self.vocabulary), scratch


def check_told(scratch) -> None:
    """Every slot that ran sees exactly its ancestors, of which its parent is the last."""
    _, depths, parents, seen = map(np.asarray, scratch)
    for b, slot in zip(*np.nonzero(depths > 0), strict=True):
        above = sorted(np.flatnonzero(seen[b, slot]), key=lambda s: depths[b, s])
        assert [depths[b, s] for s in above] == list(range(depths[b, slot]))
        assert parents[b, slot] == above[-1]


POLICIES = {
    "chain": Static(chain(DEPTH)),
    "lopsided top": Static(LOPSIDED, "top"),
    "lopsided without": Static(LOPSIDED, "without"),
    "lopsided with": Static(LOPSIDED, "with"),
    "beam": StochasticBeam(3, DEPTH),
    "wide beam": StochasticBeam(7, 3),
    "dyspec": DySpec(9, DEPTH, 6, 5),
    "dyspec threshold": DySpec(40, DEPTH, 8, 5, threshold=0.07),
    "confidence": Confidence(3, DEPTH, 14),
}
each_policy = pytest.mark.parametrize("name", POLICIES)


def grow(policy: TreePolicy, sampling=WARM) -> tuple[types.SimpleNamespace, np.ndarray]:
    """What it makes, arrays as NumPy; kept, since many tests look at the same trees."""
    if (policy, id(sampling)) not in MADE:
        MADE[policy, id(sampling)] = _grow(policy, sampling)
    return MADE[policy, id(sampling)]


MADE: dict = {}


def _grow(policy: TreePolicy, sampling) -> tuple[types.SimpleNamespace, np.ndarray]:
    tree, slot_of_node, scratch = grown_by(policy, Table(), ROOTS, KEYS, sampling)
    check_told(scratch)
    whole = {
        f.name: np.broadcast_to(np.asarray(x), (3, *x.shape[1:]))
        for f in dataclasses.fields(tree)
        if hasattr(x := getattr(tree, f.name), "shape")
    }
    return types.SimpleNamespace(**whole, rule=tree.rule), np.broadcast_to(slot_of_node, whole["tokens"].shape)


def grown_by(policy: TreePolicy, network, *arguments) -> Grown:
    """What a policy makes of a network, in one program that is traced afresh."""
    return jax.jit(lambda *arguments: policy.grow(network, *arguments))(*arguments)


def path_of(tree: types.SimpleNamespace, b: int, node: int) -> list[int]:
    path = []
    while node >= 0:
        path.append(int(tree.tokens[b, node]))
        node = int(tree.parent[b, node])
    return path[::-1]


@each_policy
@pytest.mark.parametrize("sampling", [WARM, GREEDY], ids=["warm", "greedy"])
def test_tree_is_sound(name: str, sampling) -> None:
    policy = POLICIES[name]
    tree, slots = grow(policy, sampling)
    assert tree.tokens.shape == (3, policy.max_nodes)
    for b in range(3):
        assert tree.tokens[b, 0] == ROOTS[b] and tree.parent[b, 0] == -1 and tree.valid[b, 0] and slots[b, 0] == 0
        for node in range(1, policy.max_nodes):
            parent = tree.parent[b, node]
            assert 0 <= parent < node
            seen = {node, *itertools.chain([parent], np.flatnonzero(tree.ancestors[b, parent]))}
            assert set(np.flatnonzero(tree.ancestors[b, node])) == seen
            if tree.valid[b, node]:
                assert tree.valid[b, parent] and tree.depth[b, node] == tree.depth[b, parent] + 1
                assert tree.depth[b, node] <= policy.max_depth
                assert slots[b, parent] >= 0, "a parent ran"
                assert node in tree.children[b, parent]
        for node in range(policy.max_nodes):
            children = tree.children[b, node][tree.children[b, node] >= 0]
            assert all(tree.parent[b, child] == node for child in children)
            tokens = tree.tokens[b, children][tree.valid[b, children]]
            if tree.rule != "iid":
                assert len(set(tokens.tolist())) == len(tokens)
    assert (tree.rule == "point") == (sampling.greedy or policy in (POLICIES["lopsided top"], POLICIES["confidence"]))
    assert slots.max() < policy.slots


def test_greedy_rows_among_sampled_ones_take_the_best_once_each() -> None:
    """Drawn with replacement, where nothing is drawn, all children of a node would be one token."""
    mixed = batch_sampling([Sampling(), Sampling(temperature=1.0), Sampling()])
    (tree, _), (ranked, _) = grow(POLICIES["lopsided with"], mixed), grow(POLICIES["lopsided with"], GREEDY)
    assert tree.rule == "iid" and ranked.rule == "point"
    np.testing.assert_array_equal(tree.tokens[[0, 2]], ranked.tokens[[0, 2]])
    for node, children in enumerate(tree.children[0]):
        held = tree.tokens[0, children[children >= 0]]
        assert len(set(held.tolist())) == len(held), node


@pytest.mark.parametrize("name", [n for n in POLICIES if n not in ("lopsided top", "confidence")])
def test_proposals_are_the_networks_own_distributions(name: str) -> None:
    tree, _ = grow(POLICIES[name])
    for b in range(3):
        for node in range(tree.tokens.shape[1]):
            if tree.valid[b, node] and (tree.children[b, node] >= 0).any():
                expected = softmax(table(path_of(tree, b, node)))
                proposal = tree.proposals[b, tree.proposal_of[b, node]]
                np.testing.assert_allclose(proposal, expected, rtol=1e-9)


@pytest.mark.parametrize("name", ["lopsided top", "confidence"])
def test_ranked_children_are_the_best_in_order(name: str) -> None:
    tree, _ = grow(POLICIES[name])
    for b in range(3):
        for node in range(tree.tokens.shape[1]):
            children = [c for c in tree.children[b, node] if c >= 0 and tree.valid[b, c]]
            best = np.argsort(-table(path_of(tree, b, node)))[: len(children)]
            assert tree.tokens[b, children].tolist() == best.tolist()


def test_siblings_without_replacement_follow_the_rule_of_successive_draws() -> None:
    """P(x1, x2) = q(x1) q(x2) / (1 - q(x1)), counted over many keys."""
    stats = pytest.importorskip("scipy.stats")
    rows = 20_000
    keys, roots = jax.vmap(jax.random.key)(jnp.arange(rows)), jnp.full(rows, 2)
    sampling = batch_sampling([Sampling(temperature=1.0)] * rows)

    class Fixed(Table):
        def begin(self, root, slots):
            return Scores(jnp.broadcast_to(jnp.array(table([2])), (rows, 1, VOCAB))), None

    q = softmax(table([2]))
    rule = np.array([[0 if x == y else q[x] * q[y] / (1 - q[x]) for y in range(VOCAB)] for x in range(VOCAB)])
    for policy in (Static(constant_branching([2])), StochasticBeam(2, 1), DySpec(2, 1, 2, 2)):
        tree = grown_by(policy, Fixed(), roots, keys, sampling).tree
        pairs = np.asarray(tree.tokens)[:, 1:]
        counts = np.zeros((VOCAB, VOCAB))
        np.add.at(counts, tuple(pairs.T), 1)
        assert counts[rule == 0].sum() == 0
        assert stats.chisquare(counts[rule > 0], rule[rule > 0] * rows).pvalue > 1e-4, policy


FEW = 0.6 * np.random.default_rng(8).normal(size=(3, 3))


@dataclasses.dataclass(frozen=True)
class Bigrams:
    """A draft network for many rows at once: what follows a token depends on that token alone."""

    logits: np.ndarray

    @property
    def vocab_size(self):
        return len(self.logits)

    def begin(self, root, slots):
        return Scores(jnp.asarray(self.logits)[root][:, None]), ()

    def extend(self, scratch, level, at, tokens, parents, seen):
        return Scores(jnp.asarray(self.logits)[tokens]), ()


MANY = 30_000


def grow_many(policy: TreePolicy, network=None):
    """Trees of many keys below the root 1, compiled afresh: their tokens, parents and depths."""
    sampling = batch_sampling([Sampling(temperature=1.0)])
    sampling = jax.tree.map(lambda setting: jnp.broadcast_to(setting, (MANY,)), sampling)
    keys = jax.vmap(jax.random.key)(jnp.arange(MANY))

    @jax.jit
    def grown():
        tree = policy.grow(network or Bigrams(FEW), jnp.full(MANY, 1), keys, sampling).tree
        return tree.tokens, tree.parent, tree.depth

    return [np.broadcast_to(x, (MANY, x.shape[1])) for x in grown()]


def p_value_of(columns: np.ndarray, shares: np.ndarray) -> float:
    """Of Pearson's test of how often each row of `columns` `[rows, places]` occurs; 0 where one is impossible."""
    stats = pytest.importorskip("scipy.stats")
    counts = np.zeros(shares.shape)
    np.add.at(counts, tuple(columns.T), 1)
    assert np.isclose(shares.sum(), 1) and (shares[shares > 0] * MANY > 5).all()
    if counts[shares == 0].any():
        return 0.0
    return float(stats.chisquare(counts[shares > 0], shares[shares > 0] * MANY).pvalue)


def beam_p_value() -> float:
    """RSD-S of two sequences of two tokens against draws of whole sequences without replacement, the better one first.

    P(s, t) = P(s) P(t) / (1 - P(s)) (Kool et al. 2019): what conditioning on the parent's score is for.
    """
    tokens, parent, _ = grow_many(StochasticBeam(2, 2))
    last = np.array([3, 4])
    above = np.take_along_axis(tokens, parent[:, last], axis=1)
    found = 3 * above + tokens[:, last]
    q = np.array([softmax(row) for row in FEW])
    of_sequence = (q[1][:, None] * q).ravel()
    shares = of_sequence[:, None] * of_sequence / (1 - of_sequence[:, None])
    np.fill_diagonal(shares, 0)
    return p_value_of(found, shares)


def test_a_beam_is_sequences_without_replacement(monkeypatch: pytest.MonkeyPatch) -> None:
    """On 30,000 keys, at p > 1e-4; without the conditioning, or with the parent's score alone, far below."""
    assert beam_p_value() > 1e-4
    monkeypatch.setattr("decoding.policies.rsd.condition_maximum", lambda scores, maximum: scores)
    assert beam_p_value() < 1e-12
    monkeypatch.setattr(
        "decoding.policies.rsd.condition_maximum", lambda scores, maximum: jnp.minimum(scores, maximum[:, :, None])
    )
    assert beam_p_value() < 1e-12


@pytest.mark.parametrize("draws", ["without", "with"])
def test_levels_and_branches_are_drawn_apart(draws: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two children and one below each: the joint distribution is the product, and with shared noise it is not."""
    q = np.array([softmax(row) for row in FEW])
    first = q[1][:, None] * q[1]
    if draws == "without":
        first = first / (1 - q[1][:, None]) * (1 - np.eye(3))
    shares = np.einsum("ab,ac,bd->abcd", first, q, q)
    policy = Static(constant_branching([2, 1]), draws)
    assert p_value_of(grow_many(policy)[0][:, 1:], shares) > 1e-4

    def of_one_level(keys, sampling, level, shape, dtype):
        return gumbel_for(keys, sampling, 0, shape, dtype)

    def of_one_row(keys, sampling, level, shape, dtype):
        return jnp.broadcast_to(gumbel_for(keys, sampling, level, (1, *shape[1:]), dtype), (len(keys), *shape))

    for shared in (of_one_level, of_one_row):
        monkeypatch.setattr("decoding.policies.static.gumbel_for", shared)
        assert p_value_of(grow_many(policy)[0][:, 1:], shares) < 1e-12, shared


def test_a_budget_for_every_place_is_sampled_siblings() -> None:
    """DySpec that leaves no place out draws what a static tree of its branching draws."""
    q = np.array([softmax(row) for row in FEW])
    first = q[1][:, None] * q[1] / (1 - q[1][:, None]) * (1 - np.eye(3))
    second = q[:, :, None] * q[:, None] / (1 - q[:, :, None]) * (1 - np.eye(3))
    tokens, parent, depth = grow_many(DySpec(budget=6, depth=2, width=2, branch=2))
    assert (depth == [0, 1, 1, 2, 2, 2, 2]).all() and (np.sort(parent[:, 3:]) == [1, 1, 2, 2]).all()
    # Those below the likelier of the two come first.
    order = np.pad(3 + np.argsort(parent[:, 3:], axis=1, kind="stable"), ((0, 0), (3, 0)))
    tokens = np.where(np.arange(7) < 3, tokens, np.take_along_axis(tokens, order, axis=1))
    for below, of in ((slice(3, 5), 0), (slice(5, 7), 1)):
        shares = np.einsum("ab,xcd->abcdx", first, second)
        shares = np.stack([[shares[a, b, :, :, (a, b)[of]] for b in range(3)] for a in range(3)])
        assert p_value_of(np.concatenate([tokens[:, 1:3], tokens[:, below]], axis=1), shares) > 1e-4


@pytest.mark.parametrize("name", [n for n in POLICIES if n not in ("lopsided top", "confidence")])
def test_each_row_draws_from_its_own_key(name: str) -> None:
    """Rows of one key and root draw alike wherever they stand, those of other keys otherwise."""
    network, sampling = (
        Bigrams(np.array([table([token]) for token in range(VOCAB)])),
        batch_sampling([Sampling(1.0)] * 6),
    )
    tokens_of = jax.jit(lambda keys: POLICIES[name].grow(network, jnp.full(6, 2), keys, sampling).tree.tokens)

    def drawn(seeds: list[int]) -> list:
        return tokens_of(jax.vmap(jax.random.key)(jnp.array(seeds))).tolist()

    seeds = [5, 6, 7, 5, 8, 7]
    trees = drawn(seeds)
    of_seed = dict(zip(seeds, trees, strict=True))
    assert trees == [of_seed[seed] for seed in seeds] == drawn(seeds[::-1])[::-1]
    assert len({tuple(tree) for tree in of_seed.values()}) == 4


def test_beam_of_one_is_a_sampled_chain_and_of_all_enumerates() -> None:
    beam, _ = grow(StochasticBeam(1, DEPTH))
    sampled, _ = grow(Static(chain(DEPTH)))
    np.testing.assert_array_equal(beam.tokens, sampled.tokens)
    whole, _ = grow(StochasticBeam(VOCAB**2, 2))
    for b in range(3):
        deep = [tuple(path_of(whole, b, n)) for n in range(whole.tokens.shape[1]) if whole.valid[b, n]]
        assert sorted(path[1:] for path in deep if len(path) == 3) == sorted(itertools.product(range(VOCAB), repeat=2))
        assert sum(len(path) == 2 for path in deep) == VOCAB


def test_conditioned_maximum_is_inherited_exactly_and_order_stays() -> None:
    g = -jnp.sort(-jax.random.gumbel(jax.random.key(0), (2, 3, 50), jnp.float32), axis=2)
    maximum = jnp.array([[0.5, -2.0, 7.0], [-30.0, 0.0, 1e-3]], jnp.float32)
    conditioned = np.asarray(condition_maximum(g, maximum))
    assert np.array_equal(conditioned[:, :, 0], maximum)
    assert (np.diff(conditioned, axis=2) <= 0).all() and np.isfinite(conditioned).all()
    assert (np.diff(conditioned, axis=2)[0] < 0).all()


def heap_dyspec(policy: DySpec, b: int, budget: int) -> list[tuple[tuple[int, ...], float]]:
    """DySpec as a heap of places (section 3), with the noise that the policy draws: popped (path, value), in order.

    The noise is that of the frontier row where the policy ran the node, which depends on the policy; so this follows a
    network whose rows all draw with the same noise.
    """
    noise = [np.asarray(gumbel_for(KEYS, WARM, level, (1, VOCAB), jnp.float64))[b, 0] for level in range(1, DEPTH + 1)]
    heap, popped = [(-1.0, 0, (int(ROOTS[b]),), 0)], []
    ticket = itertools.count(1)
    while heap and len(popped) < budget:
        value, _, path, rank = heapq.heappop(heap)
        q = softmax(table(path))
        order = np.argsort(-(np.log(q) + noise[len(path) - 1]), kind="stable")
        left = 1 - q[order[:rank]].sum()
        x = int(order[rank])
        popped.append(((*path, x), -value))
        if rank + 1 < VOCAB:
            heapq.heappush(heap, (value * (left - q[x]) / left, next(ticket), path, rank + 1))
        if len(path) < DEPTH:
            heapq.heappush(heap, (value * q[x] / left, next(ticket), (*path, x), 0))
    return popped


@pytest.mark.parametrize("budget", [5, pytest.param(30, marks=pytest.mark.slow)])
def test_dyspec_by_level_by_threshold_and_by_heap_choose_the_same_places(
    budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shared(keys, sampling, level, shape, dtype):
        return jnp.broadcast_to(gumbel_for(keys, sampling, level, (1, shape[1]), dtype), (len(keys), *shape))

    monkeypatch.setattr("decoding.policies.dyspec.gumbel_for", shared)
    greedy = DySpec(budget, DEPTH, 40, VOCAB)
    tree, _ = _grow(greedy, WARM)
    for b in range(3):
        popped = heap_dyspec(greedy, b, budget + 1)
        values = [value for _, value in popped]
        assert (np.diff(values) < 1e-12).all(), "values never rise in the order popped"
        wanted = {path for path, _ in popped[:budget]}
        ours = {tuple(path_of(tree, b, n)) for n in range(1, budget + 1) if tree.valid[b, n]}
        assert ours == wanted
        threshold = (values[budget - 1] + values[budget]) / 2
        by_threshold, _ = _grow(dataclasses.replace(greedy, budget=60, threshold=threshold), WARM)
        count = by_threshold.valid[b].sum()
        assert {tuple(path_of(by_threshold, b, n)) for n in range(1, 61) if by_threshold.valid[b, n]} == wanted
        assert count == budget + 1


@pytest.mark.parametrize("sampling", [pytest.param(GREEDY, marks=pytest.mark.slow), WARM], ids=["greedy", "sampled"])
def test_dyspec_of_a_small_budget_is_as_deep_and_wide_as_it_needs(sampling) -> None:
    whole = DySpec(budget=2, depth=DEPTH, width=4, branch=4)
    fitted = whole.with_budget(2)
    assert fitted == DySpec(budget=2, depth=2, width=2, branch=2) and fitted.slots == 3
    deep, flat = (grow(policy, sampling)[0] for policy in (whole, fitted))
    for name in ("tokens", "parent", "depth", "valid"):
        assert np.array_equal(getattr(deep, name), getattr(flat, name)), name


def test_confidence_is_the_best_of_all_candidates() -> None:
    """Brute force over the same frontier rule (EAGLE-2, sections 4.1 and 4.2)."""
    policy = POLICIES["confidence"]
    tree, _ = grow(policy)
    for b in range(3):
        frontier, made = [((int(ROOTS[b]),), 0.0)], []
        for _ in range(policy.depth):
            level = []
            for path, score in frontier:
                logp = np.log(softmax(table(path)))
                level += [((*path, int(x)), score + logp[x]) for x in np.argsort(-logp)[: policy.top_k]]
            made += level
            frontier = sorted(level, key=lambda item: -item[1])[: policy.top_k]
        best = {path for path, _ in sorted(made, key=lambda item: -item[1])[: policy.total - 1]}
        assert {tuple(path_of(tree, b, n)) for n in range(1, policy.total)} == best


def test_reduced_vocabulary_speaks_of_target_tokens() -> None:
    ids = jnp.array([3, 9, 4, 0, 11])
    network = Table(vocabulary=ids, vocab_size=12)
    tree = grown_by(Static(constant_branching([2])), network, ROOTS, KEYS, WARM).tree
    q = np.zeros((3, 12))
    q[:, np.asarray(ids)] = jax.nn.softmax(jnp.array([table([r]) for r in (2, 0, 4)]), axis=-1)
    np.testing.assert_allclose(tree.proposals[:, 0], q, rtol=1e-9)
    assert set(np.asarray(tree.tokens)[:, 1:].ravel().tolist()) <= {3, 9, 4, 0, 11}


def test_rows_of_temperature_0_rank_even_among_sampled_ones() -> None:
    mixed = batch_sampling([Sampling(), Sampling(temperature=1.0), Sampling()])
    for name in ("lopsided without", "lopsided with", "beam", "dyspec"):
        tree, _ = grow(POLICIES[name], mixed)
        ranked, _ = grow(POLICIES[name], GREEDY)
        assert tree.rule in ("iid", "swor")
        first = tree.tokens[[0, 2]][:, 1]
        assert first.tolist() == ranked.tokens[[0, 2]][:, 1].tolist()
