"""Losses by pieces of a text: equal to the plain ones with their slopes, and no array of all scores of a text."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial

from models.errors import UserError
from tests.train.conftest import SHAPE
from train import trainer
from train.data.corpus import open_corpus
from train.data.features import Array
from train.objectives import guess, pieces
from train.objectives.divergences import Divergence
from train.objectives.guess import Guess, Labels, Teacher, Weights, losses, measures
from train.objectives.target_features import _SCORES, _TOKENS, TargetFeatures, rounded

B, S, H, V, W = 2, 7, 4, 11, 5


def drawn(rng: np.random.Generator, *shape: int) -> jax.Array:
    return jnp.asarray(rng.normal(size=shape))


def setting():
    """(trained, guesses of it, teacher) of three depths, the last of them made from some places only."""
    rng = np.random.default_rng(0)
    trained = {
        "hidden": [drawn(rng, B, S, H), drawn(rng, B, S, H), drawn(rng, B, 3, H)],
        "kernel": [drawn(rng, H, W) for _ in range(3)],
    }
    known = jnp.array([1, 2, 5, 7, 10])
    head = drawn(rng, H, V)
    hidden = drawn(rng, B, S, H)
    choice = jnp.argmax(hidden @ head, axis=-1)
    holds = jnp.zeros(V, bool).at[known].set(True)[choice]
    teacher = Teacher(hidden, lambda x: x @ head[:, known], hidden, known, choice, holds)
    at = jnp.asarray(rng.integers(0, S - 3, (B, 3)))
    places = [None, None, at]
    labels = [
        Labels(jnp.asarray(rng.integers(0, V, shape)), jnp.asarray(rng.integers(0, 2, shape), bool))
        for shape in ((B, S), (B, S), (B, 3))
    ]
    # As for every objective, what has no teacher has no label.
    labels = [
        own if where is not None else own._replace(counted=own.counted.at[:, S - 1 - i :].set(False))
        for i, (own, where) in enumerate(zip(labels, places, strict=True))
    ]

    def guesses(trained):
        reads = [Partial(lambda kernel, x: x @ kernel, kernel) for kernel in trained["kernel"]]
        return [Guess(*of) for of in zip(trained["hidden"], places, labels, reads, strict=True)]

    return trained, guesses, teacher


def defined(guesses, teacher, weights):
    """The same sums, from the definition and all at once."""
    found = []
    for i, (hidden, at, labels, read) in enumerate(guesses):
        places = jnp.broadcast_to(jnp.arange(S), (B, S)) if at is None else at
        seat = jnp.minimum(places + i + 1, S - 1)
        rows = jnp.arange(B)[:, None]
        feature, learnt = teacher.scored[rows, seat], teacher.learnt[rows, seat]
        log_q, t = jax.nn.log_softmax(read(hidden)), jax.nn.softmax(teacher.read(feature))
        distance = jnp.abs(hidden - feature)
        is_label = labels.tokens[..., None] == teacher.known
        loss = -weights.hard * jnp.sum(jnp.where(is_label, log_q, 0), axis=-1)
        loss -= weights.soft * jnp.sum(t * log_q, axis=-1)
        loss += weights.feature * jnp.mean(jnp.where(distance < 1, distance**2 / 2, distance - 0.5), axis=-1)
        held = is_label.any(axis=-1) | (weights.hard == 0)
        found.append(jnp.sum(loss * (labels.counted & learnt & held)))
    return jnp.stack(found)


def entropies(guesses, teacher):
    """The teacher's, over the rows that count."""
    t = jax.nn.softmax(teacher.read(teacher.scored))
    entropy, found = -jnp.sum(t * jnp.log(t), axis=-1), []
    for i, (_, at, labels, _) in enumerate(guesses):
        places = jnp.broadcast_to(jnp.arange(S), (B, S)) if at is None else at
        seat, rows = jnp.minimum(places + i + 1, S - 1), jnp.arange(B)[:, None]
        found.append(jnp.sum(entropy[rows, seat] * (labels.counted & teacher.learnt[rows, seat])))
    return jnp.stack(found)


@pytest.mark.usefixtures("x64")
def test_losses_and_their_slopes_are_those_of_the_whole_text(monkeypatch):
    trained, guesses, teacher = setting()
    weights, factors = Weights(0.5, 0.7, 0.3, 1.0), jnp.array([1.0, 0.5, 2.0])

    def slopes(sums):
        return jax.value_and_grad(lambda trained: (factors @ sums(trained), sums(trained)), has_aux=True)(trained)

    def everything():
        return {
            "defined": slopes(lambda trained: defined(guesses(trained), teacher, weights)),
            **{f"{n}": slopes(lambda trained, n=n: by_pieces(trained, n)[0]) for n in (1, 3)},
            "measured": [measured(n) for n in (1, 3)],
            "diverging": [
                losses(guesses(trained), teacher, Weights(0.0, 1.0, 0.0, 1.0, divergence=of))[0]
                for of in (Divergence("forward_kl"), Divergence("tvd"))
            ],
            "crossed": losses(guesses(trained), teacher, Weights(0.0, 1.0, 0.0, 1.0))[0],
            "choices": [guess.first_choices(lambda x: x @ jnp.eye(H, V), teacher.scored)],
        }

    def by_pieces(trained, n):
        monkeypatch.setattr(pieces, "SCORES", -(-B * S * W // n))
        return losses(guesses(trained), teacher, weights)

    def measured(n):
        monkeypatch.setattr(pieces, "SCORES", -(-B * S * W // n))
        return measures(guesses(trained), teacher, weights)

    found = jax.jit(everything)()
    for n in ("1", "3"):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12), found[n], found["defined"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), *found["measured"])
    for i, depth in enumerate(found["measured"][1]):
        np.testing.assert_allclose(depth["loss"][0], found["defined"][0][1][i], atol=1e-12)
    # Forward KL is the cross-entropy less the teacher's own.
    forward, variation = found["diverging"]
    less = defined(guesses(trained), teacher, Weights(0.0, 1.0, 0.0, 1.0)) - entropies(guesses(trained), teacher)
    np.testing.assert_allclose(forward, less, atol=1e-12)
    np.testing.assert_allclose(found["crossed"] - forward, entropies(guesses(trained), teacher), atol=1e-12)
    assert all(0 <= tv <= np.sum(of.labels.counted) for tv, of in zip(variation, guesses(trained), strict=True))
    np.testing.assert_array_equal(found["choices"][0], np.argmax(teacher.scored @ np.eye(H, V), axis=-1))


@pytest.mark.parametrize(
    ("name", "objective"),
    [
        ("lm", {"model": {**SHAPE, "tied_embeddings": True}}),
        ("draft_heads", {"hard": 0.0, "soft": 1.0}),
        ("eagle3", {"vocabulary": 100}),
        ("distill", {"hard": 0.5}),
        ("distill", {"divergence": {"name": "tvd++"}}),
        ("minillm", {}),
        ("exits", {"exits": (1,), "soft": 1.0}),
    ],
)
def test_no_step_holds_the_scores_of_a_whole_text(name, objective, job, monkeypatch):
    remat = "none" if name == "draft_heads" else "layers"
    config = job(name, objective=objective, precision="bfloat16", remat=remat)
    plan = trainer.make_plan(config, open_corpus(config).facts)
    monkeypatch.setattr(pieces, "SCORES", config.batch_size * plan.objective.model.vocab_size * 5)
    batch = {key: jax.ShapeDtypeStruct((config.batch_size, config.length), np.int32) for key in BATCH}
    if name == "minillm":
        made = plan.objective.refreshed(config.length)
        batch |= {key: jax.ShapeDtypeStruct((config.batch_size, *shape), dtype) for key, (shape, dtype) in made.items()}
    step = trainer.make_step(plan)

    def largest():
        text = jax.jit(lambda *a: step(*a)).lower(plan.state, plan.frozen, batch).as_text()
        return max(
            np.prod([int(x) for x in dims.split("x")[:-1]]) for dims in re.findall(r"tensor<((?:\d+x)+\w+)>", text)
        )

    scores = config.batch_size * config.length * (100 if name == "eagle3" else plan.objective.model.vocab_size)
    assert largest() < scores
    if name == "lm":  # The search finds them where nothing is cut.
        monkeypatch.undo()
        assert largest() == scores


BATCH = ("tokens", "segments", "mask")


def test_what_keeps_everything_says_so(job):
    config = job("draft_heads", remat="layers")
    with pytest.raises(UserError, match="remat must be none, got layers: the objective DraftHeads"):
        trainer.make_plan(config, open_corpus(config).facts)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("name", "objective"),
    [
        ("lm", {"labels": "assistant"}),
        pytest.param("eagle3", {"vocabulary": 100}, marks=pytest.mark.slow),
        pytest.param("eagle", {"noise": 0.0}, marks=pytest.mark.slow),
        pytest.param("draft_heads", {"soft": 1.0}, marks=pytest.mark.slow),
    ],
)
def test_parts_and_recomputation_change_no_gradient(name, objective, job):
    again = name != "draft_heads"
    ways = (
        {},
        {"accumulate": 4, "remat": "layers" if again else "none"},
        {"accumulate": 2, "remat": "products" if again else "none"},
    )
    configs = [job(name, objective=objective, **way) for way in ways]
    corpus = open_corpus(configs[0])
    plans = [trainer.make_plan(config, corpus.facts) for config in configs]
    plans[0].objective.scan_data(corpus.train)
    frozen = plans[0].objective.load_base(plans[0].mesh) if plans[0].base else None
    params = jax.tree.map(
        lambda leaf: np.random.default_rng(leaf.size).normal(0.2, 0.1, leaf.shape), plans[0].state["params"]
    )
    frozen = jax.tree.map(lambda x: np.asarray(x, np.float64 if x.dtype == jnp.float32 else x.dtype), frozen)
    batch = dict(next(corpus.batches(configs[0].batch_size, 0)))
    # Rows weigh differently, so that the mean of the parts' means is another number.
    batch["mask"] = (np.random.default_rng(0).uniform(size=batch["mask"].shape) < [[0.2], [0.4], [0.6], [0.8]]).astype(
        int
    )

    def everything(params, frozen, batch):
        key, progress = jax.random.key(0), jnp.zeros(())
        return [trainer.gradient_of(plan, params, frozen, batch, key, progress) for plan in plans]

    plain, *others = jax.jit(everything)(params, frozen, batch)
    for other in others:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12), other, plain)


@pytest.mark.parametrize("name", ["lm", pytest.param("draft_heads", marks=pytest.mark.slow)])
def test_narrow_products_change_little(name, job):
    """Of bfloat16, with 8 bits of mantissa: the loss to 1%, the direction of the gradient to a cosine of 0.99."""
    wide, narrow = (job(name, precision=precision) for precision in ("float32", "bfloat16"))
    corpus = open_corpus(wide)
    plans = [trainer.make_plan(config, corpus.facts) for config in (wide, narrow)]
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(plans[1].state["params"]))
    frozen = plans[0].objective.load_base(plans[0].mesh) if plans[0].base else None
    params = jax.tree.map(
        lambda leaf: np.random.default_rng(leaf.size).normal(0, 0.2, leaf.shape).astype(np.float32),
        plans[0].state["params"],
    )
    batch = dict(next(corpus.batches(wide.batch_size, 0)))

    def both(params, frozen, batch):
        given = [frozen, plans[1].objective.compute.cast(frozen)]
        key, progress = jax.random.key(0), jnp.zeros(())
        found = [trainer.gradient_of(p, params, f, batch, key, progress) for p, f in zip(plans, given, strict=True)]
        return [(loss, ravel_pytree(gradient)[0]) for loss, _, gradient in found]

    (loss, slope), (near, close) = jax.jit(both)(params, frozen, batch)
    assert near != loss and float(near) == pytest.approx(float(loss), rel=1e-2) and close.dtype == jnp.float32
    assert slope @ close > 0.99 * jnp.linalg.norm(slope) * jnp.linalg.norm(close)


def test_the_most_probable_tokens_of_a_text_are_found_in_pieces(monkeypatch):
    rng = np.random.default_rng(0)
    hidden, kernel = drawn(rng, B, S, H), drawn(rng, H, V)
    target = TargetFeatures({"post_norm": hidden}, hidden, lambda rows: rows @ kernel)
    arrays = {name: Array(dtype, (S, 3)) for name, dtype in ((_TOKENS, "int32"), (_SCORES, "float32"))}
    whole = rounded(target, arrays)
    chances = np.asarray(jax.nn.log_softmax(hidden @ kernel, axis=-1))
    np.testing.assert_array_equal(whole[_TOKENS], np.argsort(-chances, axis=-1)[..., :3])
    np.testing.assert_allclose(whole[_SCORES], -np.sort(-chances, axis=-1)[..., :3], atol=1e-6)
    monkeypatch.setattr(pieces, "SCORES", B * V * 2)
    for name, cut in rounded(target, arrays).items():
        assert cut.dtype == whole[name].dtype
        np.testing.assert_allclose(cut, whole[name], atol=1e-6)
