"""Losses of drafters with a serial head against their definition, training against decoding, what the head learns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from decoding.drafters.registry import load_drafter
from models import transformer
from models.config import TransformerConfig
from models.errors import UserError
from models.formats.target import load_target
from models.heads.dflash import Anchors, DFlashHeads
from models.heads.serial import SerialHead
from models.layout import Layout
from tests.noise import drawn
from train import trainer
from train.checkpoint import restore
from train.data.corpus import open_corpus
from train.objectives.block_losses import Terms, slot_losses
from train.objectives.divergences import acceptance

DEPTH, TERMS = 3, Terms(hard=0.1, l1=0.9)
CASES = {
    "dspark": {"head": "rnn", "pace": 2.0, "confident": 0.7, "vocabulary": 60},
    "domino": {"pace": 2.0, "decay": 0.5},
}


def log_softmax(logits):
    """Over the last axis."""
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def by_block(objective, params, frozen, batch):
    """Per block: logits of the slots with and without the serial head, the target's there, the mass of all of them, its
    confidences, labels, which of these are learnt from, and which count at all; every document alone and in full, as in
    a replay of decoding. With a draft vocabulary these are its tokens alone, and from what it lacks nothing is
    learnt."""
    serial, model = objective.serial, objective.model
    tokens, segments, mask = (np.asarray(batch[name]) for name in ("tokens", "segments", "mask"))
    texts = [
        (tokens[row, segments[row] == segment], mask[row, segments[row] == segment].astype(bool))
        for row in range(len(tokens))
        for segment in range(1, segments[row].max() + 1)
    ]
    padded = np.stack([np.pad(text, (0, tokens.shape[1] - len(text))) for text, _ in texts])
    known = np.asarray(frozen.get("draft_vocab", np.arange(model.vocab_size)))

    @jax.jit
    def run(params, frozen, tokens):
        params = objective.drafter_params(params, frozen)
        out = transformer.forward(model, frozen, tokens, Layout.causal(*tokens.shape), taps=objective.heads.taps)
        slots = objective.drafter.teacher_forced(model, frozen, params, tokens, out, DEPTH)
        hidden, latent = (jnp.stack(part, axis=2) for part in zip(*slots, strict=True))
        alone, own = objective.heads.logits(model, params, frozen, hidden), params["serial"]
        sure = jnp.zeros(latent.shape[:3])
        if serial.confidence != "none":
            behind = jnp.pad(tokens, ((0, 0), (0, DEPTH)))
            before = jnp.stack([behind[:, 1 + k : 1 + k + tokens.shape[1]] for k in range(DEPTH)], axis=2)
            sure = serial.confidence_logit(own, hidden, serial.embed(own, frozen, before))
        return alone + serial.scores(own, latent), alone, out.logits, sure

    told, alone, target, sure = jax.device_get(run(params, frozen, padded))
    for b, (text, labelled) in enumerate(texts):
        for a in range(1, len(text) - 1):
            if labelled[a] and labelled[a + 1]:
                end = min(len(text), a + DEPTH + 1)
                there = (b, a - 1, slice(0, end - a - 1))
                labels, taught = text[a + 1 : end], target[b, a : end - 1]
                counted = labelled[a + 1 : end]
                learnt = counted & np.isin(labels, known) & np.isin(taught.argmax(axis=-1), known)
                mass = np.exp(log_softmax(taught))[:, known].sum(axis=-1, keepdims=True)
                outputs = np.minimum(np.searchsorted(known, labels), len(known) - 1)
                yield told[there], alone[there], taught[:, known], mass, sure[there], outputs, learnt, counted


@pytest.mark.parametrize("name", CASES)
def test_loss_equals_its_definition_block_by_block(name, draft_setting):
    objective, params, frozen, batch = draft_setting(name, **CASES[name])

    def loss(params, frozen, batch, progress):
        (total, weight), _ = objective.loss(params, frozen, batch, jax.random.key(0), progress)
        return total, weight

    if name == "dspark":
        (total, weight), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, frozen, batch, 0.1)
        assert all(np.max(np.abs(leaf)) > 0 for leaf in jax.tree.leaves(gradient))
    else:
        run = jax.jit(loss)
        (total, weight), (late, _) = (run(params, frozen, batch, progress) for progress in (0.1, 0.8))
    sums = weights = blocks = broken = told_alone = 0
    for told, alone, target, mass, sure, labels, learnt, counted in by_block(objective, params, frozen, batch):
        broken += (~learnt).any()
        if name == "dspark":
            learnt, counted = np.cumprod(learnt) > 0, np.cumprod(counted) > 0
        logs = {"told": log_softmax(told), "alone": log_softmax(alone)}
        hard = {kind: -np.take_along_axis(log, labels[:, None], axis=-1)[:, 0] for kind, log in logs.items()}
        if name == "dspark":
            q, p = np.exp(logs["told"]), np.exp(log_softmax(target))
            apart = np.abs(q - p).sum(axis=-1)
            survives = np.minimum(q, p * mass).sum(axis=-1)
            chance = 1 / (1 + np.exp(-sure))
            cross = -survives * np.log(chance) - (1 - survives) * np.log(1 - chance)
            loss, everywhere = 0.1 * hard["told"] + 0.9 * apart, 0.7 * cross
        else:
            loss, everywhere = 0.2 * hard["told"] + 0.8 * hard["alone"], 0
        pace = np.exp(-np.arange(len(counted)) / 2)
        told_alone += np.sum(hard["told"] * pace * learnt)
        sums += np.sum(loss * pace * learnt) + np.sum(everywhere * pace * counted)
        weights += np.sum(learnt * pace)
        blocks += 1
    assert blocks > 5 and broken > 1
    assert (float(total), float(weight)) == (pytest.approx(sums, rel=1e-4), pytest.approx(weights, rel=1e-5))
    if name == "domino":  # What the slots say by themselves has counted for nothing since half of the run.
        assert float(late) == pytest.approx(told_alone, rel=1e-4)


V, OF, COURSE, NO, PROBLEM = 8, 1, 2, 3, 4


def test_a_bigram_joins_what_a_block_by_itself_mixes():
    """After the anchor come `of course` or `no problem`, as often the one as the other. What the slots say by
    themselves accepts one half of the second words whatever it learns; told the first word, nearly all."""
    shape = dict(num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, mlp_width=16)
    config = TransformerConfig(V, 16, **shape)
    target = drawn(transformer.param_shapes(config, jnp.float32), 0.5)
    heads, serial = DFlashHeads((1,), V - 1, num_layers=1, block=2, shifted=True), SerialHead("vanilla", 4)
    labels = jnp.array([[OF, COURSE], [NO, PROBLEM]])
    before = jnp.array([[0, OF], [0, NO]])
    law = np.zeros((2, 2, V), np.float32)
    law[:, 0, [OF, NO]] = 0.5
    law[[0, 1], 1, [COURSE, PROBLEM]] = 1
    log_p, taps = (
        jnp.log(law + 1e-9),
        {"layer:1": drawn({"x": jax.ShapeDtypeStruct((1, 3, 16), jnp.float32)}, 1.0)["x"]},
    )

    def scores(params, told):
        place = jnp.arange(3, dtype=jnp.int32)[None]
        context = heads.context_rows(config, params, heads.fuse(config, params, taps), place)
        three, none = jnp.full((1, 1), 3), jnp.zeros((1, 1), jnp.int32)
        hidden = heads.at_anchors(config, params, target, context, Anchors(none, three, three, none), place)[0]
        hidden = jnp.broadcast_to(hidden, (2, *hidden.shape[1:]))
        logits = transformer.head(config, target, hidden)
        if told:
            own = params["serial"]
            logits += serial.scores(own, serial.latents(own, hidden, serial.embed(own, target, before)))
        return jax.nn.log_softmax(logits)

    @jax.jit
    def trained(key):
        start = {**heads.init(config, target, key), "serial": serial.init(config, target, key)}
        rule = optax.adam(1e-2)

        def run(told):
            def step(carry, _):
                params, state = carry
                slope = jax.grad(lambda p: jnp.sum(slot_losses(TERMS, scores(p, told), log_p, labels)))(params)
                change, state = rule.update(slope, state)
                return (optax.apply_updates(params, change), state), None

            (params, _), _ = jax.lax.scan(step, (start, rule.init(start)), None, length=300)
            return acceptance(scores(params, told), log_p)

        return run(False), run(True)

    alone, told = trained(jax.random.key(0))
    assert np.min(alone[:, 0]) > 0.9 and np.min(told[:, 0]) > 0.9
    assert np.mean(alone[:, 1]) < 0.51
    assert np.min(told[:, 1]) > 0.95


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dspark", "domino"])
def test_the_loop_accepts_exactly_what_the_training_forward_says(name, draft_setting, job, tmp_path):
    loop = {"loop_prompts": 4, "loop_tokens": 40}
    config = job(
        name,
        steps=60,
        checkpoint={"every": 60},
        evaluation={"every": 60, "batches": 2},
        objective={**loop, **CASES[name]},
    )
    trainer.train(config, tmp_path)
    objective, _, frozen, batch = draft_setting(name, **loop, **CASES[name])
    drafter, _ = load_drafter(tmp_path / "drafter", load_target(config.objective.target))
    assert drafter == objective.drafter
    plan = trainer.make_plan(config, open_corpus(config).facts)
    state, _ = restore(tmp_path / "checkpoints" / "60", plan.state)
    found = objective.probe(state["params"], frozen, iter([batch]))
    assert [found[f"loop_{k + 1}"] for k in range(3)] == [found[f"replay_{k + 1}"] for k in range(3)]
    assert 0 < found["loop_2"] <= found["loop_1"]


@pytest.mark.parametrize(
    ("name", "objective", "words"),
    [
        ("dspark", {"terms": {"hard": 1.0, "l1": 0.0}}, "objective.confident needs the target's distribution"),
        ("dspark", {"rank": 0}, "objective.rank must be at least 1, got 0"),
        ("dspark", {"confident": -1.0}, "objective.confident must not be negative"),
        ("dspark", {"head": "gru"}, "objective.head must be one of 'vanilla', 'gated', 'rnn'"),
        ("domino", {"decay": 0.0}, "objective.decay must lie in 0..1, 0 excluded, got 0.0"),
        ("domino", {"state": 0}, "objective.state must be at least 1"),
        ("domino", {"plain": -1}, "objective.plain must leave the head some of a block's 3 slots, got -1"),
        ("domino", {"plain": 3}, "objective.plain must leave the head some of a block's 3 slots, got 3"),
        ("dspark", {"hybrid_of": "batch"}, "objective.hybrid_of is for objective.terms.hybrid, which is 0, got batch"),
    ],
)
def test_a_wrong_objective_gets_one_sentence(name, objective, words, job):
    with pytest.raises(UserError) as caught:
        job(name, objective=objective)
    assert words in str(caught.value)
