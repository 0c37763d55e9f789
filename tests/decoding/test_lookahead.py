"""Lookahead: pool, staircase, merged chains and riders against plain Python and plain forwards."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding import loop
from decoding.drafter import Riders, TargetView
from decoding.drafters.lookahead import Lookahead, merged_chains, remember, staircase
from decoding.generate import generate
from decoding.place import Place
from decoding.request import Request
from decoding.sampling import Sampling, batch_sampling
from decoding.verify import verify
from models import transformer
from models.attention import Sources
from models.errors import UserError
from models.layout import Layout
from tests.decoding.drafter_cases import cyclic_target, random_target

PROMPTS = [[1, 2, 3, 4, 1, 2], [4, 5, 6, 7, 8], [9]]

forward = jax.jit(transformer.forward, static_argnames="config")

pytestmark = pytest.mark.usefixtures("x64")


def test_staircase_is_the_published_one() -> None:
    """Window 3, n-grams of 4: generations of rows 0 to 2, 3 to 5 and 6 to 8."""
    expected = (
        "x........",
        "xx.......",
        "xxx......",
        "x..x.....",
        "xx..x....",
        "xxx..x...",
        "x..x..x..",
        "xx..x..x.",
        "xxx..x..x",
    )
    assert np.array_equal(staircase(3, 3), [[mark == "x" for mark in row] for row in expected])


def recall(pool: np.ndarray, grams: list[list[int]]) -> list:
    """The pool `[V, G, K]` of one row after the n-grams were put in one by one, as lists."""
    lists = pool.tolist()
    for key, *rest in grams:
        # An equal one moves to the front, else the least recently found is given up.
        lists[key].remove(rest) if rest in lists[key] else lists[key].pop()
        lists[key].insert(0, rest)
    return lists


def test_pool_is_a_least_recently_found_list_per_token() -> None:
    rng = np.random.default_rng(0)
    grams = rng.integers(0, 3, (2, 200, 3)).astype(np.int32)
    take = rng.random((2, 200)) < [[0.9], [0.4]]
    pool = np.full((2, 4, 5, 2), -1, np.int32)
    found = remember(jnp.array(pool), jnp.array(grams), jnp.array(take))
    for row in range(2):
        assert found[row].tolist() == recall(pool[row], grams[row, take[row]].tolist())
    # Three tokens make nine n-grams of two for five places: some were given up, and nothing is kept for the fourth.
    assert (np.asarray(found[0, :3]) >= 0).all() and (found[:, 3] == -1).all()


def test_chains_that_begin_alike_share_their_nodes() -> None:
    rng = np.random.default_rng(1)
    chains = rng.integers(0, 3, (300, 5, 4)).astype(np.int32)
    chains[rng.random((300, 5)) < 0.2] = -1
    tree = jax.jit(merged_chains)(jnp.full(300, 9, jnp.int32), jnp.array(chains))
    for row in range(300):
        tokens, parent, valid = (np.asarray(x[row]) for x in (tree.tokens, tree.parent, tree.valid))
        paths = {}
        for node in np.flatnonzero(valid):
            up = [node]
            while parent[up[-1]] >= 0:
                up.append(parent[up[-1]])
                assert valid[up[-1]]
            path = tuple(tokens[up[::-1]].tolist())
            assert path not in paths, "one node per prefix"
            paths[path] = node
            assert np.flatnonzero(tree.ancestors[row, node]).tolist() == sorted(up)
            assert tree.depth[row, node] == len(up) - 1
        wanted = {(9, *chain[:k]) for chain in chains[row].tolist() if chain[0] >= 0 for k in range(5)} | {(9,)}
        assert set(paths) == wanted
        offered = [child for child in np.asarray(tree.children[row]).ravel() if child >= 0]
        assert sorted(offered) == sorted(paths[path] for path in wanted if len(path) > 1)


def test_no_candidate_is_lost_to_its_twin() -> None:
    """The target goes along the second of two chains with the same first token."""
    chains = jnp.array([[[1, 2, 3], [1, 4, 5], [6, 4, 5]]], jnp.int32)
    tree = jax.jit(merged_chains)(jnp.array([0], jnp.int32), chains)
    behind = {0: 1, 1: 4, 4: 5, 5: 7}
    logits = jnp.asarray(np.eye(8)[[[behind.get(int(token), 0) for token in tree.tokens[0]]]])
    keys, length = jax.vmap(jax.random.key)(jnp.arange(1)), jnp.array([5], jnp.int32)
    verdict = jax.jit(verify, static_argnums=5)(tree, logits, batch_sampling([Sampling()]), keys, length, 3)
    assert verdict.tokens[0].tolist() == [1, 4, 5, 7] and int(verdict.drafts[0]) == 3


def a_step(drafter: Lookahead):
    """A target, its view, a window of random guesses, the tree and the riders of one step; text of 9 tokens."""
    target = random_target(vocab_size=12)
    rng = np.random.default_rng(2)
    text = jnp.array(rng.integers(0, 12, (2, 40)), jnp.int32)
    length = jnp.array([9, 6], jnp.int32)
    whole = forward(target.config, target.params, text, Layout.causal(2, 40))
    view = TargetView(
        target.config, target.params, whole.rows, Place.of_text(length), text, batch_sampling([Sampling()] * 2)
    )
    state = drafter.init(target.config, 2, 40, jnp.float64)
    window = jnp.array(rng.integers(0, 12, state["window"].shape), jnp.int32)
    pool = jnp.array(rng.integers(0, 12, state["pool"].shape), jnp.int32)
    state = {"window": window, "pool": pool}
    root = jnp.take_along_axis(text, length[:, None], axis=1)[:, 0]
    tree, _ = jax.jit(lambda state: drafter.draft(None, view, state, root, None))(state)
    return target, view, state, tree, drafter.riders(None, view, state, tree)


def test_each_rider_scores_like_a_plain_forward_over_its_column() -> None:
    drafter = Lookahead(window=4, ngram=4, guesses=2)
    target, view, state, tree, riders = a_step(drafter)
    assert riders.tokens.shape == (2, drafter.num_riders) == (2, 11)
    tokens, layout = loop.verify_rows(tree, riders, view.place)
    out = forward(target.config, target.params, tokens, layout, Sources(view.cache))
    texts, places = [], []
    for row, length in enumerate(view.length.tolist()):
        window = np.array(state["window"][row])
        window[0, 0] = view.text[row, length]
        for generation, column in np.ndindex(3, 4):
            guesses = [*window[0, : column + 1], *window[1 : generation + 1, column]]
            texts.append([*view.text[row, :length].tolist(), *map(int, guesses)])
            place = generation * 4 + column - 1
            places.append((row, tree.tokens.shape[1] + place if place >= 0 else 0))
            assert place < 0 or riders.positions[row, place] == len(texts[-1]) - 1
    longest = max(map(len, texts))
    plain = target.apply([[*text, *[0] * (longest - len(text))] for text in texts]).logits
    for (row, place), text, logits in zip(places, texts, plain, strict=True):
        np.testing.assert_allclose(out.logits[row, place], logits[len(text) - 1], rtol=0, atol=1e-9)


def test_riders_change_no_row_of_the_tree() -> None:
    target, view, _, tree, riders = a_step(Lookahead(window=4, ngram=4, guesses=2))

    def logits(riders: Riders | None):
        tokens, layout = loop.verify_rows(tree, riders, view.place)
        out = forward(target.config, target.params, tokens, layout, Sources(view.cache))
        return np.asarray(out.logits[:, : tree.tokens.shape[1]])

    others = dataclasses.replace(riders, tokens=(riders.tokens + 5) % 12)
    assert np.array_equal(logits(riders), logits(others)), "bitwise, at equal shapes"
    np.testing.assert_allclose(logits(riders), logits(None), rtol=0, atol=1e-12)


def test_a_step_finds_one_ngram_per_column() -> None:
    drafter = Lookahead(window=4, ngram=4, guesses=2)
    target, view, state, tree, riders = a_step(drafter)
    tokens, layout = loop.verify_rows(tree, riders, view.place)
    out = forward(target.config, target.params, tokens, layout, Sources(view.cache))
    keys = jax.vmap(jax.random.key)(jnp.arange(2))
    verdict = jax.jit(verify, static_argnums=5)(tree, out.logits, view.sampling, keys, view.length, drafter.max_depth)
    after = jax.jit(functools.partial(drafter.observe, None, view))(state, tree, out, verdict, jnp.array([True, False]))
    for name in state:
        assert np.array_equal(after[name][1], state[name][1]), "a finished row keeps its state"
    window = np.array(state["window"][0])
    assert window[0, 0] != tree.tokens[0, 0], "the guess in its place was another"
    window[0, 0] = tree.tokens[0, 0]
    answers = np.argmax(out.logits[0, -4:], axis=-1)
    assert np.array_equal(after["window"][0], [window[1], window[2], answers])
    grams = [[*window[:, column].tolist(), int(answers[column])] for column in range(4)]
    pool = np.asarray(state["pool"][0])
    assert after["pool"][0].tolist() == recall(pool, grams) != pool.tolist()


def test_prompt_fills_pool_and_window() -> None:
    target, drafter = random_target(vocab_size=12), Lookahead(window=3, ngram=3, guesses=4)
    prompt = [1, 2, 3, 1, 2, 5, 1, 2, 3]
    state = loop.init_state(target.config, drafter, 2, 64, jnp.float64, np.array([prompt, [7] * 9], np.int32))
    request = Request(
        prompt_length=jnp.array([9, 1], jnp.int32),
        limit=jnp.array([60, 60], jnp.int32),
        stops=jnp.full((2, 4, 8), -1, jnp.int32),
        keys=jax.vmap(jax.random.key)(jnp.arange(2)),
        sampling=batch_sampling([Sampling()] * 2),
    )
    models, hidden = loop.Models(target.config, drafter, target.params, None), jnp.zeros((2, target.config.width))
    for chunk in (slice(0, 4), slice(4, 9)):
        tokens = np.array([prompt, [7] * 9], np.int32)[:, chunk]
        state, hidden = loop.read_prompt(models, state, hidden, request, jnp.array(tokens))
    state = loop.choose_root(models, state, hidden, request)
    pool = np.asarray(state.drafter["pool"])
    assert pool[0, 1].tolist() == [[2, 3], [2, 5], [-1, -1], [-1, -1]]
    assert pool[0, 2].tolist() == [[5, 1], [3, 1], [-1, -1], [-1, -1]]
    assert pool[0, 3].tolist() == [[1, 2]] + [[-1, -1]] * 3
    assert (pool[1] == -1).all()
    # The prompt's last four tokens, as if they came again: columns advance to the right and with every generation.
    assert state.drafter["window"].tolist() == [[[5, 1, 2], [1, 2, 3]], [[7, 7, 7], [7, 7, 7]]]


def test_a_period_is_drafted_to_full_depth() -> None:
    target, period = cyclic_target()
    drafter, steps = Lookahead(window=3, ngram=5, guesses=2), 5
    generation = generate(target, [period * 3], drafter=drafter, max_new_tokens=1 + 5 * steps, stop=[])
    assert generation.tokens[0] == (period * 20)[: 1 + 5 * steps]
    assert generation.stats[0].histogram.tolist() == [0] * 4 + [steps]
    # Of a prompt without repetition it has to find the period by itself.
    stats = generate(target, [[period[0]]], drafter=drafter, max_new_tokens=60, stop=[]).stats[0]
    assert stats.histogram[4] > 5


@pytest.mark.parametrize(
    "drafter",
    [Lookahead(1, 2, 1), *(pytest.param(Lookahead(*s), marks=pytest.mark.slow) for s in ((1, 3, 2), (4, 2, 3)))],
)
def test_smallest_windows_are_exact(drafter: Lookahead) -> None:
    target = random_target(vocab_size=12)
    plain = generate(target, PROMPTS, max_new_tokens=30, stop=[])
    drafted = generate(target, PROMPTS, drafter=drafter, max_new_tokens=30, stop=[])
    assert drafted.tokens == plain.tokens
    assert sum(stats.accepted_by_depth.sum() for stats in drafted.stats) > 0


def test_nonsense_is_refused() -> None:
    for wrong, least in ((Lookahead(window=0), 1), (Lookahead(ngram=1), 2), (Lookahead(guesses=0), 1)):
        with pytest.raises(UserError, match=f"of at least {least}, got {least - 1}"):
            wrong.check(None)
