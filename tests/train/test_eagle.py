"""EAGLE's losses against their definition, the draft vocabulary, and training against decoding."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding.drafters.registry import load_drafter
from models import transformer
from models.errors import UserError
from models.formats.target import load_target
from models.heads.eagle import unroll
from models.layout import Layout
from train import trainer
from train.checkpoint import restore
from train.data.corpus import open_corpus
from train.objectives.divergences import Divergence
from train.objectives.draft_vocabulary import count_labels, most_frequent
from train.objectives.eagle import EagleObjective
from train.objectives.guess import Guess
from train.objectives.shift import ahead

STEPS = 3


def forwards(objective, params, frozen, batch):
    """The target's output, and the draft network's at every step."""
    layout = Layout.causal(*batch["tokens"].shape, segments=batch["segments"])
    out = transformer.forward(objective.model, frozen, batch["tokens"], layout, taps=objective.heads.taps)
    embedding = transformer.lookup(frozen, batch["tokens"])
    embeddings = [ahead(embedding, 1 + k) for k in range(STEPS)]
    feature = objective.heads.fuse(objective.model, params, out.taps)
    return out, unroll(objective.heads, objective.model, params, feature, embeddings, layout)


def compiled_forwards(objective, params, frozen, batch):
    """The same as one program, in NumPy: the target's `logits` and `hidden`, and the network's outputs."""

    def run(*given):
        out, outputs = forwards(objective, *given)
        return (out.logits, out.hidden), outputs

    (logits, hidden), outputs = jax.device_get(jax.jit(run)(params, frozen, batch))
    return types.SimpleNamespace(logits=logits, hidden=hidden), outputs


def log_softmax(logits):
    """Of one row."""
    return logits - np.log(np.exp(logits).sum())


def counted(batch, distance):
    """(row, position, label's position) of everything that answers for the label `distance` ahead."""
    tokens, segments, mask = (np.asarray(batch[name]) for name in ("tokens", "segments", "mask"))
    for b, p in np.ndindex(tokens.shape):
        label = p + distance
        if label < tokens.shape[1] and segments[b, p] == segments[b, label] > 0 and mask[b, label]:
            yield b, p, label


SLOW = pytest.mark.slow  # A term alone, where another case has both; a vocabulary like the target's.


@pytest.mark.parametrize(
    ("feature", "soft"), [pytest.param(2.0, 0.0, marks=SLOW), pytest.param(0.0, 0.5, marks=SLOW), (1.0, 0.1)]
)
def test_eagle_loss_equals_its_definition_row_by_row(feature, soft, draft_setting):
    objective, params, frozen, batch = draft_setting("eagle", feature=feature, soft=soft, noise=0.0)
    (sums, weights), _ = jax.jit(objective.loss)(params, frozen, batch, jax.random.key(0), 0.0)
    out, outputs = compiled_forwards(objective, params, frozen, batch)
    read = np.asarray(jax.jit(lambda g: transformer.head(objective.model, frozen, g))(outputs[0]))
    total = count = 0
    for b, p, label in counted(batch, 2):
        g, h = outputs[0][b, p], out.hidden[b, p + 1]
        distance = np.abs(g - h)
        smooth = np.mean(np.where(distance < 1, 0.5 * distance**2, distance - 0.5))
        teacher = np.exp(log_softmax(out.logits[b, label - 1]))
        total += feature * float(smooth) - soft * float(teacher @ log_softmax(read[b, p]))
        count += 1
    assert sums.shape == weights.shape == (1,)
    assert count > 5 and float(weights[0]) == count
    assert float(sums[0]) == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("vocabulary", [0, 12])
def test_eagle3_loss_equals_its_definition_row_by_row(vocabulary, draft_setting):
    objective, params, frozen, batch = draft_setting("eagle3", vocabulary=vocabulary, decay=0.5)
    (sums, weights), metrics = jax.jit(objective.loss)(params, frozen, batch, jax.random.key(0), 0.0)
    out, outputs = compiled_forwards(objective, params, frozen, batch)
    read = jax.jit(lambda g: objective.heads.logits(objective.model, params, frozen, g))
    known = np.asarray(frozen["draft_vocab"]) if vocabulary else np.arange(objective.model.vocab_size)
    assert len(known) == (vocabulary or objective.model.vocab_size)
    skipped = 0
    for k in range(STEPS):
        guesses = np.asarray(read(outputs[k]))
        total = count = 0
        for b, p, label in counted(batch, 2 + k):
            teacher = out.logits[b, label - 1]
            if int(np.argmax(teacher)) not in known:
                skipped += 1
                continue
            total -= float(np.exp(log_softmax(teacher[known])) @ log_softmax(guesses[b, p]))
            count += 1
        assert count > 5 and float(weights[k]) == count
        assert float(sums[k]) == pytest.approx(0.5**k * total, rel=1e-4)
        assert float(metrics[f"loss_{k + 1}"][0]) == pytest.approx(total, rel=1e-4)
    assert (skipped > 0) == bool(vocabulary)


@pytest.mark.parametrize(
    ("name", "changes"), [("eagle", {}), pytest.param("eagle3", {}, marks=SLOW), ("eagle3", {"vocabulary": 12})]
)
def test_no_gradient_needs_the_target(name, changes, draft_setting):
    objective, params, frozen, batch = draft_setting(name, **changes)

    def loss(trainable):
        (sums, weights), _ = objective.loss(trainable, frozen, batch, jax.random.key(0), 0.0)
        return jnp.sum(sums / weights)

    gradient = jax.device_get(jax.jit(jax.grad(loss))(params))
    assert "draft_vocab" not in params
    assert all(np.max(np.abs(leaf)) > 0 for leaf in jax.tree.leaves(gradient))


def test_noise_is_on_features_in_training_only(draft_setting, monkeypatch):
    objective, params, frozen, batch = draft_setting("eagle", noise=0.5)
    heard = []
    fuse = type(objective.heads).fuse
    monkeypatch.setattr(type(objective.heads), "fuse", lambda *a: heard.append(fuse(*a)) or heard[-1])

    def features(run):
        """What is fused in it; a program of nothing else."""
        return jax.jit(lambda *arguments: (run(*arguments), heard.pop())[1])

    quiet = np.asarray(features(objective.evaluate)(params, frozen, batch))
    heard_by = features(lambda key: objective.loss(params, frozen, batch, key, 0.0))
    loud = [np.asarray(heard_by(jax.random.key(seed))) for seed in (1, 1, 2)]
    bound = 0.5 * 512 / batch["tokens"].shape[1] / 2
    assert np.array_equal(loud[0], loud[1]) and not np.array_equal(loud[0], loud[2])
    noise = loud[0] - quiet
    assert 0.99 * bound < np.abs(noise).max() <= 1.001 * bound and abs(noise.mean()) < 0.05 * bound


def test_agreement_is_with_the_targets_choice_in_the_targets_tokens(draft_setting, monkeypatch):
    objective, params, frozen, batch = draft_setting("eagle3", vocabulary=12)
    logits = jax.jit(lambda *given: objective.read_target(*given).logits)(frozen, batch)
    known = frozen["draft_vocab"]
    hidden = [ahead(logits[..., known], k + 1) for k in range(STEPS)]
    guesses = [Guess(h, None, objective.labels(batch, k), lambda h: h) for k, h in enumerate(hidden)]
    monkeypatch.setattr(objective, "guesses", lambda *_: guesses)
    sums = jax.jit(objective.evaluate)(params, frozen, batch)
    choice = np.asarray(jnp.argmax(logits, axis=-1))
    for k in range(STEPS):
        wanted = [choice[b, label - 1] in np.asarray(known) for b, _, label in counted(batch, 2 + k)]
        agreed, weight = sums[f"agreement_{k + 1}"]
        assert (float(agreed), float(weight)) == (sum(wanted), len(wanted)) and 0 < sum(wanted) < len(wanted)


def test_draft_vocabulary_is_the_most_frequent_labels(draft_setting, job):
    counts = np.array([0, 5, 2, 5, 0, 7, 2])
    assert most_frequent(counts, 4).tolist() == [1, 2, 3, 5]
    assert most_frequent(counts, 6).tolist() == [0, 1, 2, 3, 5, 6]

    objective, _, frozen, _ = draft_setting("eagle3", vocabulary=12)
    documents = open_corpus(job("eagle3")).train
    tokens = np.concatenate([documents[i]["tokens"] for i in range(len(documents))])
    mask = np.concatenate([documents[i]["mask"] for i in range(len(documents))])
    size = objective.model.vocab_size
    assert count_labels(documents, size, "all").tolist() == np.bincount(tokens, minlength=size).tolist()
    labels = count_labels(documents, size, "assistant")
    assert labels.tolist() == np.bincount(tokens[mask > 0], minlength=size).tolist()
    assert np.asarray(frozen["draft_vocab"]).tolist() == most_frequent(labels, 12).tolist()


@pytest.mark.parametrize(
    ("name", "changes"), [pytest.param("eagle", {}, marks=pytest.mark.slow), ("eagle3", {"vocabulary": 60})]
)
def test_the_loop_accepts_exactly_what_the_training_forward_says(name, changes, draft_setting, job, tmp_path):
    config = job(
        name,
        steps=40,
        checkpoint={"every": 40},
        evaluation={"every": 40, "batches": 2},
        objective={"loop_prompts": 4, "loop_tokens": 40, **changes},
    )
    trainer.train(config, tmp_path)
    objective, _, frozen, batch = draft_setting(name, loop_prompts=4, loop_tokens=40, **changes)
    target = load_target(config.objective.target)
    drafter, params = load_drafter(tmp_path / "drafter", target)
    assert drafter == objective.drafter
    if changes:
        assert np.array_equal(params["draft_vocab"], frozen["draft_vocab"])
    corpus = open_corpus(config)
    plan = trainer.make_plan(config, corpus.facts)
    state, _ = restore(tmp_path / "checkpoints" / "40", plan.state)
    found = objective.probe(state["params"], frozen, iter([batch]))
    assert [found[f"loop_{k + 1}"] for k in range(STEPS)] == [found[f"replay_{k + 1}"] for k in range(STEPS)]
    assert 0 < found["loop_2"] <= found["loop_1"]


def test_a_job_that_never_saw_its_data_has_no_draft_vocabulary(job):
    config = job("eagle3", objective={"vocabulary": 12})
    plan = trainer.make_plan(config, open_corpus(config).facts)
    with pytest.raises(ValueError, match="is not known before `scan_data`"):
        plan.objective.load_base(plan.mesh)


def test_evaluations_look_as_far_as_they_are_told(draft_setting):
    objective, params, frozen, batch = draft_setting("eagle", depth=2)
    again = EagleObjective(dataclasses.replace(objective._config, depth=4), objective._tokenizer)
    short, long = (jax.jit(o.evaluate)(params, frozen, batch) for o in (objective, again))
    assert set(long) - set(short) == {f"{m}_{d}" for m in ("loss", "accuracy", "agreement") for d in (3, 4)}
    assert all(np.array_equal(long[name], short[name]) for name in short)
    assert list(again.report({name: 0.0 for name in long})) == sorted(long, key=list(again.report(long)).index)


@pytest.mark.parametrize(
    ("name", "objective", "words"),
    [
        ("eagle", {"target": None}, "objective.target must be the directory of the target to draft for"),
        ("eagle", {"feature": 0.0, "soft": 0.0}, "objective.feature or objective.soft must be positive"),
        ("eagle", {"noise": -1.0}, "objective.noise must not be negative"),
        ("eagle", {"depth": 0}, "objective.depth must be at least 1"),
        ("eagle3", {"layers": (1, 2)}, "objective.layers must name three layers, got (1, 2)"),
        ("eagle3", {"steps": 0}, "objective.steps must be at least 1"),
        ("eagle3", {"decay": 1.5}, "objective.decay must lie in 0..1"),
        ("eagle3", {"vocab": 3}, "unknown key objective.vocab (did you mean 'vocabulary'?)"),
    ],
)
def test_a_wrong_objective_gets_one_sentence(name, objective, words, job):
    with pytest.raises(UserError) as caught:
        job(name, objective=objective)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        ({"layers": (0, 1, 2)}, "reads what enters layer 2 (high), but the target has layers 0 to 1"),
        ({"vocabulary": 100_000}, "the draft vocabulary must have 0 (all) to"),
    ],
)
def test_a_network_that_does_not_fit_the_target_is_refused(objective, words, job, tmp_path):
    with pytest.raises(UserError) as caught:
        trainer.train(job("eagle3", objective=objective), tmp_path / "run")
    assert words in str(caught.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["draft_heads", "eagle", "eagle3", "p_eagle", "falcon"])
def test_what_is_learnt_of_the_target_may_be_a_divergence(name: str, job) -> None:
    """Of the LK losses, for instance; `tests/train/test_guess.py` has their values."""
    config = job(name, objective={"divergence": "nla", **({"temperature": 1.0} if name == "falcon" else {})}).objective
    assert config.weights.divergence == Divergence("nla")
    assert dataclasses.replace(config, divergence="cross_entropy").weights.divergence is None
