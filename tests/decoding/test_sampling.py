"""Sampling sampling against an independent numpy version, and draws that depend on request and position alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding.sampling import Sampling, apply_sampling, argmax, batch_sampling, best_tokens, draw, invert
from models.errors import UserError

VOCAB = 17


def reference(logits: np.ndarray, s: Sampling) -> np.ndarray:
    """Probabilities after temperature, top-k, top-p, min-p, each on what the one before left, in loops."""
    p = np.exp((logits - logits.max()) / s.temperature)
    p /= p.sum()
    order = sorted(range(len(p)), key=lambda i: -p[i])
    if s.top_k:
        for token in order[s.top_k :]:
            p[token] = 0.0
        p /= p.sum()
    mass = 0.0
    for token in order:
        if s.top_p < 1 and mass >= s.top_p:
            p[token], mass = 0.0, mass + p[token]
        else:
            mass += p[token]
    p /= p.sum()
    p[p < s.min_p * p.max()] = 0.0
    return p / p.sum()


SETTINGS = [
    Sampling(temperature=1.0),
    Sampling(temperature=0.6),
    Sampling(temperature=2.0, top_k=4),
    Sampling(temperature=1.0, top_k=100),
    Sampling(temperature=1.0, top_p=0.6),
    Sampling(temperature=1.5, top_p=0.01),
    Sampling(temperature=3.0, top_k=9, top_p=0.7),
    Sampling(temperature=1.2, min_p=0.1),
    Sampling(temperature=2.0, top_k=8, top_p=0.8, min_p=0.3),
]


@pytest.mark.parametrize("seed", range(3))
def test_sampling_matches_numpy(x64: None, seed: int) -> None:
    logits = 2 * np.random.default_rng(seed).normal(size=(len(SETTINGS), VOCAB))
    ours = jax.nn.softmax(apply_sampling(jnp.array(logits), batch_sampling(SETTINGS)), axis=-1)
    theirs = np.stack([reference(row, setting) for row, setting in zip(logits, SETTINGS, strict=True)])
    # Settings travel as float32.
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    assert np.array_equal(np.asarray(ours) > 0, theirs > 0)


def test_static_facts() -> None:
    assert batch_sampling([Sampling(), Sampling(top_k=3)]).greedy and not batch_sampling([Sampling(top_k=3)]).cuts
    mixed = batch_sampling([Sampling(), Sampling(temperature=1.0, top_p=0.9)])
    assert mixed.cuts and not mixed.greedy
    assert not batch_sampling([Sampling(temperature=1.0, min_p=0.5)]).cuts


def test_ties_at_a_threshold_are_kept() -> None:
    logits = jnp.array([[1.0, 3.0, 3.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    shaped = apply_sampling(
        logits, batch_sampling([Sampling(temperature=1.0, top_k=1), Sampling(temperature=1.0, top_p=0.2)])
    )
    assert np.isfinite(shaped).tolist() == [[False, True, True, False], [True] * 4]


def test_greedy_rows_ignore_sampling_and_keys() -> None:
    logits = jnp.array(np.random.default_rng(0).normal(size=(2, VOCAB)), jnp.float32)
    settings = [Sampling(), Sampling(temperature=1.0)]
    draws = []
    for seed in range(20):
        keys = jax.vmap(jax.random.key)(jnp.array([seed, seed]))
        draws.append(np.asarray(draw(logits, batch_sampling(settings), keys, jnp.array([5, 5]))))
    first, second = np.array(draws).T
    assert set(first) == {int(np.argmax(logits[0]))} and len(set(second)) > 3


def test_draws_depend_on_key_and_position_only() -> None:
    logits = jnp.zeros((4, 1000))
    sampling = batch_sampling([Sampling(temperature=1.0)] * 4)
    keys = jax.vmap(jax.random.key)(jnp.array([1, 1, 1, 2]))
    drawn = draw(logits, sampling, keys, jnp.array([7, 7, 8, 7])).tolist()
    assert drawn[0] == drawn[1] and len(set(drawn)) == 3
    alone = draw(logits[:1], batch_sampling([Sampling(temperature=1.0)]), keys[2:3], jnp.array([8]))
    assert int(alone[0]) == drawn[2]


def test_draw_follows_the_distribution(x64: None) -> None:
    logits = np.random.default_rng(3).normal(size=6)
    setting, samples = Sampling(temperature=0.8, top_p=0.9), 4000
    keys = jax.vmap(jax.random.key)(jnp.arange(samples))
    sampling = batch_sampling([setting] * samples)
    drawn = draw(jnp.broadcast_to(jnp.array(logits), (samples, 6)), sampling, keys, jnp.full(samples, 3))
    p = reference(logits, setting)
    observed, expected = np.bincount(drawn, minlength=6), p * samples
    assert observed[p == 0].sum() == 0
    statistic = np.sum((observed - expected)[p > 0] ** 2 / expected[p > 0])
    # p > 1e-4 for 5 degrees of freedom or fewer.
    assert statistic < 25.7


def test_inversion_gives_each_place_its_share(x64: None) -> None:
    """Of a grid over both random numbers, as exactly as the grid can tell; 150 places are three blocks."""
    mass = np.random.default_rng(5).exponential(size=150) * (np.random.default_rng(6).random(150) < 0.5)
    mass[64:128] *= 9
    mass[128:140] = 0
    side = 200
    grid = (np.stack(np.meshgrid(*[np.arange(side)] * 2), axis=-1).reshape(-1, 2) + 0.5) / side
    drawn = np.asarray(invert(jnp.broadcast_to(jnp.array(mass), (side**2, 150)), jnp.array(grid)))
    share = np.bincount(drawn, minlength=150) / side**2
    assert share[mass == 0].sum() == 0 and (mass == 0).any()
    blocks = np.array([mass[start : start + 64].sum() for start in (0, 64, 128)]).repeat(64)[:150]
    # A grid tells each of the two shares, of the block and inside it, to one in `side`.
    allowed = (blocks / mass.sum() + mass / blocks + 1 / side) / side
    assert (np.abs(share - mass / mass.sum()) <= allowed).all()
    ends = invert(jnp.broadcast_to(jnp.array(mass), (2, 150)), jnp.array([[0.0, 0.0], [1 - 1e-9, 1 - 1e-9]]))
    assert ends.tolist() == [np.flatnonzero(mass)[0], np.flatnonzero(mass)[-1]]


def test_inversion_finds_what_little_there_is() -> None:
    """Whatever a sum rounds to: one place with the smallest mass that float32 holds beside others with none."""
    mass = jnp.zeros((3, 200)).at[jnp.arange(3), jnp.array([0, 77, 199])].set(jnp.finfo(jnp.float32).tiny)
    for number in (0.0, 0.5, 1 - 2**-23):
        assert invert(mass, jnp.full((3, 2), number)).tolist() == [0, 77, 199]


def test_argmax_takes_the_first_of_equals() -> None:
    x = jnp.array([[1.0, 5.0, 5.0], [2.0, 2.0, 2.0], [-jnp.inf, -jnp.inf, 0.0]])
    assert argmax(x).tolist() == [1, 0, 2]


def test_best_tokens_are_best_first_and_distinct() -> None:
    x = jnp.array([0.0, 3.0, 1.0, 3.0])
    assert best_tokens(x, 1).tolist() == [1] and best_tokens(x, 3).tolist() == [1, 3, 2]


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        (dict(temperature=-0.1), "temperature must be 0 or more, got -0.1"),
        (dict(temperature=float("nan")), "temperature must be"),
        (dict(top_k=-1), "top_k must be"),
        (dict(top_p=0.0), r"top_p must be in \(0, 1\], got 0.0"),
        (dict(top_p=1.1), "top_p must be"),
        (dict(min_p=1.0), "min_p must be"),
    ],
)
def test_settings_out_of_range(setting: dict, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        Sampling(**setting)
