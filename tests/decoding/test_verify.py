"""Verification against independent walks in numpy: lossless, and typical acceptance."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding.sampling import Sampling, batch_sampling, draw
from decoding.trees import Topology
from decoding.verify import Typical, verify, verify_typical

# One program per shape, where operation by operation each would be many.
draw = jax.jit(draw)
run = jax.jit(verify, static_argnames="max_depth")
run_typical = jax.jit(verify_typical, static_argnames=("rule", "max_depth"))

TREE = Topology(((0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (2, 0), (2, 1), (2, 1, 0), (1, 0, 0)))
BATCH, VOCAB = 256, 5

pytestmark = pytest.mark.usefixtures("x64")


def problem(seed: int, temperature: float) -> tuple[np.ndarray, np.ndarray, dict]:
    """Trees of distinct siblings, logits, and the arguments that both rules share."""
    rng = np.random.default_rng(seed)
    tokens = np.zeros((BATCH, TREE.size), np.int32)
    tokens[:, 0] = rng.integers(VOCAB, size=BATCH)
    for row in range(BATCH):
        for children in TREE.children:
            nodes = children[children >= 0]
            tokens[row, nodes] = rng.permutation(VOCAB)[: len(nodes)]
    logits = rng.normal(size=(BATCH, TREE.size, VOCAB))
    arguments = dict(
        sampling=batch_sampling([Sampling(temperature=temperature)] * BATCH),
        keys=jax.vmap(jax.random.key)(jnp.arange(BATCH)),
        length=jnp.array(rng.integers(1, 40, size=BATCH), jnp.int32),
        max_depth=TREE.max_depth,
    )
    return tokens, logits, arguments


def targets(logits: np.ndarray, arguments: dict) -> np.ndarray:
    """The target's own token after every node: `[B, N]`."""
    drawn = []
    for node in range(TREE.size):
        positions = jnp.asarray(np.asarray(arguments["length"]) + int(TREE.depth[node]) + 1)
        drawn.append(draw(jnp.array(logits[:, node]), arguments["sampling"], arguments["keys"], positions))
    return np.stack(drawn, axis=1)


def walk(tokens: np.ndarray, valid: np.ndarray, target: np.ndarray) -> tuple[list[int], list[int]]:
    """Path and emitted tokens of one row."""
    node, path, emitted = 0, [0], []
    while True:
        emitted.append(int(target[node]))
        offered = [int(c) for c in TREE.children[node] if c >= 0 and valid[c]]
        following = [child for child in offered if tokens[child] == target[node]]
        if not following:
            return path, emitted
        node = following[0]
        path.append(node)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("rule", ["point", "match"])
def test_verify_walks_like_numpy(rule: str, temperature: float) -> None:
    tokens, logits, arguments = problem(0, temperature)
    target = targets(logits, arguments)
    verdict = run(TREE.fill(jnp.array(tokens), rule), jnp.array(logits), **arguments)
    lengths = set()
    for row in range(BATCH):
        path, emitted = walk(tokens[row], np.ones(TREE.size, bool), target[row])
        drafts = len(path) - 1
        assert int(verdict.drafts[row]) == drafts
        assert verdict.path[row].tolist() == path + [path[-1]] * (TREE.max_depth - drafts)
        assert verdict.tokens[row, : drafts + 1].tolist() == emitted
        lengths.add(drafts)
    assert lengths == {0, 1, 2, 3}


def test_invalid_nodes_are_never_accepted() -> None:
    tokens, logits, arguments = problem(1, 0.0)
    valid = np.random.default_rng(5).random((BATCH, TREE.size)) < 0.6
    valid[:, 0] = True
    tree = TREE.fill(jnp.array(tokens), "point").replace(valid=jnp.array(valid))
    verdict = run(tree, jnp.array(logits), **arguments)
    target = targets(logits, arguments)
    expected = [len(walk(tokens[row], valid[row], target[row])[0]) - 1 for row in range(BATCH)]
    assert verdict.drafts.tolist() == expected
    free = run(TREE.fill(jnp.array(tokens), "point"), jnp.array(logits), **arguments)
    assert verdict.drafts.tolist() != free.drafts.tolist()


def test_of_equal_match_children_the_first_is_taken() -> None:
    tokens, logits, arguments = problem(2, 0.0)
    tokens[:, [1, 2, 3]] = tokens[:, [1]]
    verdict = run(TREE.fill(jnp.array(tokens), "match"), jnp.array(logits), **arguments)
    assert set(np.asarray(verdict.path[:, 1]).tolist()) == {0, 1}


def test_padding_token_is_not_lucky() -> None:
    """Where the target's favourite is the token that pads, nothing beyond the tree is accepted."""
    tokens, logits, arguments = problem(3, 0.0)
    tokens[:, 1:] = np.where(tokens[:, 1:] == 0, 1, tokens[:, 1:])
    logits[..., 0] = 100.0
    verdict = run(TREE.fill(jnp.array(tokens), "point"), jnp.array(logits), **arguments)
    assert not np.any(verdict.drafts) and not np.any(verdict.tokens[:, 0])


def test_of_ended_rows_nothing_is_judged() -> None:
    tokens, logits, arguments = problem(5, 0.0)
    tree, live = TREE.fill(jnp.array(tokens), "match"), np.arange(BATCH) % 3 == 0
    every, some = run(tree, jnp.array(logits), **arguments), run(tree, jnp.array(logits), live=live, **arguments)
    for all_of, found in zip(vars(every).values(), vars(some).values(), strict=True):
        np.testing.assert_array_equal(np.asarray(found)[live], np.asarray(all_of)[live])
        assert not np.any(np.asarray(found)[~live])
    assert np.any(np.asarray(every.drafts)[~live])


def typical_walk(tokens, logits, temperature, rule) -> tuple[int, float, list[int]]:
    """Drafts, log-likelihood and node of the best acceptable path, by looking at every root path."""
    scaled = logits / temperature
    p = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    entropy = -(p * np.log(p)).sum(axis=1)
    best = (0, 0.0, [0])
    for node in range(1, TREE.size):
        path = np.flatnonzero(TREE.ancestors[node])
        pairs = list(itertools.pairwise(path))
        chances = [p[parent, tokens[child]] for parent, child in pairs]
        bounds = [min(rule.epsilon, rule.delta * np.exp(-entropy[parent])) for parent, _ in pairs]
        score = float(np.sum(np.log(chances)))
        if all(c > b for c, b in zip(chances, bounds, strict=True)):
            best = max(best, (len(pairs), score, path.tolist()), key=lambda found: found[:2])
    return best


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("rule", [Typical(), Typical(epsilon=0.4, delta=0.9)])
def test_typical_matches_numpy(rule: Typical, temperature: float) -> None:
    tokens, logits, arguments = problem(4, temperature)
    verdict = run_typical(TREE.fill(jnp.array(tokens), "point"), jnp.array(logits), rule, **arguments)
    target = targets(logits, arguments)
    lengths = set()
    for row in range(BATCH):
        # Settings travel as float32.
        drafts, _, path = typical_walk(tokens[row], logits[row], float(np.float32(temperature)) or 1.0, rule)
        assert int(verdict.drafts[row]) == drafts
        assert verdict.path[row].tolist() == path + [path[-1]] * (TREE.max_depth - drafts)
        emitted = [*tokens[row, path[1:]], target[row, path[-1]]]
        assert verdict.tokens[row, : drafts + 1].tolist() == emitted
        lengths.add(drafts)
    assert len(lengths) > 1


def test_a_rule_that_does_not_fit_its_tree_is_refused() -> None:
    tokens = jnp.zeros((1, TREE.size), jnp.int32)
    proposals = jnp.ones((1, 1, 5)) / 5
    of_parents = np.zeros((1, np.sum(TREE.children[:, 0] >= 0)), np.int32)
    with pytest.raises(ValueError, match="rule must be one of match, point, iid, swor, got 'greedy'"):
        TREE.fill(tokens, "greedy")
    for rule in ("iid", "swor"):
        assert TREE.fill(tokens, rule, proposals, of_parents).rule == rule
        with pytest.raises(ValueError, match=f"under the rule '{rule}' needs proposals"):
            TREE.fill(tokens, rule)
    for rule in ("match", "point"):
        with pytest.raises(ValueError, match=f"under the rule '{rule}' cannot have proposals"):
            TREE.fill(tokens, rule, proposals)
