"""Prompt lookup against a search in plain Python, on periodic text, and where there is nothing to find."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding.drafters.prompt_lookup import PromptLookup, find_match
from decoding.generate import generate
from decoding.sampling import Sampling, batch_sampling
from models.errors import UserError
from tests.decoding.drafter_cases import cyclic_target, random_target

pytestmark = pytest.mark.usefixtures("x64")


def search(text: list[int], ngram: int, depth: int, shortest: int = 1) -> int:
    """The last token of the best earlier occurrence of the end of `text`, by trying them all."""
    for size in range(min(ngram, len(text) - 1), shortest - 1, -1):
        ends = [end for end in range(size - 1, len(text) - 1) if text[end - size + 1 : end + 1] == text[-size:]]
        followed = [end for end in ends if end + depth <= len(text) - 1]
        if ends:
            return followed[-1] if followed else ends[0]
    return -1


@pytest.mark.parametrize(
    ("ngram", "depth", "vocab", "shortest"),
    [(3, 4, 3, 1), (1, 2, 12, 1), (2, 10, 4, 1), (4, 1, 2, 1), (3, 40, 2, 1), (3, 4, 3, 3), (4, 3, 3, 2)],
)
def test_match_is_that_of_a_plain_search(ngram: int, depth: int, vocab: int, shortest: int) -> None:
    rng = np.random.default_rng(ngram)
    text = rng.integers(0, vocab, (200, 36)).astype(np.int32)
    length = rng.integers(0, 36, 200).astype(np.int32)
    found = jax.jit(find_match, static_argnums=(2, 3, 4))(jnp.array(text), jnp.array(length), ngram, depth, shortest)
    expected = [search(row[: end + 1].tolist(), ngram, depth, shortest) for row, end in zip(text, length, strict=True)]
    assert found.tolist() == expected
    assert -1 in expected and len(set(expected)) > 10


def test_draft_is_what_followed() -> None:
    # The last match that four tokens follow is the second; a fifth token is never known.
    text = [[1, 2, 3, 9, 1, 2, 3, 4, 5, 1, 2, 3, 7, 7]]
    drafter = PromptLookup(depth=4, ngram=2)
    tree = drafted(drafter, text, 11)
    assert tree.tokens.tolist() == [[3, 4, 5, 1, 2]] and tree.valid.all() and tree.rule == "match"
    tree = drafted(PromptLookup(depth=9, ngram=2), text, 11)
    assert tree.tokens[0].tolist() == [3, 9, 1, 2, 3, 4, 5, 1, 2, 3]
    tree = drafted(PromptLookup(depth=10, ngram=2), text, 11)
    assert tree.valid[0].tolist() == [True] * 10 + [False]
    tree = drafted(drafter, text, 3)
    assert tree.valid.tolist() == [[True, False, False, False, False]] and tree.tokens[0, 0] == 9


def drafted(drafter, text, length):
    class View:
        pass

    view = View()
    view.length = jnp.array([length], jnp.int32)
    view.sampling = batch_sampling([Sampling()])

    @jax.jit
    def draft(text):
        view.all_text = lambda: (text, view.length)
        return drafter.draft(None, view, (), text[:, length], None)[0]

    return draft(jnp.asarray(text, jnp.int32))


def test_a_very_long_chain_is_credited_to_its_depths() -> None:
    target, period = cyclic_target()
    drafter = PromptLookup(depth=150)
    made = generate(target, [period * 60], drafter=drafter, max_new_tokens=400, stop=[])
    assert max(made.writers[0]) == 150 and min(made.writers[0]) == 0


def test_a_period_is_drafted_to_full_depth() -> None:
    target, period = cyclic_target()
    drafter, steps = PromptLookup(depth=6), 5
    # Six tokens stand behind the first token of the prompt that comes again.
    generation = generate(target, [period * 3], drafter=drafter, max_new_tokens=1 + 7 * steps, stop=[])
    assert generation.tokens[0] == (period * 20)[: 1 + 7 * steps]
    assert generation.stats[0].histogram.tolist() == [0] * 6 + [steps]


def test_the_pending_token_ends_the_suffix() -> None:
    target, period = cyclic_target()
    # Only the pending token, not the prompt, has stood in the text before.
    stats = generate(target, [[period[0]] + [period[2]]], drafter=PromptLookup(), max_new_tokens=3, stop=[]).stats[0]
    assert stats.accepted_by_depth.sum() == 0
    stats = generate(
        target, [[*period, 11, period[2]]], drafter=PromptLookup(depth=2), max_new_tokens=4, stop=[]
    ).stats[0]
    assert stats.steps == 1 and stats.accepted_by_depth.tolist() == [1, 1]


def test_rows_do_not_share_their_text() -> None:
    target = random_target(vocab_size=12)
    prompts = [[1, 2, 3, 1, 2, 3, 1], [4, 4, 4], [9]]
    together = generate(target, prompts, drafter=PromptLookup(depth=3), max_new_tokens=30, stop=[])
    for row, prompt in enumerate(prompts):
        alone = generate(target, [prompt], drafter=PromptLookup(depth=3), max_new_tokens=30, stop=[])
        assert alone.tokens[0] == together.tokens[row] and alone.stats[0].steps == together.stats[row].steps


def test_nonsense_is_refused() -> None:
    for wrong in (PromptLookup(depth=0), PromptLookup(shortest=0)):
        with pytest.raises(UserError, match="of at least 1, got 0"):
            wrong.check(None)
    with pytest.raises(UserError, match=r"needs ngram of at least shortest \(3\), got 2"):
        PromptLookup(ngram=2, shortest=3).check(None)
