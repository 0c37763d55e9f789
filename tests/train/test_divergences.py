"""Divergences: closed forms against autodiff, identities, what masked teachers do, and sums by pieces of a text.

All of it is one program in float64; the tests read its results.
"""

import typing
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from models.errors import UserError
from train.objectives import divergences, pieces
from train.objectives.divergences import Divergence, Names, Rows, Student, divergence_measures, divergence_sums

R, V, H = 6, 7, 4  # Rows, tokens, width.
NAMES = [name for name in typing.get_args(Names) if name != "tvd++"]
BETAS = (0.0, 1e-4, 0.3, 0.5, 1.0)
DRAWS = 20_000


def drawn(seed: int, *shape: int) -> np.ndarray:
    return 2 * np.random.default_rng(seed).normal(size=shape)


def softmax(x: np.ndarray) -> np.ndarray:
    x = np.exp(x - np.max(x, axis=-1, keepdims=True))
    return x / np.sum(x, axis=-1, keepdims=True)


X, Y = drawn(0, R, V), drawn(1, R, V)  # Logits of the student and of the teacher.
Q, P = softmax(X), softmax(Y)
LOG_Q, LOG_P = np.log(Q), np.log(P)
# The last row has no token at all.
MASKED = np.where(np.array([[False] * 5 + [True] * 2] * (R - 1) + [[True] * V]), -np.inf, Y)
SOME = np.array([True, False, True, True, True, True])
B, S = 2, 9
TEXT: dict[str, Any] = {
    "hidden": [drawn(2, B, S, H), drawn(3, B, S, H)],
    "kernel": [drawn(4, H, V), drawn(5, H, V)],
    "scored": drawn(6, B, S, V),
    "counted": np.random.default_rng(7).integers(0, 2, (B, S)).astype(bool),
    "labels": np.random.default_rng(8).integers(0, V, (B, S)),
    "uniform": np.random.default_rng(9).uniform(size=(B, S, 2)),
}


def with_slope(function, x):
    """(values of all rows, slopes of their sum)."""
    return function(x), jax.grad(lambda x: jnp.sum(function(x)))(x)


def results(x, y, masked, text, uniform) -> dict[str, Any]:
    def of(divergence, y=y):
        return with_slope(
            lambda x: divergence.between(divergence.log_probabilities(x), divergence.log_probabilities(y)), x
        )

    found: dict[str, Any] = {name: of(Divergence(name)) for name in NAMES}
    found["itself"] = {name: of(Divergence(name), x) for name in NAMES}
    found["masked"] = {name: of(Divergence(name), masked) for name in NAMES}
    found["hot"] = {name: of(Divergence(name, temperature=2.0)) for name in NAMES}
    found["jsd by beta"] = [of(Divergence("jsd", beta=beta)) for beta in BETAS]
    found["jsd swapped"] = divergences.jsd(jax.nn.log_softmax(y), jax.nn.log_softmax(x), 0.5)
    found["teacher's slope"] = jax.grad(lambda y: sum(jnp.sum(of(Divergence(name), y)[0]) for name in NAMES))(y)
    log_q, log_p = jax.nn.log_softmax(x), jax.nn.log_softmax(y)
    tokens = divergences.drawn(jnp.broadcast_to(log_q[:1], (DRAWS, V)), uniform)
    found["tokens"] = tokens
    found["rewards"] = divergences.rewards(
        jnp.broadcast_to(log_q[0], (DRAWS, V)), log_p[:1] + jnp.zeros((DRAWS, 1)), tokens
    )
    found["advantages"] = divergences.standardised(found["rewards"], tokens > 0)
    found["text"] = {n: text_sums(text, n) for n in (1, 4)}
    found["hot text"] = hot_sums(text)
    rows = Rows(
        jnp.asarray(SOME)[None],
        masked[None],
        text["labels"][:1, :R],
        jnp.asarray(np.random.default_rng(10).uniform(size=(1, R, 2))),
    )
    found["drawn tokens"] = divergences.drawn(jax.nn.log_softmax(x / 8)[None], rows.uniform)
    for name, temperature in (("drawn slope", 1.0), ("hot drawn slope", 2.0)):
        divergence = Divergence("tvd++", temperature=temperature)
        found[name] = jax.grad(
            lambda x, divergence=divergence: divergence_sums(
                divergence, [Student(x, Partial(lambda x: x))], lambda x: x, rows, soft=0.7, hard=0.0
            )[0]
        )(x[None] * temperature / 8)
    agreed = Rows(jnp.ones((1, R), bool), x[None], rows.labels, rows.uniform)
    found["drawn slope of itself"] = jax.grad(
        lambda x: divergence_sums(
            Divergence("tvd++"), [Student(x, Partial(lambda x: x))], lambda x: x, agreed, soft=0.7, hard=0.0
        )[0]
    )(x[None])
    return found


def hot_sums(text):
    """The first student's sum and what is measured of it, at a temperature of two."""
    rows = Rows(text["counted"], text["scored"], text["labels"])
    student = Student(text["hidden"][0], Partial(lambda kernel, x: x @ kernel, text["kernel"][0]))
    hot = Divergence("forward_kl", temperature=2.0)
    sums = divergence_sums(hot, [student], lambda x: x, rows, soft=0.7, hard=0.2)
    return sums[0], divergence_measures(hot, [student], lambda x: x, rows)[0]


def text_sums(text, n):
    """Of each divergence (sums, slopes) in the students' parameters; and what is measured; cut in n."""
    rows = Rows(text["counted"], text["scored"], text["labels"], text["uniform"])

    def students(trained):
        return [
            Student(hidden, Partial(lambda kernel, x: x @ kernel, kernel))
            for hidden, kernel in zip(trained["hidden"], trained["kernel"], strict=True)
        ]

    def total(trained, name):
        sums = divergence_sums(Divergence(name), students(trained), lambda x: x, rows, soft=0.7, hard=0.2)
        return jnp.array([1.0, 2.0]) @ sums, sums

    kept, pieces.SCORES = pieces.SCORES, -(-B * S * V // n)
    try:
        trained = {name: text[name] for name in ("hidden", "kernel")}
        slopes = {
            name: jax.value_and_grad(lambda x, name=name: total(x, name), has_aux=True)(trained)
            for name in ("reverse_kl", "tvd++")
        }
        return slopes, divergence_measures(Divergence("jsd"), students(trained), lambda x: x, rows)
    finally:
        pieces.SCORES = kept


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    with jax.enable_x64(True):
        uniform = np.random.default_rng(0).uniform(size=(DRAWS, 2))
        return jax.tree.map(np.asarray, jax.jit(results)(*jax.device_put((X, Y, MASKED, TEXT, uniform))))


def test_a_drawn_divergence_is_learnt_by_its_policy_gradient(found) -> None:
    """-A(y) (e_y - q) of rows that count and whose teacher has a token at all: the last one has none."""
    counted = SOME & (np.arange(R) < R - 1)
    tokens, q, p = found["drawn tokens"][0], softmax(X / 8), softmax(MASKED[: R - 1])
    kept = np.append(np.take_along_axis(p > q[: R - 1], tokens[: R - 1, None], 1)[:, 0], False)
    centred = np.where(counted, kept - kept[counted].mean(), 0)
    advantage = centred / (np.sqrt(np.mean(centred[counted] ** 2)) + 1e-8)
    assert np.ptp(advantage) > 1
    expected = -0.7 * advantage[:, None] * (np.eye(V)[tokens] - q)
    np.testing.assert_allclose(found["drawn slope"][0], expected, atol=1e-12)
    hot = found["hot drawn slope"][0]
    # Of logits twice as large the student's draws are the same; the teacher's flattened choice is another.
    p = softmax(MASKED[: R - 1] / 2)
    kept = np.append(np.take_along_axis(p > q[: R - 1], tokens[: R - 1, None], 1)[:, 0], False)
    centred = np.where(counted, kept - kept[counted].mean(), 0)
    advantage = centred / (np.sqrt(np.mean(centred[counted] ** 2)) + 1e-8)
    assert np.ptp(advantage) > 1
    np.testing.assert_allclose(hot, -0.7 * 2 * advantage[:, None] * (np.eye(V)[tokens] - q), atol=1e-12)


def expected_values() -> dict[str, np.ndarray]:
    def kl(a, b):
        return np.sum(a * np.log(a / b), axis=-1)

    alpha, middle = np.minimum(P, Q).sum(axis=-1), (P + Q) / 2
    weight = np.exp(-3 * alpha)
    return {
        "forward_kl": kl(P, Q),
        "reverse_kl": kl(Q, P),
        "jsd": (kl(P, middle) + kl(Q, middle)) / 2,
        "skewed_kl": kl(P, 0.1 * P + 0.9 * Q),
        "skewed_reverse_kl": kl(Q, 0.1 * Q + 0.9 * P),
        "tvd": 1 - alpha,
        "nla": -np.log(alpha),
        "hybrid": weight * kl(P, Q) + (1 - weight) * (1 - alpha),
    }


def expected_slopes() -> dict[str, np.ndarray]:
    reverse = np.sum(Q * (LOG_Q - LOG_P), axis=-1, keepdims=True)
    alpha = np.minimum(P, Q).sum(axis=-1, keepdims=True)

    def of_scores(in_q):
        """The slope in the logits of what has the slope `in_q` in q."""
        return Q * (in_q - np.sum(Q * in_q, axis=-1, keepdims=True))

    variation = of_scores(np.sign(Q - P)) / 2
    near_q, near_p = 0.1 * P + 0.9 * Q, 0.1 * Q + 0.9 * P
    return {
        "forward_kl": Q - P,
        "reverse_kl": Q * (LOG_Q - LOG_P - reverse),
        "jsd": of_scores(np.log(Q / ((P + Q) / 2))) / 2,
        "skewed_kl": of_scores(-0.9 * P / near_q),
        "skewed_reverse_kl": of_scores(np.log(Q / near_p) - 0.1 * Q / near_p),
        "tvd": variation,
        "nla": variation / alpha,
        "hybrid": np.exp(-3 * alpha) * (Q - P) + (1 - np.exp(-3 * alpha)) * variation,
    }


def test_values_are_those_of_the_definitions(found) -> None:
    assert set(expected_values()) == set(NAMES)
    for name, value in expected_values().items():
        np.testing.assert_allclose(found[name][0], value, rtol=1e-10, err_msg=name)


def test_slopes_are_the_closed_forms(found) -> None:
    assert set(expected_slopes()) == set(NAMES)
    for name, slope in expected_slopes().items():
        np.testing.assert_allclose(found[name][1], slope, atol=1e-12, err_msg=name)


def test_of_a_teacher_that_agrees_nothing_is_learnt(found) -> None:
    for name, (value, slope) in found["itself"].items():
        np.testing.assert_allclose(value, 0, atol=1e-12, err_msg=name)
        np.testing.assert_allclose(slope, 0, atol=1e-12, err_msg=name)
    np.testing.assert_array_equal(found["drawn slope of itself"], 0)
    np.testing.assert_array_equal(found["teacher's slope"], 0)


def test_jsd_has_its_end_points_its_bound_and_its_symmetry(found) -> None:
    for place, name in ((0, "forward_kl"), (-1, "reverse_kl")):
        np.testing.assert_array_equal(found["jsd by beta"][place][0], found[name][0])
    # The formula itself falls to 0, as beta times forward KL.
    np.testing.assert_allclose(found["jsd by beta"][1][0], 1e-4 * found["forward_kl"][0], rtol=2e-2)
    np.testing.assert_allclose(found["jsd swapped"], found["jsd"][0], rtol=1e-12)
    assert np.all(found["jsd"][0] <= np.log(2)) and np.any(found["jsd"][0] > 0.3)


def test_tokens_that_the_teacher_cannot_draw_leave_everything_finite(found) -> None:
    """Forward KL is that over the tokens it can draw, reverse KL drops nothing, and no token at all costs nothing."""
    p = np.where(np.isfinite(MASKED), P, 0)
    p /= np.maximum(p.sum(axis=-1, keepdims=True), 1e-300)
    for name, (value, slope) in found["masked"].items():
        assert np.isfinite(value).all() and np.isfinite(slope).all(), name
        assert value[-1] == 0 and not slope[-1].any(), name
    with np.errstate(divide="ignore", invalid="ignore"):
        forward = np.nansum(p[:-1] * (np.log(p[:-1]) - LOG_Q[:-1]), axis=-1)
    np.testing.assert_allclose(found["masked"]["forward_kl"][0][:-1], forward, rtol=1e-12)
    reverse = np.sum(Q[:-1] * (LOG_Q[:-1] - np.maximum(np.log(np.maximum(p[:-1], 1e-300)), -50)), axis=-1)
    np.testing.assert_allclose(found["masked"]["reverse_kl"][0][:-1], reverse, rtol=1e-12)
    np.testing.assert_allclose(found["masked"]["tvd"][0][:-1], np.abs(p - Q)[:-1].sum(axis=-1) / 2, rtol=1e-12)


def test_temperature_flattens_both_and_keeps_the_size_of_slopes(found) -> None:
    q, p = softmax(X / 2), softmax(Y / 2)
    np.testing.assert_allclose(found["hot"]["forward_kl"][0], 4 * np.sum(p * np.log(p / q), axis=-1), rtol=1e-10)
    np.testing.assert_allclose(found["hot"]["forward_kl"][1], 2 * (q - p), atol=1e-12)
    np.testing.assert_allclose(found["hot"]["tvd"][0], 2 * np.sum(np.abs(q - p), axis=-1), rtol=1e-10)


def test_what_verification_keeps_is_one_less_the_total_variation(found) -> None:
    """Tokens drawn from q and kept with min(1, p / q), counted."""
    kept = np.minimum(1, P[0] / Q[0])[found["tokens"]]
    alpha = 1 - found["tvd"][0][0]
    assert abs(kept.mean() - alpha) < 4 * kept.std() / DRAWS**0.5
    frequency = np.bincount(found["tokens"], minlength=V) / DRAWS
    assert np.max(np.abs(frequency - Q[0]) / np.sqrt(Q[0] / DRAWS)) < 4.5


def test_the_sampled_form_expects_the_slope_of_total_variation(found) -> None:
    """With bare rewards; standardised ones only change its size."""
    tokens, reward = found["tokens"], found["rewards"]
    np.testing.assert_array_equal(reward, (P[0] > Q[0])[tokens])
    exact = np.sum(Q[0] * np.where(P[0] > Q[0], -1.0, 0.0) * (np.eye(V) - Q[0]).T, axis=-1)
    np.testing.assert_allclose(exact, found["tvd"][1][0], atol=1e-12)
    sampled = np.mean(-1.0 * reward[:, None] * (np.eye(V)[tokens] - Q[0]), axis=0)
    np.testing.assert_allclose(sampled, exact, atol=4 / DRAWS**0.5)
    counted, advantage = tokens > 0, found["advantages"]
    assert not advantage[~counted].any() and abs(advantage[counted].mean()) < 1e-6
    assert advantage[counted].std() == pytest.approx(1)


def test_sums_over_a_text_are_those_of_its_rows_however_it_is_cut(found) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-11), found["text"][4], found["text"][1])
    slopes, measured = found["text"][1]
    (_, sums), _ = slopes["reverse_kl"]
    for k in range(2):
        log_q = np.log(softmax(TEXT["hidden"][k] @ TEXT["kernel"][k]))
        q, p = np.exp(log_q), softmax(TEXT["scored"])
        hard = -np.take_along_axis(log_q, TEXT["labels"][..., None], axis=-1)[..., 0]
        loss = 0.7 * np.sum(q * np.log(q / p), axis=-1) + 0.2 * hard
        np.testing.assert_allclose(sums[k], loss[TEXT["counted"]].sum(), rtol=1e-10)
        np.testing.assert_allclose(measured[k]["cross_entropy"], hard[TEXT["counted"]].sum(), rtol=1e-10)
        alpha = np.minimum(p, q).sum(axis=-1)
        np.testing.assert_allclose(measured[k]["alpha"], alpha[TEXT["counted"]].sum(), rtol=1e-10)
        agree = (q.argmax(axis=-1) == p.argmax(axis=-1)) & TEXT["counted"]
        assert measured[k]["agreement"] == agree.sum()


def test_a_temperature_is_of_the_divergence_alone(found) -> None:
    """Not of the text's own tokens beside it, nor of anything that is measured but the loss."""
    logits, counted = TEXT["hidden"][0] @ TEXT["kernel"][0], TEXT["counted"]
    (q, p), (flat_q, flat_p) = ([softmax(x / t) for x in (logits, TEXT["scored"])] for t in (1, 2))
    hard = -np.log(np.take_along_axis(q, TEXT["labels"][..., None], axis=-1)[..., 0])
    soft = 4 * np.sum(flat_p * np.log(flat_p / flat_q), axis=-1)
    total, measured = found["hot text"]
    np.testing.assert_allclose(total, (0.7 * soft + 0.2 * hard)[counted].sum(), rtol=1e-10)
    expected = {
        "loss": soft,
        "alpha": np.minimum(q, p).sum(axis=-1),
        "agreement": q.argmax(axis=-1) == p.argmax(axis=-1),
        "accuracy": q.argmax(axis=-1) == TEXT["labels"],
        "cross_entropy": hard,
    }
    for name, value in expected.items():
        np.testing.assert_allclose(measured[name], value[counted].sum(), rtol=1e-10, err_msg=name)
    assert 0 < measured["accuracy"] != measured["agreement"]


def test_numbers_outside_their_range_are_refused() -> None:
    for wrong in ({"beta": 1.5}, {"skew": 1.0}, {"temperature": 0.0}):
        (name,) = wrong
        with pytest.raises(UserError, match=f"divergence.{name}"):
            Divergence(**wrong)
