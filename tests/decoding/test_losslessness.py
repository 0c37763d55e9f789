"""Sampled text follows the target distribution: chi-square against exact enumeration, and what the test can catch.

Every test here draws strings of 3 tokens over a vocabulary of 5 (at most 125 cells), 2048 strings per setting, with
fixed seeds; it passes at p > 1e-4.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding import loop
from decoding.sampling import Sampling, draw
from decoding.verify import Typical, verify
from eval.losslessness import ChiSquare, chi_square, count_strings, sampled_strings, string_law
from tests.decoding.drafter_cases import CASES, random_target

SAMPLES, PROMPT, LENGTH, VOCAB = 2048, [1, 2, 3], 3, 5
SETTINGS = {
    "temperature": Sampling(temperature=1.5),
    "top_p": Sampling(temperature=2.0, top_p=0.7),
    "top_k": Sampling(temperature=3.0, top_k=3),
    "min_p": Sampling(temperature=1.5, min_p=0.4),
}

pytestmark = pytest.mark.usefixtures("x64")


@functools.cache
def target():
    with jax.enable_x64(True):
        return random_target(vocab_size=VOCAB, width=16, head_dim=4, scale=8.0)


@functools.cache
def law(setting: str) -> np.ndarray:
    with jax.enable_x64(True):
        return string_law(target(), PROMPT, LENGTH, SETTINGS[setting])


def strings_of(name: str, **arguments) -> np.ndarray:
    drafter, params = CASES[name](target(), jax.random.key(3))
    settings = list(SETTINGS.values())
    arguments = dict(drafter=drafter, drafter_params=params, samples=SAMPLES, batches=2, seed=1) | arguments
    return sampled_strings(target(), PROMPT, LENGTH, settings, **arguments)


def judge(strings: np.ndarray) -> dict[str, ChiSquare]:
    return {
        setting: chi_square(count_strings(drawn, VOCAB), law(setting))
        for setting, drawn in zip(SETTINGS, strings, strict=True)
    }


@functools.cache
def plain_strings() -> np.ndarray:
    with jax.enable_x64(True):
        return strings_of("none")


def test_law_is_a_distribution_and_warps_bite() -> None:
    for setting in SETTINGS:
        assert law(setting).shape == (VOCAB,) * LENGTH and abs(law(setting).sum() - 1) < 1e-9
    assert (law("temperature") > 0).all() and (law("temperature") * SAMPLES > 5).sum() > 25
    # Three of five tokens at every place.
    assert (law("top_k") > 0).sum() == 3**LENGTH
    assert 1 < (law("top_p") > 0).sum() < VOCAB**LENGTH and 1 < (law("min_p") > 0).sum() < VOCAB**LENGTH


def test_law_is_the_product_of_conditionals() -> None:
    string = (4, 0, 2)
    logits = np.asarray(target().apply([[*PROMPT, *string]]).logits)[0, len(PROMPT) - 1 : -1] / 1.5
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    assert np.isclose(law("temperature")[string], np.prod([p[i, token] for i, token in enumerate(string)]), rtol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_sampled_strings_follow_the_target(name: str) -> None:
    strings = strings_of(name)
    for setting, result in judge(strings).items():
        assert result.samples == SAMPLES and result.degrees > 5
        assert result.p_value > 1e-4, f"{setting}: {result}"
    # Stronger: drafts change how the text is made, never which text a seed makes.
    assert np.array_equal(strings, plain_strings())


def test_typical_acceptance_is_caught() -> None:
    for setting, result in judge(strings_of("medusa", typical=Typical())).items():
        assert result.p_value < 1e-12, f"{setting}: {result}"


def redraws_after_rejection(tree, logits, warps, keys, length, max_depth):
    """A published mistake: when every child is rejected, the next token is drawn afresh, as if none had been tried."""
    verdict = verify(tree, logits, warps, keys, length, max_depth)
    last = jnp.take_along_axis(verdict.path, verdict.drafts[:, None], axis=1)
    visited = jnp.take_along_axis(logits, last[:, :, None], axis=1)[:, 0]
    again = draw(visited, warps, keys, length + 1000 + verdict.drafts)
    places = jnp.arange(verdict.tokens.shape[1])
    return verdict.replace(tokens=jnp.where(places == verdict.drafts[:, None], again[:, None], verdict.tokens))


def test_a_biased_verifier_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    original = loop.run

    def rerun(*arguments):
        return original.__wrapped__(*arguments)

    monkeypatch.setattr(loop, "verify", redraws_after_rejection)
    monkeypatch.setattr(loop, "run", jax.jit(rerun, static_argnums=(0, 1, 7)))
    results = judge(strings_of("medusa"))
    assert max(result.p_value for result in results.values()) < 1e-4
    assert results["temperature"].p_value < 1e-12


def test_another_temperature_and_the_impossible_are_seen() -> None:
    warmer = string_law(target(), PROMPT, LENGTH, Sampling(temperature=1.2))
    assert chi_square(count_strings(plain_strings()[0], VOCAB), warmer).p_value < 1e-6
    impossible = plain_strings()[2].copy()
    impossible[0] = np.argwhere(law("top_k") == 0)[0]
    assert chi_square(count_strings(impossible, VOCAB), law("top_k")).p_value == 0


def test_chi_square_arithmetic() -> None:
    stats = pytest.importorskip("scipy.stats")
    law_, counts = np.array([0.5, 0.3, 0.19, 0.006, 0.004]), np.array([480, 320, 185, 9, 6])
    ours = chi_square(counts, law_)
    theirs = stats.chisquare([480, 320, 185, 9, 6], law_ * 1000)
    # 0.004 x 1000 < 5 is pooled, alone, into the last cell.
    assert (
        ours.degrees == 4 and np.isclose(ours.statistic, theirs.statistic) and np.isclose(ours.p_value, theirs.pvalue)
    )
    pooled = chi_square(counts, law_, fewest=7)
    theirs = stats.chisquare([480, 320, 185, 15], [500, 300, 190, 10])
    assert pooled.degrees == 3 and np.isclose(pooled.p_value, theirs.pvalue)
