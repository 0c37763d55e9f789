"""The refiner's loss: what it compares, on which scales, and whole jobs."""

import json
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.errors import UserError
from models.formats import image_models as files
from models.formats.storage import leaves_by_path
from models.images.config import VARConfig, scale_starts
from tests.train.conftest import VAR
from tests.train.test_trainer import lines, weights
from tests.train.test_var_objective import log_softmax, reference_lesson, reference_logits, taken
from tests.train.test_vqvae import smoke, widened
from train import trainer
from train.objectives.code_refiner import divergence

PLAIN = {"class_dropout": 0.0, "stochastic_depth": 0.0}
FIRST = scale_starts(VAR.scales)[2]


@pytest.mark.usefixtures("x64")
def test_the_loss_equals_its_definition(image_setting):
    objective, params, frozen, batch = image_setting("code_refiner", **PLAIN)
    params, frozen = widened(params), widened(frozen)
    config = objective._config

    @jax.jit  # One program for all of them: what the section says of the two is an argument.
    def loss(alpha, temperature):
        objective._config = types.SimpleNamespace(**{**vars(config), "alpha": alpha, "temperature": temperature})
        return objective.loss(params, frozen, batch, jax.random.key(0), 0.0)

    codes, features = reference_lesson(frozen, batch)
    student = reference_logits(objective.model, params, batch["label"], features)[:, FIRST:]
    teacher = reference_logits(VAR, frozen["teacher"], batch["label"], features)[:, FIRST:]
    exact = -taken(log_softmax(student), codes[:, FIRST:])
    for alpha, temperature in [(0.5, 1.0), (0.7, 2.0), (1.0, 0.5), (0.0, 1.0)]:
        (total, weight), parts = loss(alpha, temperature)
        log_p, log_q = log_softmax(teacher / temperature), log_softmax(student / temperature)
        compared = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)
        assert float(total) == pytest.approx((alpha * temperature**2 * compared + (1 - alpha) * exact).sum(), rel=1e-9)
        assert weight == 6 * (30 - FIRST) and parts["divergence"][0] == pytest.approx(compared.sum(), rel=1e-9)
        assert parts["cross_entropy"][0] == pytest.approx(exact.sum(), rel=1e-9)


@pytest.mark.usefixtures("x64")
def test_nothing_is_to_be_learnt_from_oneself(image_setting, image_models):
    given = {"model": None, "init_from": image_models["var"]}
    objective, _, frozen, batch = image_setting("code_refiner", **{**PLAIN, "class_dropout": 0.5}, **given, alpha=1.0)
    frozen = widened(frozen)

    def loss(params):
        return objective.loss(params, frozen, batch, jax.random.key(0), 0.0)[0][0]

    # With classes withheld: both must have been told the same.
    value, slope = jax.jit(jax.value_and_grad(loss))(frozen["teacher"])
    assert abs(float(value)) < 1e-12
    assert max(np.abs(leaf).max() for leaf in leaves_by_path(slope).values()) < 1e-9


def test_smaller_scales_count_only_as_what_is_read(image_setting):
    objective, params, frozen, batch = image_setting("code_refiner", **PLAIN)
    lesson = jax.jit(lambda: objective.lesson(frozen, batch, None))()

    @jax.jit
    def loss(params, lesson):
        objective.lesson = lambda *_: lesson
        return objective.loss(params, frozen, batch, jax.random.key(0), 0.0)[0][0]

    whole = loss(params, lesson)
    assert whole == loss(params, lesson._replace(codes=lesson.codes.at[:, :FIRST].set(0)))
    assert whole != loss(params, lesson._replace(codes=lesson.codes.at[:, FIRST].add(1)))
    assert whole != loss(params, lesson._replace(features=lesson.features.at[:, 0].add(1)))


def test_divergence_is_asymmetric_and_zero_for_equals():
    teacher = jnp.log(jnp.array([[[0.5, 0.5], [0.9, 0.1]]]))
    student = jnp.log(jnp.array([[[0.9, 0.1], [0.9, 0.1]]])) + 3.0
    expected = 0.5 * np.log(0.5 / 0.9) + 0.5 * np.log(0.5 / 0.1)
    np.testing.assert_allclose(divergence(teacher, student, 1.0), [[expected, 0.0]], atol=1e-6)


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        ({"teacher": None}, "objective.teacher must be a VAR directory"),
        ({"alpha": 1.5}, "objective.alpha must lie in 0..1"),
        ({"temperature": 0.0}, "objective.temperature must be positive"),
        ({"first_scale": 0}, "objective.first_scale must lie in 1..3"),
        ({"first_scale": 4}, "objective.first_scale must lie in 1..3"),
    ],
)
def test_a_wrong_section_gets_one_sentence(objective, words, image_job):
    with pytest.raises(UserError) as caught:
        trainer.make_plan(image_job("code_refiner", objective=objective), ("A", "B", "C"))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_teacher_over_other_codes_is_refused(image_job, image_models, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(image_models["var"], other)
    record = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**record, "vocab_size": 25}))
    with pytest.raises(UserError, match=r"other has vocab_size 25, but the tokenizer .* has 24"):
        trainer.make_plan(image_job("code_refiner", objective={"teacher": str(other)}), ("A", "B", "C"))


@pytest.mark.slow
def test_a_job_comes_closer_and_a_killed_one_ends_bitwise_as_it(image_job, die_at, tmp_path):
    changes = {"steps": 16, "checkpoint": {"every": 6}, "evaluation": {"every": 8}, "optimizer": {"ema": 0.5}}
    config = image_job("code_refiner", objective={"alpha": 1.0}, **changes)
    trainer.train(config, tmp_path / "whole")
    with die_at(14):
        trainer.train(config, tmp_path / "broken")
    trainer.train(config, tmp_path / "broken")
    assert weights(tmp_path / "whole" / "refiner") == weights(tmp_path / "broken" / "refiner")
    found = lines(tmp_path / "whole")
    assert found == lines(tmp_path / "broken")
    valid = [line["valid/divergence"] for line in found if "valid/divergence" in line]
    assert valid[-1] < valid[0]
    record = json.loads((tmp_path / "whole" / "refiner" / "config.json").read_text())
    assert record["provenance"] == {"objective": "code_refiner", "first_scale": 2} and record["depth"] == 2


@pytest.mark.slow
def test_the_smoke_job_runs(image_set, image_models, tmp_path):
    options = ["steps=3", "optimizer.warmup_steps=1", f"objective.tokenizer={image_models['vqvae']}"]
    models = [f"objective.{name}={image_models['var']}" for name in ("teacher", "init_from")]
    said = smoke("code_refiner", image_set, tmp_path, *options, *models)
    assert "finished 3 steps" in said and "divergence" in said
    assert files.read_config(tmp_path / "refiner", VARConfig) == VAR
