"""Verification alone under the rules `iid` and `swor`: synthetic trees and logits, a hundred thousand keys and more.

Neither model nor drafter stands between: p, q and the children are given, so the share of keys that accepts each child,
and the tokens of all others, are known exactly. Keys are fixed; a test passes at p > 1e-4, two-sided. What that catches
is shown by mistakes, one of them a bias of one percent.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding.sampling import Sampling, batch_sampling, noise
from decoding.trees import TokenTree, Topology, chain, from_child_counts
from decoding.verify import Verdict, verify

stats = pytest.importorskip("scipy.stats")

SMALLEST_P, VOCAB, LENGTH = 1e-4, 4, 9
LIST = from_child_counts({(): 3})

UNIFORM, ONE_HOT = np.full(VOCAB, 0.25), np.array([0.0, 0.0, 1.0, 0.0])
SLOPE, OTHER = np.array([0.4, 0.3, 0.2, 0.1]), np.array([0.05, 0.15, 0.3, 0.5])
LOW, HIGH = np.array([0.3, 0.7, 0.0, 0.0]), np.array([0.0, 0.0, 0.6, 0.4])
# p, q, and how many children are offered. Lists may be longer than q has tokens.
CASES = {
    "q one-hot, one child": (UNIFORM, ONE_HOT, 1),
    "q one-hot, a list": (UNIFORM, ONE_HOT, 3),
    "q is p": (SLOPE, SLOPE, 2),
    "q disjoint from p": (LOW, HIGH, 3),
    "p one-hot": (ONE_HOT, SLOPE, 3),
    "both one-hot": (ONE_HOT, ONE_HOT, 3),
    "no children": (SLOPE, OTHER, 0),
    "one child": (SLOPE, OTHER, 1),
    "two children": (SLOPE, OTHER, 2),
    "three children": (SLOPE, OTHER, 3),
    "p is cut": (LOW, OTHER, 3),
    "q is cut": (SLOPE, LOW, 3),
}
ROWS = 2**15


def log(p: np.ndarray) -> np.ndarray:
    """Logits of a distribution."""
    with np.errstate(divide="ignore"):
        return np.log(p)


@functools.cache
def request_keys(rows: int) -> jax.Array:
    """One per row, as seeds that count up give them."""
    return jax.vmap(jax.random.key)(jnp.arange(rows, dtype=jnp.uint32))


def drawn_lists(q: np.ndarray, rule: str, rows: int, seed: int) -> np.ndarray:
    """`[rows, 3]` children drawn from `q` in order; behind all that `swor` can draw, what it cannot."""
    rng = np.random.default_rng(seed)
    if rule == "iid":
        return rng.choice(VOCAB, (rows, 3), p=q)
    return np.argsort(-(log(q) + rng.gumbel(size=(rows, VOCAB))), axis=1, kind="stable")[:, :3]


@functools.partial(jax.jit, static_argnums=0)
def _verify(max_depth: int, *arguments) -> Verdict:
    return verify(*arguments, max_depth)


def judge(tree: TokenTree, logits: np.ndarray, max_depth: int, *sampling: Sampling) -> Verdict:
    """The verdict of every row; `sampling` comes in turn, and is temperature 1 by default."""
    rows = len(tree.tokens)
    parameters = batch_sampling(list(sampling) or [Sampling(temperature=1.0)])
    parameters = jax.tree.map(lambda setting: jnp.resize(setting, rows), parameters)
    length = jnp.full(rows, LENGTH, jnp.int32)
    return _verify(max_depth, tree, jnp.asarray(logits, jnp.float32), parameters, request_keys(rows), length)


def filled(topology: Topology, rule: str, children: np.ndarray, q: np.ndarray) -> TokenTree:
    """The tree with `children` `[B, N - 1]` behind the root, drawn from `q` `[B, M, V]`."""
    tokens = jnp.asarray(np.pad(children, ((0, 0), (1, 0))), jnp.int32)
    return topology.fill(tokens, rule, jnp.asarray(q, jnp.float32), np.arange(q.shape[1], dtype=np.int32)[None])


def outcome_shares(p: np.ndarray, q: np.ndarray, count: int, rule: str) -> np.ndarray:
    """`[count + 1, V]`: how often child c is accepted and is token t, and in the last row that none is and t is drawn.

    The rule as its papers have it, summed over every list that q can draw.
    """
    shares = np.zeros((count + 1, VOCAB))

    def offer(c: int, p: np.ndarray, q: np.ndarray, chance: float) -> None:
        if c == count or q.sum() == 0:
            shares[-1] += chance * p
            return
        offered = q / q.sum()
        for x in np.flatnonzero(offered):
            accept = min(1.0, p[x] / offered[x])
            shares[c, x] += chance * offered[x] * accept
            if accept < 1 - 1e-12:
                left = np.maximum(p - offered, 0)
                younger = np.where(np.arange(VOCAB) == x, 0, q) if rule == "swor" else q
                offer(c + 1, left / left.sum(), younger, chance * offered[x] * (1 - accept))

    offer(0, p, q, 1.0)
    return shares


def p_value(counts: np.ndarray, shares: np.ndarray) -> float:
    """Of Pearson's test; 0 where something impossible was seen. Cells here expect hundreds, or nothing."""
    counts, expected = np.ravel(counts), np.ravel(shares) * counts.sum()
    possible = expected > 1e-6
    if counts[~possible].any():
        return 0.0
    if possible.sum() == 1:
        return 1.0
    return float(
        stats.chisquare(counts[possible], expected[possible] * (counts.sum() / expected[possible].sum())).pvalue
    )


def outcomes(
    rule: str, lists: Callable[[np.ndarray, str, int, int], np.ndarray] = drawn_lists, names: Sequence[str] = (*CASES,)
) -> dict[str, np.ndarray]:
    """Per case the counts of which child was accepted (in the last row: none) with which token; all in one program."""
    each = [
        (p, q, count, lists(q, rule, ROWS, seed)) for seed, (p, q, count) in enumerate(CASES[name] for name in names)
    ]
    logits = np.concatenate([np.broadcast_to(log(p), (ROWS, LIST.size, VOCAB)) for p, *_ in each])
    proposals = np.concatenate([np.broadcast_to(q, (ROWS, 1, VOCAB)) for _, q, *_ in each])
    offered = np.repeat([count for *_, count, _ in each], ROWS)
    tree = filled(LIST, rule, np.concatenate([children for *_, children in each]), proposals)
    tree = tree.replace(valid=jnp.asarray(np.arange(LIST.size) <= offered[:, None]))
    verdict = judge(tree, logits, 1)
    child = np.where(verdict.drafts, verdict.path[:, 1] - 1, offered).reshape(-1, ROWS)
    token = np.asarray(verdict.tokens[:, 0]).reshape(-1, ROWS)
    counted = {}
    for row, name in enumerate(names):
        counted[name] = np.zeros((CASES[name][2] + 1, VOCAB), int)
        np.add.at(counted[name], (child[row], token[row]), 1)
    return counted


@pytest.mark.parametrize("rule", ["iid", "swor"])
def test_each_child_is_accepted_as_often_as_the_rule_says(rule: str) -> None:
    for name, counts in outcomes(rule).items():
        p, q, count = CASES[name]
        shares = outcome_shares(p, q, count, rule)
        np.testing.assert_allclose(shares.sum(axis=0), p, atol=1e-12, err_msg="the rule itself is lossless")
        assert p_value(counts, shares) > SMALLEST_P, (name, counts / ROWS, shares)
        assert p_value(counts.sum(axis=0), p) > SMALLEST_P, (name, counts.sum(axis=0) / ROWS, p)


def mistaken_lists(mistake: str) -> Callable[[np.ndarray, str, int, int], np.ndarray]:
    """Children that were not drawn from q independently of the verifier."""

    def lists(q: np.ndarray, rule: str, rows: int, seed: int) -> np.ndarray:
        if mistake == "ranked":
            return np.broadcast_to(np.argsort(-q, kind="stable")[:3], (rows, 3))
        if mistake == "by the verifier's noise":
            keys = request_keys(rows * (seed + 1))[rows * seed :]
            own = jax.jit(noise, static_argnums=(2, 3))(keys, jnp.full(rows, LENGTH + 1), VOCAB, jnp.float32)
            return np.argsort(-(log(q) + np.asarray(own)), axis=1, kind="stable")[:, :3]
        return np.sort(drawn_lists(q, rule, rows, seed), axis=1)

    return lists


@pytest.mark.parametrize(
    ("mistake", "case"),
    [
        ("ranked", "three children"),
        ("not in the order drawn", "three children"),
        ("by the verifier's noise", "one child"),
    ],
)
def test_children_of_another_distribution_are_noticed(mistake: str, case: str) -> None:
    counted = outcomes("swor", mistaken_lists(mistake), [case, "no children"])
    found = {name: p_value(counts.sum(axis=0), CASES[name][0]) for name, counts in counted.items()}
    assert found[case] < 1e-12, found
    assert found["no children"] > SMALLEST_P


BIASES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {}


def planted(bias):
    """Registers a mistake of the verifier by its name."""
    BIASES[bias.__name__] = bias
    return bias


@planted
def accepts_one_percent_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what it should."""
    uniform = jax.random.uniform
    monkeypatch.setattr(jax.random, "uniform", lambda *arguments: 0.99 * uniform(*arguments))


@planted
def accepts_one_percent_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what it should."""
    uniform = jax.random.uniform
    monkeypatch.setattr(jax.random, "uniform", lambda *arguments: 1.01 * uniform(*arguments))


@planted
def favours_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the residual, by two percent."""
    favour = 0.02 * jnp.eye(1, VOCAB)
    monkeypatch.setattr("decoding.verify.noise", lambda *arguments: noise(*arguments) + favour)


def one_child_p_values() -> tuple[float, float]:
    """p uniform, q one-hot, 2^20 keys: that a V-th of them accepts the child, and that all others draw evenly."""
    rows, x = 2**20, 2
    tree = filled(chain(1), "swor", np.full((rows, 1), x), np.broadcast_to(ONE_HOT, (rows, 1, VOCAB)))
    verdict = judge(tree, np.zeros((rows, 2, VOCAB)), 1)
    accepted, token = np.asarray(verdict.drafts) == 1, np.asarray(verdict.tokens[:, 0])
    assert (token[accepted] == x).all()
    rest = np.bincount(token[~accepted], minlength=VOCAB)
    share = stats.binomtest(int(accepted.sum()), rows, 1 / VOCAB).pvalue
    return float(share), p_value(rest, np.where(np.arange(VOCAB) == x, 0, 1 / (VOCAB - 1)))


def test_one_child_to_a_tenth_of_a_percent() -> None:
    """The standard deviation of the accepted share is 0.0004, of one of the others' 0.0005."""
    assert min(one_child_p_values()) > SMALLEST_P


# The mirror image of another runs with `-m slow`.
@pytest.mark.parametrize(
    "bias",
    [pytest.param(n, marks=[pytest.mark.slow] if n == "accepts_one_percent_less" else []) for n in BIASES],
)
def test_a_bias_of_a_percent_is_noticed(bias: str, monkeypatch: pytest.MonkeyPatch) -> None:
    BIASES[bias](monkeypatch)
    jax.clear_caches()
    share, rest = one_child_p_values()
    assert (rest if bias == "favours_a_token" else share) < SMALLEST_P / 100
    jax.clear_caches()


@pytest.mark.parametrize("rule", ["iid", "swor"])
def test_strings_follow_the_product_of_both_levels(rule: str) -> None:
    """Three children, two below each; a step's tokens, continued from p to three, against p(a) p(b | a) p(c | b)."""
    rows, rng = 2**17, np.random.default_rng(3)
    p, q = (np.random.default_rng(seed).dirichlet(np.full(VOCAB, 1.5), size=VOCAB) for seed in (1, 2))
    topology = from_child_counts({(): 3, (0,): 2, (1,): 2, (2,): 2})

    def children_of(tokens: np.ndarray, count: int) -> np.ndarray:
        noise = rng.gumbel(size=(count if rule == "iid" else 1, rows, VOCAB))
        score = np.log(q)[tokens] + noise
        return np.argmax(score, axis=2).T if rule == "iid" else np.argsort(-score[0], axis=1)[:, :count]

    first = children_of(np.zeros(rows, int), 3)
    tokens = np.concatenate([first, *(children_of(first[:, c], 2) for c in range(3))], axis=1)
    nodes = np.pad(tokens, ((0, 0), (1, 0)))
    verdict = judge(filled(topology, rule, tokens, q[nodes[:, :4]]), np.log(p)[nodes], 2)
    text, drafts = np.asarray(verdict.tokens).copy(), np.asarray(verdict.drafts)
    for place in (1, 2):
        more = np.argmax(np.log(p)[text[:, place - 1]] + rng.gumbel(size=(rows, VOCAB)), axis=1)
        text[:, place] = np.where(place > drafts, more, text[:, place])
    counts = np.zeros((VOCAB,) * 3)
    np.add.at(counts, tuple(text.T), 1)
    assert p_value(counts, p[0][:, None, None] * p[:, :, None] * p[None]) > SMALLEST_P
    assert (np.bincount(drafts) > rows / 20).all() and drafts.max() == 2


@pytest.mark.parametrize("rule", ["iid", "swor"])
def test_rows_of_temperature_0_take_the_best_among_sampled_ones(rule: str) -> None:
    rows = 512
    logits = np.random.default_rng(4).normal(size=(rows, LIST.size, VOCAB))
    children = drawn_lists(OTHER, rule, rows, 5)
    tree = filled(LIST, rule, children, np.broadcast_to(OTHER, (rows, 1, VOCAB)))
    verdict = judge(tree, logits, 1, Sampling(), Sampling(temperature=1.0))
    best = np.argmax(logits[:, 0], axis=1)
    cold = np.arange(rows) % 2 == 0
    assert np.array_equal(np.asarray(verdict.tokens)[cold, 0], best[cold])
    assert np.array_equal(np.asarray(verdict.drafts)[cold], (children == best[:, None]).any(axis=1)[cold])
    assert (np.asarray(verdict.tokens)[~cold, 0] != best[~cold]).any()


@pytest.mark.parametrize("number", [0.0, 1 - 2**-24])
def test_the_smallest_and_the_largest_number_decide_rightly(number: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """0 accepts every child that p can draw, and no other; the largest, those that p draws no less often than q."""
    jax.clear_caches()
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape, dtype: jnp.full(shape, number, dtype))
    for p, q in ((LOW, OTHER), (UNIFORM, UNIFORM)):
        children = np.arange(VOCAB)[:, None]
        tree = filled(chain(1), "swor", children, np.broadcast_to(q, (VOCAB, 1, VOCAB)))
        drafts = judge(tree, np.broadcast_to(log(p), (VOCAB, 2, VOCAB)), 1).drafts
        assert drafts.tolist() == ((p > 0) if number == 0 else (p >= q)).tolist()
    # Where q exceeds p by one rounding alone, a rejection leaves nothing, and p itself is drawn from.
    p, q = np.array([0.0, 0.0, 0.5, 0.5]), np.array([0.0, 0.0, 0.5 + 2**-24, 0.5])
    tree = filled(chain(1), "swor", np.full((64, 1), 2), np.broadcast_to(q, (64, 1, VOCAB)))
    verdict = judge(tree, np.broadcast_to(log(p), (64, 2, VOCAB)), 1)
    assert verdict.drafts.tolist() == [int(number == 0)] * 64
    assert set(verdict.tokens[:, 0].tolist()) == ({2} if number == 0 else {2, 3})
    jax.clear_caches()
