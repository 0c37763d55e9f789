"""Losses of block drafters: published numbers, identities, and slopes against finite differences.

All of it is one program in float64; the tests read its results.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.objectives import block_losses, divergences
from train.objectives.block_losses import Terms, slot_losses

S, V = 5, 5  # As many slots as tokens, so that every token is the label of one slot.
TERMS = ("hard", "l1", "forward_kl", "nla", "hybrid")
LIKELY, COUNTED = np.array([[0.3, 0.9, 0.5, 0.2]] * 2), np.array([[False, True, True, True], [True, True, False, True]])


def drawn(seed: int, scale: float) -> np.ndarray:
    x = scale * np.random.default_rng(seed).normal(size=(S, V))
    return x - np.log(np.sum(np.exp(x), axis=-1, keepdims=True))


Q, P = drawn(0, 1.0), drawn(1, 2.0)


def results(q, p, likely, counted) -> dict[str, Any]:
    labels, weight = jnp.arange(V), divergences.hybrid_weight(divergences.acceptance(q, p))
    one_hot = jnp.log(jnp.eye(V))

    def total(term, x, of=p):
        return jnp.sum(slot_losses(Terms(**{term: 1.0}), jax.nn.log_softmax(x), of, labels, weight))

    found: dict[str, Any] = {"alpha": divergences.acceptance(q, p), "weight": weight}
    found |= {name: slot_losses(Terms(**{name: 1.0}), q, p, labels) for name in TERMS}
    found["all"] = slot_losses(Terms(1, 2, 3, 4, 5), q, p, labels)
    found["one weight"] = divergences.hybrid(q, p, jnp.float64(0.3))
    steps = 1e-6 * jnp.eye(S * V).reshape(-1, S, V)
    for name in TERMS:
        found[f"slope {name}"] = jax.grad(lambda x, name=name: total(name, x))(q)
        rises, falls = (jax.lax.map(lambda x, name=name: total(name, x), q + sign * steps) for sign in (1, -1))
        found[f"differences {name}"] = ((rises - falls) / 2e-6).reshape(S, V)
    for name in ("nla", "forward_kl"):
        found[f"one-hot {name}"] = jax.value_and_grad(lambda x, name=name: total(name, x, one_hot))(q)
    found["disjoint"] = divergences.nla(one_hot[:1], one_hot[1:2])
    survives = jnp.exp(q[0])
    logit = jnp.log(survives / (1 - survives))
    confidence = jax.value_and_grad(lambda x, s: jnp.sum(block_losses.confidence_loss(x, s)), (0, 1))
    found["confidence"] = confidence(logit, survives)
    found["d_pace"] = block_losses.d_pace(jnp.log(likely), counted)
    found["lengths"] = jax.grad(lambda log_s: jnp.sum(jnp.cumprod(jnp.exp(log_s))))(jnp.log(likely[0, 1:] / 2 + 0.5))
    found["unbroken"] = block_losses.unbroken(counted)
    found["decay"] = block_losses.exponential_decay(3, 4.0), block_losses.exponential_decay(3, None)
    return found


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, jax.jit(results)(Q, P, LIKELY, COUNTED))


def test_d_pace_has_its_published_weights_which_are_slopes_of_expected_length(found) -> None:
    np.testing.assert_allclose(found["d_pace"][0], [0, 2.09, 1.14, 0.4275], rtol=1e-12)
    np.testing.assert_allclose(found["d_pace"][0, 1:], found["lengths"], rtol=1e-12)
    # What does not count is as if it were not there.
    s = LIKELY[1] / 2 + 0.5
    lengths = np.cumprod(s[[0, 1, 3]])
    np.testing.assert_allclose(found["d_pace"][1], [lengths.sum(), lengths[1:].sum(), 0, lengths[2]], rtol=1e-12)


def test_losses_are_what_they_are_called(found) -> None:
    q, p = np.exp(Q), np.exp(P)
    alpha = np.minimum(p, q).sum(axis=-1)
    kl, tv = np.sum(p * (P - Q), axis=-1), 1 - alpha
    expected = {
        "alpha": alpha,
        "hard": -np.diag(Q),
        "l1": 2 * tv,
        "forward_kl": kl,
        "nla": -np.log(alpha),
        "hybrid": np.exp(-3 * alpha) * kl + (1 - np.exp(-3 * alpha)) * tv,
        "one weight": 0.3 * kl + 0.7 * tv,
    }
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-10, err_msg=name)
    np.testing.assert_allclose(found["all"], sum((i + 1) * expected[name] for i, name in enumerate(TERMS)))


@pytest.mark.parametrize("term", TERMS)
def test_slopes_are_those_of_finite_differences(term: str, found) -> None:
    """Of `hybrid` with its weight held, which is constant."""
    np.testing.assert_allclose(found[f"slope {term}"], found[f"differences {term}"], atol=1e-8)


def test_nlas_slope_is_total_variations_over_acceptance(found) -> None:
    np.testing.assert_allclose(found["slope nla"], found["slope l1"] / 2 / found["alpha"][:, None], atol=1e-12)


def test_for_one_hot_targets_nla_and_kl_are_the_cross_entropy(found) -> None:
    for name in ("one-hot nla", "one-hot forward_kl"):
        value, slope = found[name]
        np.testing.assert_allclose(value, -np.trace(Q))
        np.testing.assert_allclose(slope, np.exp(Q) - np.eye(V), atol=1e-12)


def test_of_nothing_accepted_nla_stays_finite(found) -> None:
    assert found["disjoint"] == pytest.approx(-np.log(1e-5))


def test_confidence_is_learnt_where_it_is_the_soft_label(found) -> None:
    value, (slope, of_label) = found["confidence"]
    s = np.exp(Q[0])
    assert not of_label.any(), "a draft is not made worse so that it is foreseen better"
    np.testing.assert_allclose(slope, 0, atol=1e-12)
    np.testing.assert_allclose(value, -np.sum(s * np.log(s) + (1 - s) * np.log(1 - s)))


def test_slots_count_less_the_later_and_none_behind_a_gap(found) -> None:
    np.testing.assert_allclose(found["decay"], [np.exp([0, -0.25, -0.5]), np.ones(3)], rtol=1e-6)
    np.testing.assert_array_equal(found["unbroken"], [[False] * 4, [True, True, False, False]])
