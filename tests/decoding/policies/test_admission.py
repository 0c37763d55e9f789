"""Which slots are verified: published numbers, brute force, and whether the text still follows the target."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding.calibration import calibration_error, sequential_temperatures
from decoding.policies import Scheduled, Scores
from decoding.policies.admission import admit, reach, until
from decoding.sampling import Sampling, batch_sampling
from decoding.trees import chain
from decoding.verify import verify
from eval.losslessness import SMALLEST_P, chi_square

SPEED = np.array([1.0, 0.5, 0.45])  # Not concave: two slots may pay where one does not.


def alone(confidence, speed):
    """Of requests that are decoded by themselves: lengths by `admit`, and what looks ahead, the length of the
    largest theta."""

    def one(confidence_D):
        reached = reach(confidence_D[None])
        gained = 1 + jnp.pad(jnp.cumsum(reached[0]), (1, 0))
        return admit(reached, speed)[0], jnp.argmax(gained * speed[: len(gained)])

    return jax.vmap(one)(confidence)


def by_hand(reached: np.ndarray, speed: np.ndarray) -> list[int]:
    """Lengths of `admit`."""
    rows, slots = reached.shape
    order = sorted(np.ndindex(rows, slots), key=lambda place: (-reached[place], place[1], place[0]))
    going = float(sum(reached[:, 0] > 0))
    lengths, total = [0] * rows, going
    seconds = list(1 / speed)
    while len(seconds) < rows * (1 + slots):  # Every further row takes as long as the last one did.
        seconds.append(seconds[-1] + (1 / speed[-1] - 1 / speed[-2]))
    thetas, stopped = [going / seconds[rows - 1]], False
    for count, (row, slot) in enumerate(order, start=1):
        total += reached[row, slot]
        thetas.append(total / seconds[rows + count - 1])
        stopped |= thetas[-1] <= thetas[-2]
        if not stopped:
            lengths[row] += 1
    return lengths


@pytest.mark.parametrize("known", [15, 7], ids=["all rows", "half of them"])
def test_a_batch_against_a_plain_loop(known) -> None:
    rng = np.random.default_rng(0)
    shape = (3, 4)
    program = jax.jit(admit)
    lengths_seen = set()
    for _ in range(40):
        reached = np.cumprod(rng.choice([1.0, 0.9, 0.75, 0.5], shape), axis=1)
        reached *= rng.uniform(size=(3, 1)) < 0.8  # Some texts have ended.
        # Twice as slow at most for fifteen rows as for one.
        speed = (1 / np.sort(rng.uniform(1, rng.choice([1.1, 2]), reached.size + 3)))[:known]
        lengths = np.asarray(program(jnp.asarray(reached), jnp.asarray(speed)))
        assert lengths.tolist() == by_hand(reached.astype(np.float32), speed.astype(np.float32))
        lengths_seen |= set(lengths.tolist())
    assert lengths_seen == {0, 1, 2, 3, 4}


V, ROWS = 3, 2**16
P = np.random.default_rng(1).dirichlet(np.ones(V), V + 1)  # First that of the root, then what follows each token.
Q = np.random.default_rng(2).dirichlet(np.ones(V), V + 1)


TOKENS = np.argmax(np.log(Q[0]) + np.random.default_rng(3).gumbel(size=(ROWS, V)), axis=1)
TOKENS = np.stack(
    [TOKENS, np.argmax(np.log(Q[1:])[TOKENS] + np.random.default_rng(4).gumbel(size=(ROWS, V)), axis=1)], axis=1
).astype(np.int32)
# The first slot's is always 0.8, the second's depends on the first token.
CONFIDENCE = np.stack([np.full(ROWS, 0.8), np.where(TOKENS[:, 0] == 0, 0.9, 0.0)], axis=1)
SOME = np.array([[0.9, 0.4, 0.9], [0.3, 0.9, 0.9], [0.9, 0.8, 0.5]])


def texts(tokens, lengths, noise):
    """Two tokens of every row: what verification of the first `lengths` slots leaves, continued from the target."""
    path = jnp.stack([jnp.zeros_like(lengths), 1 + tokens[:, 0], 1 + tokens[:, 1]], axis=1)
    drawn_from = jnp.asarray(Q, jnp.float32)[path[:, :2]], np.arange(2, dtype=np.int32)[None]
    tree = chain(2).fill(jnp.pad(tokens, ((0, 0), (1, 0))), "swor", *drawn_from)
    tree = tree.replace(valid=jnp.arange(3) <= lengths[:, None])
    keys = jax.vmap(jax.random.key)(jnp.arange(ROWS, dtype=jnp.uint32))
    sampling = batch_sampling([Sampling(temperature=1.0)])
    sampling = jax.tree.map(lambda x: jnp.broadcast_to(x, (ROWS,)), sampling)
    logits = jnp.log(jnp.asarray(P, jnp.float32))
    verdict = verify(tree, logits[path], sampling, keys, jnp.full(ROWS, 7), 2)
    first = verdict.tokens[:, 0]
    more = jnp.argmax(logits[1:][first] + noise, axis=1)
    return jnp.stack([first, jnp.where(verdict.drafts > 0, verdict.tokens[:, 1], more)], axis=1)


@functools.cache
def found() -> dict[str, Any]:
    """All that is computed on the device, in one program."""

    def program(tokens, confidence, noise, speed):
        q = jnp.asarray(Q)
        drawn = jnp.stack([q[0][tokens[:, 0]], q[1:][tokens[:, 0], tokens[:, 1]]], axis=1)
        stopped, anticipating = alone(confidence, jnp.array([1.0, 0.6, 0.45])), alone(confidence, speed)
        lengths = {
            "all": jnp.full(ROWS, 2),
            "threshold": until(confidence, 0.5),
            "early stop": stopped[0],
            "anticipating": anticipating[1],
            "of the drawn token": until(drawn, 0.3),
        }
        strings = {way: texts(tokens, length, noise) for way, length in lengths.items()}
        published = alone(jnp.array([[0.8, 0.9], [0.8, 0.0]]), speed)
        cut = until(jnp.asarray(SOME), 0.5)
        return {"lengths": lengths, "strings": strings, "published": published, "cut": cut}

    noise = np.random.default_rng(5).gumbel(size=(ROWS, V)).astype(np.float32)
    return jax.tree.map(np.asarray, jax.jit(program)(TOKENS, CONFIDENCE, noise, SPEED))


def test_published_numbers() -> None:
    """Paper, appendix A: theta is 1, then 0.9, then 1.134 or 0.81."""
    stopped, anticipating = found()["published"]
    assert stopped.tolist() == [0, 0]
    assert anticipating.tolist() == [2, 0]


def test_a_threshold_cuts_at_the_first_slot_below_it() -> None:
    assert found()["cut"].tolist() == [1, 0, 3]


@pytest.mark.parametrize(
    ("way", "lossless", "counts"),
    [
        ("all", True, {2}),
        ("threshold", True, {1, 2}),
        ("early stop", True, {1, 2}),
        ("anticipating", False, {0, 2}),
        ("of the drawn token", False, {0, 1, 2}),
    ],
)
def test_text_follows_the_target_unless_a_cut_looked_ahead(way: str, lossless: bool, counts: set[int]) -> None:
    assert set(found()["lengths"][way].tolist()) == counts
    seen = np.zeros((V, V), int)
    np.add.at(seen, tuple(found()["strings"][way].T), 1)
    test = chi_square(seen, P[0][:, None] * P[1:])
    assert test.p_value > SMALLEST_P if lossless else test.statistic > 1000, test


class Sure:
    """A network that is sure of its slots to a given degree, and prefers token 0."""

    vocab_size = 2

    def __init__(self, confidence):
        self.confidence = confidence

    def begin(self, root, slots):
        return self.extend((), 0, 0, root[:, None], None, None)

    def extend(self, scratch, level, at, tokens, parents, seen):
        logits = jnp.zeros((*tokens.shape, 2)).at[..., 0].set(1.0)
        return Scores(logits, confidence=self.confidence[:, level, None]), scratch


def test_a_chain_is_as_long_as_what_its_temperatures_leave_of_its_confidences_admits() -> None:
    """Logits are divided by the slot's temperature; the root is always there; by a threshold, by speed, and by both."""
    confidence = np.random.default_rng(7).uniform(0.2, 0.95, (40, 3)).astype(np.float32)
    temperatures = np.array([2.0, 0.5, 1.25])
    logit = np.log(confidence) - np.log1p(-confidence)
    tempered = 1 / (1 + np.exp(-logit / temperatures))
    speed = tuple(1 / (60 + n) for n in range(160))
    by_threshold = np.cumprod(tempered >= 0.6, axis=1).sum(axis=1)
    by_speed = np.array(by_hand(np.cumprod(tempered, axis=1), np.array(speed)))
    root, keys = jnp.zeros(40, jnp.int32), jax.vmap(jax.random.key)(jnp.arange(40, dtype=jnp.uint32))
    sampling = batch_sampling([Sampling()] * 40)

    @jax.jit
    def valid(confidence):
        whole = dict(depth=3, draws="top", temperatures=tuple(temperatures))
        policies = (Scheduled(threshold=0.6, **whole), Scheduled(speed=speed, **whole))
        policies += (Scheduled(threshold=0.6, speed=speed, **whole),)
        return [policy.grow(Sure(confidence), root, keys, sampling).tree.valid for policy in policies]

    found = [np.asarray(x) for x in valid(jnp.asarray(confidence))]
    for tree, lengths in zip(found, (by_threshold, by_speed, np.minimum(by_threshold, by_speed)), strict=True):
        assert np.array_equal(tree, np.arange(4) <= lengths[:, None])
        assert set(lengths.tolist()) == {0, 1, 2, 3}
    assert np.any(by_threshold < by_speed) and np.any(by_speed < by_threshold)


def test_an_anticipating_budget_biases_as_published() -> None:
    """Target (.7, .3), drafter (.5, .5), and a second slot that only token 0 promises: token 0 comes at .85, and by the
    rule that is served at .7."""
    kept = np.array([1.0, 0.6])  # Of token 0 and 1; what is rejected becomes token 0.
    for lengths, share in zip(found()["published"], (0.7, 0.85), strict=True):
        outcome = np.where(lengths > 0, [1.0, 1 - kept[1]], 0.7)
        assert 0.5 * outcome.sum() == pytest.approx(share)


def test_temperatures_make_products_mean_what_they_say() -> None:
    """Logits that are too sure of themselves, by another factor in every slot."""
    rng = np.random.default_rng(6)
    true = rng.normal(1.0, 1.0, (20000, 3))
    survived = np.cumprod(rng.uniform(size=true.shape) < 1 / (1 + np.exp(-true)), axis=1).astype(float)
    logits = true * [2.0, 0.6, 3.0]
    found = sequential_temperatures(logits, survived)
    np.testing.assert_allclose(found, [2.0, 0.6, 3.0], rtol=0.15)

    def error(logits: np.ndarray) -> float:
        return calibration_error(np.prod(1 / (1 + np.exp(-logits)), axis=1), survived[:, 2])

    assert error(logits / found) < 0.02 < error(logits)
