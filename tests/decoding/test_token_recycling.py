"""Token Recycling: the table against brute force, the template, periodic text, warm start and memory."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding.drafters.token_recycling import TOKEN_RECYCLING_80, TokenRecycling, remember
from decoding.generate import generate
from decoding.sampling import Sampling
from decoding.trees import Topology, chain
from models.errors import UserError
from tests.decoding.drafter_cases import LOPSIDED, cyclic_target, random_target

PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8], [9]]

pytestmark = pytest.mark.usefixtures("x64")


def test_template_has_the_published_counts() -> None:
    depths = np.bincount(TOKEN_RECYCLING_80.depth)
    assert depths.tolist() == [1, 8, 21, 25, 15, 8, 3]
    assert TOKEN_RECYCLING_80.max_rank == 8


def test_of_equal_tokens_the_last_is_remembered() -> None:
    rng = np.random.default_rng(0)
    table = rng.integers(0, 9, (3, 9, 4))
    tokens, best = rng.integers(0, 9, (3, 30)), rng.integers(0, 9, (3, 30, 4))
    take = rng.random((3, 30)) < [[0.9], [0.2], [0.0]]
    expected = table.copy()
    for row, node in np.argwhere(take):
        expected[row, tokens[row, node]] = best[row, node]
    found = remember(*(jnp.asarray(x, jnp.int32) for x in (table, tokens, best)), jnp.asarray(take))
    assert np.array_equal(found, expected) and not np.array_equal(expected[0], table[0])
    assert np.array_equal(found[2], table[2])


def test_table_after_every_step_is_that_of_brute_force(monkeypatch: pytest.MonkeyPatch) -> None:
    target = random_target(vocab_size=12)
    drafter = TokenRecycling(LOPSIDED)
    looked = []
    observe = TokenRecycling.observe

    def watched(self, params, view, state, tree, output, verdict, live):
        after = observe(self, params, view, state, tree, output, verdict, live)
        jax.debug.callback(
            lambda *seen: looked.append([np.array(x) for x in seen]),
            *(state, tree.tokens, tree.valid, output.logits, live, after),
        )
        return after

    monkeypatch.setattr(TokenRecycling, "observe", watched)
    other = dataclasses.replace(drafter, tree=Topology((*LOPSIDED.paths, (3,))))
    generate(target, PROMPTS, drafter=other, max_new_tokens=[20, 6, 15], stop=[])
    jax.effects_barrier()
    assert len(looked) > 5 and not looked[-1][4].all(), "rows that are done are looked at too"
    for before, tokens, valid, logits, live, after in looked:
        expected = before.copy()
        for row, node in np.argwhere(valid & live[:, None]):
            expected[row, tokens[row, node]] = np.argsort(-logits[row, node], kind="stable")[:4]
        assert np.array_equal(after, expected)
    assert all(np.array_equal(then[5], now[0]) for then, now in itertools.pairwise(looked))


def test_a_period_is_drafted_to_full_depth() -> None:
    target, period = cyclic_target()
    steps = 6
    generation = generate(target, [period], drafter=TokenRecycling(), max_new_tokens=1 + 3 + 7 * steps, stop=[])
    assert generation.tokens[0] == (period * 30)[: 4 + 7 * steps]
    assert generation.stats[0].histogram.tolist() == [3, 0, 0, 0, 0, 0, steps], "each token is new once"
    warm = TokenRecycling(warm_start=True)
    stats = generate(target, [period * 2], drafter=warm, max_new_tokens=1 + 7 * steps, stop=[]).stats[0]
    assert stats.steps == steps and stats.acceptance_length == TOKEN_RECYCLING_80.max_depth + 1


def test_unknown_tokens_draft_nothing() -> None:
    target = random_target(vocab_size=12)
    stats = generate(target, [[1, 2]], drafter=TokenRecycling(LOPSIDED), max_new_tokens=2, stop=[]).stats[0]
    assert stats.steps == 1 and stats.accepted_by_depth.sum() == 0


def test_memory_changes_the_steps_and_not_the_text() -> None:
    target, drafter = random_target(vocab_size=12), TokenRecycling(LOPSIDED)
    arguments = dict(drafter=drafter, max_new_tokens=25, stop=[], sampling=Sampling(temperature=1.0))
    cold = generate(target, PROMPTS, **arguments)
    assert cold.memory.shape == (3, 12, 3)
    kept = np.array(cold.memory)
    warm = generate(target, PROMPTS, memory=cold.memory, **arguments)
    assert warm.tokens == cold.tokens
    assert sum(stats.steps for stats in warm.stats) < sum(stats.steps for stats in cold.stats)
    assert np.array_equal(cold.memory, kept), "a memory may be used again"
    again = generate(target, PROMPTS, memory=cold.memory, **arguments)
    assert [stats.steps for stats in again.stats] == [stats.steps for stats in warm.stats]
    with pytest.raises(UserError, match=r"memory of shape \[3, 12, 3\]: this request's table is \[1, 12, 3\]"):
        generate(target, PROMPTS[:1], memory=cold.memory, **arguments)


def test_warm_start_recycles_the_prompt() -> None:
    target, drafter = random_target(vocab_size=12), TokenRecycling(LOPSIDED, warm_start=True)
    prompt = np.random.default_rng(0).integers(0, 12, 40).tolist()
    memory = generate(target, [prompt, prompt[:7]], drafter=drafter, max_new_tokens=1, stop=[]).memory
    best = np.argsort(-np.asarray(target.apply([prompt]).logits)[0], axis=-1)[:, :3]
    for row, length in enumerate((40, 7)):
        expected = np.full((12, 3), -1)
        for token, behind in zip(prompt[:length], best[:length], strict=True):
            expected[token] = behind
        assert np.array_equal(memory[row], expected)


def test_what_cannot_be_drafted_is_refused() -> None:
    target = random_target(vocab_size=12)
    with pytest.raises(UserError, match="draft tree of token_recycling is empty"):
        TokenRecycling(Topology(())).check(target.config)
    with pytest.raises(UserError, match="asks for 13 candidates, but the vocabulary has 12"):
        TokenRecycling(Topology(tuple((i,) for i in range(13)))).check(target.config)
    TokenRecycling(chain(9)).check(target.config)
