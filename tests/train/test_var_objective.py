"""The VAR objective against its definition, the drafter's part of it, and whole jobs."""

import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import transformer
from models.errors import UserError
from models.formats import image_models as files
from models.formats.storage import leaves_by_path
from models.images import var
from models.images.config import VARConfig, scale_starts
from tests import image_reference as reference
from tests.train.conftest import VAR, VAR_SHAPE, VQVAE
from tests.train.test_trainer import lines, weights
from tests.train.test_vqvae import smoke, widened
from train import trainer
from train.data.corpus import open_corpus
from train.objectives.next_scale import cross_entropy

STARTS = scale_starts(VAR.scales)


def reference_lesson(frozen, batch):
    """Codes and what the transformer reads at scales 1 to K - 1, in float64 NumPy."""
    tree = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), frozen["tokenizer"])
    images = np.asarray(batch["image"]) / 127.5 - 1
    indices, _ = reference.encode(VQVAE, tree, reference.features(VQVAE, tree, images))
    return np.concatenate(indices, axis=1), reference.teacher_inputs(VQVAE, tree, indices)


def reference_logits(model, stacked, labels, features):
    """Logits of all scales, in float64 NumPy."""
    tree = transformer.unstack_layers(jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), stacked))
    return reference.logits(model, tree, np.asarray(labels), features)


def log_softmax(logits):
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def taken(values, codes):
    return np.take_along_axis(values, codes[..., None], axis=-1)[..., 0]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("smoothing", "until"), [pytest.param(0.0, 2, marks=pytest.mark.slow), (0.2, None)])
def test_the_loss_equals_its_definition(smoothing, until, image_setting):
    objective, params, frozen, batch = image_setting(
        "var", class_dropout=0.0, stochastic_depth=0.0, label_smoothing=smoothing, scales_until=until
    )
    params, frozen = widened(params), widened(frozen)
    (total, weight), _ = jax.jit(objective.loss)(params, frozen, batch, jax.random.key(0), 0.0)
    codes, features = reference_lesson(frozen, batch)
    likelihood = log_softmax(reference_logits(objective.model, params, batch["label"], features))
    losses = -(1 - smoothing) * taken(likelihood, codes) - smoothing * likelihood.mean(axis=-1)
    stop = STARTS[until or 4]
    assert weight == 6 * stop
    assert float(total) == pytest.approx(losses[:, :stop].sum(), rel=1e-9)


@pytest.mark.usefixtures("x64")
def test_a_drafter_learns_the_first_part_of_the_whole_and_nothing_of_the_rest(image_setting):
    plain = {"class_dropout": 0.0, "stochastic_depth": 0.0}
    whole, params, frozen, batch = image_setting("var", **plain)
    drafter, _, _, _ = image_setting("var", **plain, scales_until=3)
    params, frozen = widened(params), widened(frozen)

    def total(objective, params):
        return objective.loss(params, frozen, batch, jax.random.key(0), 0.0)[0][0]

    def first_part(params):
        lesson = whole.lesson(frozen, batch, None)
        logits = transformer_logits(whole, params, lesson)
        return jnp.sum(cross_entropy(logits, lesson.codes)[:, : STARTS[3]])

    losses = (lambda params: total(drafter, params)), first_part
    (found, ours), (expected, theirs) = (jax.jit(jax.value_and_grad(loss))(params) for loss in losses)
    assert found == pytest.approx(float(expected), rel=1e-12)
    ours = leaves_by_path(ours)
    for path, slope in leaves_by_path(theirs).items():
        np.testing.assert_allclose(ours[path], slope, atol=1e-10)
    assert not np.any(ours["positions/embedding"][STARTS[3] :]) and not np.any(ours["levels/embedding"][3])


def transformer_logits(objective, params, lesson):
    return var.teacher_forced(objective.model, params, lesson.labels, lesson.features, 0, 4)


def test_evaluation_tells_the_class_and_counts_no_padding(image_setting):
    objective, params, frozen, batch = image_setting("var", class_dropout=0.9, stochastic_depth=0.5)
    batch = {**batch, "label": batch["label"].at[-2:].set(-1)}
    sums = jax.jit(objective.evaluate)(params, frozen, batch)
    means = {name: float(total) / float(weight) for name, (total, weight) in sums.items()}
    codes, features = reference_lesson(frozen, batch)
    logits = reference_logits(objective.model, params, np.asarray(batch["label"])[:4], features[:4])
    likelihood, right = taken(log_softmax(logits), codes[:4]), logits.argmax(-1) == codes[:4]
    expected = {"loss": -likelihood.mean(), "accuracy": right.mean()}
    expected |= {"last_loss": -likelihood[:, STARTS[3] :].mean(), "last_accuracy": right[:, STARTS[3] :].mean()}
    assert objective.report(means) == pytest.approx(expected, rel=1e-4)
    assert sums["last_loss"][1] == 4 * 16 and sums["loss"][1] == 4 * 30


def test_the_class_is_withheld_for_its_share(image_setting):
    objective, _, frozen, batch = image_setting("var", class_dropout=0.25)
    told = jax.jit(lambda key: objective.lesson(frozen, batch, key).labels)
    labels = [told(jax.random.key(seed)) for seed in range(300)]
    withheld = np.stack(labels) == VAR.num_classes
    # Six standard deviations.
    assert abs(withheld.mean() - 0.25) < 6 * math.sqrt(0.25 * 0.75 / withheld.size)
    assert withheld.mean(axis=0).min() > 0 and withheld.mean(axis=0).max() < 0.5
    assert np.all(np.where(withheld, batch["label"], np.stack(labels)) == batch["label"])
    np.testing.assert_array_equal(jax.jit(lambda: objective.lesson(frozen, batch, None).labels)(), batch["label"])


def test_deeper_blocks_are_skipped_more_often_and_made_up_for(image_job):
    def drawn(**objective):
        plan = trainer.make_plan(image_job("var", objective=objective), ("A", "B", "C"))
        return plan.objective.keep(jax.random.key(0), 4000)

    keep = np.asarray(drawn(stochastic_depth=0.4, model={**VAR_SHAPE, "depth": 3}))
    assert keep.shape == (3, 2, 4000)
    for i, rate in enumerate((0.0, 0.2, 0.4)):
        expected = [1.0] if i == 0 else [0.0, 1 / (1 - rate)]
        np.testing.assert_allclose(np.unique(keep[i]), expected, rtol=1e-6)
        assert abs((keep[i] == 0).mean() - rate) < 0.04
    assert np.any(keep[1, 0] != keep[1, 1])
    assert drawn(stochastic_depth=0.0) is None
    published = drawn(model={**VAR_SHAPE, "depth": 12})
    assert np.max(published) == pytest.approx(1 / 0.95)


def test_a_job_goes_on_from_a_directory(image_job, image_models, tmp_path):
    config = image_job("var", objective={"model": None, "init_from": image_models["var"], "scales_until": 2}, steps=2)
    plan = trainer.make_plan(config, open_corpus(config).facts)
    assert plan.frozen.keys() == {"tokenizer"} and plan.base.keys() == {"tokenizer", "init_from"}
    base = plan.objective.load_base(plan.mesh)
    state = jax.jit(lambda base: trainer.init_state(config, plan.objective, plan.optimizer, base))(base)
    before = jax.device_get(files.load(image_models["var"], VARConfig)[1])
    jax.tree.map(np.testing.assert_array_equal, transformer.unstack_layers(jax.device_get(state["params"])), before)
    trainer.train(config, tmp_path)
    model, after = jax.device_get(files.load(tmp_path / "var", VARConfig))
    assert model == VAR
    np.testing.assert_array_equal(after["positions"]["embedding"][5:], before["positions"]["embedding"][5:])
    assert np.any(after["positions"]["embedding"][:5] != before["positions"]["embedding"][:5])
    record = json.loads((tmp_path / "var" / "config.json").read_text())
    assert record["provenance"] == {"objective": "var", "scales_until": 2}


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        ({"tokenizer": None}, "objective.tokenizer must be a VQ-VAE directory"),
        ({"model": None}, "either objective.model (a shape) or objective.init_from"),
        ({"model": {**VAR_SHAPE, "num_classes": 3}}, "objective.model.num_classes comes from the data set"),
        ({"model": {**VAR_SHAPE, "vocab_size": 3}}, "objective.model.vocab_size comes from the tokenizer"),
        ({"model": {**VAR_SHAPE, "widht": 3}}, "did you mean 'width'"),
        ({"class_dropout": 1.0}, "objective.class_dropout must lie in 0..1, 1 excluded"),
        ({"label_smoothing": -0.1}, "objective.label_smoothing must lie in 0..1"),
        ({"gate": 0.0}, "objective.gate must be positive"),
        ({"scales_until": 5}, "objective.scales_until must lie in 1..4"),
        ({"scales_until": 0}, "objective.scales_until must lie in 1..4"),
    ],
)
def test_a_wrong_section_gets_one_sentence(objective, words, image_job):
    with pytest.raises(UserError) as caught:
        config = image_job("var", objective=objective)
        trainer.make_plan(config, ("A", "B", "C"))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_directory_of_other_codes_or_classes_is_refused(image_job, image_models, tmp_path):
    given = {"model": None, "init_from": image_models["var"]}
    with pytest.raises(UserError, match=r"has num_classes 3, but the data set has 2"):
        trainer.make_plan(image_job("var", objective=given), ("A", "B"))
    with pytest.raises(UserError, match=r"has kind 'var', expected 'vqvae'"):
        trainer.make_plan(image_job("var", objective={"tokenizer": image_models["var"]}), ("A", "B", "C"))


def test_a_job_learns_and_a_killed_one_ends_bitwise_as_it(image_job, die_at, tmp_path):
    noise = {"class_dropout": 0.3, "stochastic_depth": 0.3}
    config = image_job("var", objective=noise, optimizer={"ema": 0.6}, steps=24, checkpoint={"every": 9})
    trainer.train(config, tmp_path / "whole")
    with die_at(20):
        trainer.train(config, tmp_path / "broken")
    trainer.train(config, tmp_path / "broken")
    assert weights(tmp_path / "whole" / "var") == weights(tmp_path / "broken" / "var")
    found = lines(tmp_path / "whole")
    assert found == lines(tmp_path / "broken")
    losses = [line["loss"] for line in found if "loss" in line]
    assert abs(losses[0] - math.log(24)) < 0.3 and np.mean(losses[-3:]) < losses[0] - 0.2


@pytest.mark.slow
def test_the_smoke_job_runs(image_set, image_models, tmp_path):
    options = ["steps=3", "optimizer.warmup_steps=1", f"objective.tokenizer={image_models['vqvae']}"]
    said = smoke("var", image_set, tmp_path, *options)
    assert "finished 3 steps" in said and "last_accuracy" in said
    assert files.read_config(tmp_path / "var", VARConfig).num_classes == 3


@pytest.mark.slow
def test_the_smoke_job_of_a_drafter_runs(image_set, image_models, tmp_path):
    options = ["steps=3", "optimizer.warmup_steps=1", f"objective.tokenizer={image_models['vqvae']}"]
    said = smoke("code_drafter", image_set, tmp_path, *options, f"objective.init_from={image_models['var']}")
    assert "finished 3 steps" in said and "last_accuracy" in said
    assert files.read_config(tmp_path / "var", VARConfig) == VAR


def test_recomputation_changes_no_gradient(image_job):
    configs = [image_job("var", remat=remat) for remat in ("none", "layers")]
    corpus = open_corpus(configs[0])
    plans = [trainer.make_plan(config, corpus.facts) for config in configs]
    frozen = plans[0].objective.load_base(plans[0].mesh)
    params = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.02, np.float32), plans[0].state["params"])
    batch = next(corpus.batches(4, 0))

    def slopes(plan):
        return lambda *given: trainer.gradient_of(plan, *given, jax.random.key(0), jnp.zeros(()))[::2]

    programs = [str(jax.make_jaxpr(slopes(plan))(params, frozen, batch)) for plan in plans]
    assert ["remat" in program for program in programs] == [False, True]
    kept, again = (jax.jit(slopes(plan))(params, frozen, batch) for plan in plans)
    jax.tree.map(lambda *pair: np.testing.assert_allclose(*pair, rtol=1e-4, atol=1e-7), kept, again)


@pytest.mark.parametrize("name", ["var", "vqvae", pytest.param("code_refiner", marks=pytest.mark.slow)])
def test_what_is_trained_multiplies_narrowly_where_precision_says_so(name, image_job):
    config = image_job(name, precision="bfloat16")
    corpus = open_corpus(config)
    plan = trainer.make_plan(config, corpus.facts)
    assert all(leaf.dtype != jnp.bfloat16 for leaf in jax.tree.leaves(plan.state))
    batch = {key: jax.ShapeDtypeStruct(a.shape, a.dtype) for key, a in next(corpus.batches(4, 0)).items()}
    text = jax.jit(trainer.make_step(plan)).lower(plan.state, plan.frozen, batch).as_text()
    products = re.findall(r"stablehlo.(?:dot_general|convolution).*: \((.*)\) -> .*", text)
    assert not [factors for factors in products if "bf16" in factors and "f32" in factors.replace("bf16", "")]
    assert sum("bf16" in factors for factors in products) > 20
