"""Losses of drafters that fill blocks against their definition, anchors, and training against decoding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding.drafters.registry import load_drafter
from models import transformer
from models.errors import UserError
from models.formats.target import load_target
from models.heads import dflash as network
from models.layout import Layout
from train import trainer
from train.checkpoint import restore
from train.data.corpus import open_corpus
from train.objectives import pieces
from train.objectives.blocks import Slots, drawn_anchors
from train.objectives.target_features import TargetFeatures

# JetSpec's loss, with weights that fall as well, and DFlash2's network with D-PACE; both with a draft vocabulary.
JETSPEC = {
    "causal": True,
    "terms": {"forward_kl": 2.0, "hard": 0.0},
    "temperature": 2.0,
    "pace": 3.0,
    "vocabulary": 12,
}
DFLASH2 = {"window": 5, "convolution": True, "rank": 4, "candidates": 6, "d_pace": True}
SMALL = {**DFLASH2, "vocabulary": 12}


def log_softmax(logits):
    """Over the last axis."""
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def documents(batch):
    """(row, first place, tokens, mask) of every packed document."""
    tokens, segments, mask = (np.asarray(batch[name]) for name in ("tokens", "segments", "mask"))
    for row in range(len(tokens)):
        for segment in range(1, segments[row].max() + 1):
            (places,) = np.nonzero(segments[row] == segment)
            yield tokens[row, places], mask[row, places].astype(bool)


def one_at_a_time(objective, params, frozen, batch):
    """Per block: the slots' logits, the selector's scores and candidates, the target's logits there, the tokens from
    the anchor on, and which of these are labels; every document alone and in full, as in a replay of decoding."""
    heads, model, depth = objective.heads, objective.model, objective.depth
    texts = list(documents(batch))
    length = batch["tokens"].shape[1]
    padded = np.stack([np.pad(tokens, (0, length - len(tokens))) for tokens, _ in texts])

    @jax.jit
    def run(params, frozen, tokens):
        out = transformer.forward(model, frozen, tokens, Layout.causal(*tokens.shape), taps=heads.taps)
        found = objective.drafter.teacher_forced(model, frozen, params, tokens, out, depth)
        params = objective.drafter_params(params, frozen)
        logits = jnp.stack([heads.logits(model, params, frozen, hidden) for hidden, _ in found], axis=2)
        picks = [objective.drafter.ranked(model, frozen, params, i, x, 3) for i, x in enumerate(found)]
        if heads.selector is None:
            return logits, out.logits, jnp.stack(picks, axis=2), (logits, logits)
        hidden, before = (jnp.stack(x, axis=2) for x in zip(*found, strict=True))
        best, outputs = jax.lax.top_k(logits, heads.selector.candidates)
        known = heads.vocabulary(params)
        tokens = outputs if known is None else known[outputs]
        scores = heads.scores_after(params, best, tokens, hidden, before[..., None])[..., 0, :]
        return logits, out.logits, jnp.stack(picks, axis=2), (scores, tokens)

    logits, target, picks, (scores, candidates) = jax.device_get(run(params, frozen, padded))
    for b, (tokens, mask) in enumerate(texts):
        for a in range(1, len(tokens) - 1):
            if mask[a] and mask[a + 1]:
                end = min(len(tokens), a + depth + 1)
                there = slice(0, end - a - 1)
                facts = (logits[b, a - 1, there], scores[b, a - 1, there], candidates[b, a - 1, there])
                yield *facts, target[b, a : end - 1], tokens[a:end], mask[a + 1 : end], picks[b, a - 1, there]


@pytest.mark.parametrize("changes", [JETSPEC, SMALL], ids=["jetspec", "dflash2"])
def test_loss_equals_its_definition_block_by_block(changes, draft_setting):
    objective, params, frozen, batch = draft_setting("dflash", **changes)
    (total, weight), _ = jax.jit(objective.loss)(params, frozen, batch, jax.random.key(0), 0.0)
    measured = jax.jit(objective.evaluate)(params, frozen, batch)
    sums = weights = blocks = chosen = unknown = 0
    known = np.asarray(frozen["draft_vocab"])
    for logits, scores, candidates, target, tokens, counted, picks in one_at_a_time(objective, params, frozen, batch):
        labels, pace = tokens[1:], np.exp(-np.arange(len(counted)) / 3)
        chosen += np.sum(counted * (picks[:, 0] == labels))
        learnt = counted & np.isin(target.argmax(axis=-1) if changes is JETSPEC else labels, known)
        unknown += np.sum(counted) - np.sum(learnt)
        counted = learnt
        if changes is JETSPEC:
            target = target[:, known]
            p, q = log_softmax(target / 2), log_softmax(logits / 2)
            loss = 2 * 2**2 * np.sum(np.exp(p) * (p - q), axis=-1)
        else:
            outputs = np.minimum(np.searchsorted(known, labels), len(known) - 1)
            log_q = np.take_along_axis(log_softmax(logits), outputs[:, None], axis=-1)[:, 0]
            smooth = np.cumprod(np.where(counted, (np.exp(log_q) + 1) / 2, 1))
            pace = np.array([np.sum(smooth[k:] * counted[k:]) for k in range(len(counted))])
            loss = -log_q - np.sum(np.where(candidates == labels[:, None], log_softmax(scores), 0), axis=-1)
        sums += np.sum(loss * pace * counted)
        weights += np.sum(counted * pace if changes is JETSPEC else counted)
        blocks += 1
    assert blocks > 5 and unknown > 5
    assert (float(total), float(weight)) == (pytest.approx(sums, rel=1e-4), pytest.approx(weights, rel=1e-5))
    assert sum(float(measured[f"accuracy_{i + 1}"][0]) for i in range(3)) == chosen
    assert set(measured) == {f"{name}_{i + 1}" for name in ("loss", "accuracy", "agreement") for i in range(3)}


def test_pieces_are_the_whole_and_no_slope_needs_the_target(draft_setting, monkeypatch):
    objective, params, frozen, batch = draft_setting("dflash", **DFLASH2)

    def slopes():
        def loss(trainable):
            (total, weight), _ = objective.loss(trainable, frozen, batch, jax.random.key(0), 0.0)
            return total / weight

        return jax.device_get(jax.jit(jax.value_and_grad(loss))(params))

    value, gradient = slopes()
    assert all(np.max(np.abs(leaf)) > 0 for leaf in jax.tree.leaves(gradient))
    monkeypatch.setattr(network, "BLOCK", 7 * 4 * 2 * 4 * 32)
    monkeypatch.setattr(pieces, "SCORES", 4 * 9 * 3 * 280)
    again, in_pieces = slopes()
    assert value == pytest.approx(again, rel=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-3, atol=1e-5), gradient, in_pieces)


def some_slots(objective, width):
    """Outputs of blocks, and slots of which some count, with logits of a teacher and labels that it may choose from."""
    rng, shape = np.random.default_rng(0), (2, 5, 3)
    hidden = jnp.asarray(rng.normal(size=(*shape, width)), jnp.float32)
    scored = jnp.asarray(2 * rng.normal(size=(*shape, objective.model.vocab_size)), jnp.float32)
    tokens = jnp.asarray(rng.integers(0, objective.model.vocab_size, (2, 5, 4)), jnp.int32)
    return hidden, Slots(tokens, jnp.asarray(rng.integers(0, 2, shape), bool), scored)


def test_one_weight_for_a_batch_is_that_of_its_mean_acceptance(draft_setting):
    """Over the slots that count, in pieces or not."""
    objective, params, frozen, _ = draft_setting("dflash", hybrid_of="batch", terms={"hybrid": 1.0})
    hidden, slots = some_slots(objective, objective.model.width)
    target, read = TargetFeatures({}, None, lambda rows, known=None: rows), objective.head_params(params)

    @jax.jit
    def run(frozen, hidden, slots):
        weights = [objective._blend(target, read, frozen, hidden, slots, pieces) for pieces in (1, 2)]
        logits = transformer.head(objective.model, frozen, hidden)
        return weights, logits, objective.loss_of(logits, slots, jax.nn.log_softmax(slots.scored), weights[0])

    weights, logits, loss = jax.device_get(run(frozen, hidden, slots))
    p, q = (np.exp(log_softmax(np.asarray(x, np.float64))) for x in (slots.scored, logits))
    alpha = np.minimum(p, q).sum(axis=-1)
    weight = np.exp(-alpha[np.asarray(slots.counted)].mean())
    np.testing.assert_allclose(weights, weight, rtol=1e-5)
    np.testing.assert_allclose(
        loss, weight * np.sum(p * np.log(p / q), axis=-1) + (1 - weight) * (1 - alpha), rtol=1e-4
    )
    assert abs(weight - np.exp(-alpha.mean())) > 1e-4


def test_nothing_of_the_selectors_loss_reaches_the_network(draft_setting):
    objective, params, frozen, _ = draft_setting("dflash", **DFLASH2)
    hidden, slots = some_slots(objective, objective.model.width)
    logits = 3 * jnp.roll(slots.scored, 1, axis=0)
    tokens = jnp.pad(jnp.argmax(logits, axis=-1).astype(jnp.int32), ((0, 0), (0, 0), (1, 0)))
    slots = slots._replace(tokens=tokens)

    @jax.jit
    def slopes(read, hidden, logits):
        def loss(*given):
            return jnp.sum(objective.more_loss(given[0], frozen, *given[1:], None, slots, 0.0))

        return jax.grad(loss, (0, 1, 2))(read, hidden, logits)

    of_selector, *of_network = jax.device_get(slopes(objective.head_params(params), hidden, logits))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(of_selector)) and set(of_selector) == {"selector"}
    assert not any(np.any(leaf) for leaf in of_network)


@pytest.mark.slow
def test_hybrid_weight_of_a_batch_is_that_of_its_mean_acceptance(draft_setting):
    changes = {"hybrid_of": "batch", "terms": {"hybrid": 1.0}}
    objective, params, frozen, batch = draft_setting("dflash", **changes)
    found = float(jax.jit(objective.loss)(params, frozen, batch, jax.random.key(0), 0.0)[0][0])
    alphas, kls = [], []
    for logits, _, _, target, _, counted, _ in one_at_a_time(objective, params, frozen, batch):
        p, q = np.exp(log_softmax(target))[counted], np.exp(log_softmax(logits))[counted]
        alphas.extend(np.minimum(p, q).sum(axis=-1))
        kls.extend(np.sum(p * np.log(p / q), axis=-1))
    alphas, weight = np.array(alphas), np.exp(-np.mean(alphas))
    assert found == pytest.approx(np.sum(weight * np.array(kls) + (1 - weight) * (1 - alphas)), rel=1e-4)


def test_anchors_are_drawn_where_a_block_can_begin():
    #            0  1  2  3  4  5  6  7  8  9
    segments = [[1, 1, 1, 1, 2, 2, 2, 2, 2, 0], [1] * 10]
    mask = [[1, 1, 1, 1, 1, 1, 0, 1, 1, 0], [0] * 6 + [1] * 4]
    batch = {"tokens": jnp.zeros((2, 10), jnp.int32), "segments": jnp.array(segments)}
    draw = jax.jit(lambda count, key: drawn_anchors(batch, jnp.array(mask, bool), count, key), static_argnums=0)
    at, kept = draw(6, jax.random.key(0))
    assert kept.tolist() == [[True] * 3 + [False] * 3] * 2
    # 0 and 4 have nothing before them, 3 and 8 no label behind them in their document.
    assert at[:, :3].tolist() == [[1, 2, 7], [6, 7, 8]]
    seen = {tuple(draw(2, jax.random.key(seed))[0][1].tolist()) for seed in range(12)}
    assert seen == {(6, 7), (6, 8), (7, 8)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{}, {**DFLASH2, "d_pace": False}, {**JETSPEC, "vocabulary": 0}], ids=["dflash", "dflash2", "jetspec"]
)
def test_the_loop_accepts_exactly_what_the_training_forward_says(changes, draft_setting, job, tmp_path):
    loop = {"loop_prompts": 4, "loop_tokens": 40}
    config = job(
        "dflash",
        steps=60,
        checkpoint={"every": 60},
        evaluation={"every": 60, "batches": 2},
        objective={**loop, **changes},
    )
    trainer.train(config, tmp_path)
    objective, _, frozen, batch = draft_setting("dflash", **loop, **changes)
    drafter, _ = load_drafter(tmp_path / "drafter", load_target(config.objective.target))
    assert drafter == objective.drafter
    plan = trainer.make_plan(config, open_corpus(config).facts)
    state, _ = restore(tmp_path / "checkpoints" / "60", plan.state)
    found = objective.probe(state["params"], frozen, iter([batch]))
    assert [found[f"loop_{k + 1}"] for k in range(3)] == [found[f"replay_{k + 1}"] for k in range(3)]
    assert 0 < found["loop_2"] <= found["loop_1"]


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        ({"terms": {"hard": -1.0}}, "objective.terms.hard must not be negative, got -1.0"),
        ({"terms": {"hard": 0.0}}, "one of objective.terms must be positive"),
        ({"anchors": 0}, "objective.anchors must be at least 1, got 0"),
        ({"pace": 0.0}, "objective.pace must be positive, got 0.0"),
        ({"temperature": 2.0}, "objective.temperature is for objective.terms.forward_kl alone, got ['hard']"),
        ({"d_pace": True, "terms": {"l1": 1.0}}, "objective.d_pace weighs objective.terms.hard alone, got ['l1']"),
        ({"d_pace": True, "pace": 4.0}, "objective.d_pace takes the place of objective.pace, got 4.0"),
        ({"candidates": -1}, "objective.candidates must not be negative, got -1"),
        ({"taps": 0}, "objective.taps must be at least 1"),
        ({"target_layers": ()}, "objective.target_layers must name a layer, or be none to choose by objective.taps"),
        ({"hybrid_of": "batch"}, "objective.hybrid_of is for objective.terms.hybrid, which is 0, got batch"),
        ({"masks": 3}, "unknown key objective.masks"),
    ],
)
def test_a_wrong_objective_gets_one_sentence(objective, words, job):
    with pytest.raises(UserError) as caught:
        job("dflash", objective=objective)
    assert words in str(caught.value)


def test_a_network_that_does_not_fit_the_target_is_refused(job, tmp_path):
    with pytest.raises(UserError, match="reads what enters layer 2, but the target has layers 0 to 1"):
        trainer.train(job("dflash", objective={"target_layers": (0, 2)}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
