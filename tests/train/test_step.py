"""The trainer's step and its evaluation by their numbers: keys, progress, rates, averages, replaced parameters."""

import json
import math

import jax
import numpy as np
import pytest

from tests.train.least import SIZE, Least, least_config
from train import trainer
from train.data.corpus import open_corpus
from train.data.texts import PackedRows
from train.objectives import OBJECTIVES


@pytest.fixture(autouse=True)
def least_is_known(monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "least", Least)


def states_and_metrics(config, replace=None):
    """The state after every step, that before the first included; the metrics of every step, as floats."""
    corpus = open_corpus(config)
    plan = trainer.make_plan(config, corpus.facts)
    if replace is not None:
        plan.objective.replace = replace
    states, metrics = [trainer.init_state(config, plan.objective, plan.optimizer, None)], []
    step, batches = jax.jit(trainer.make_step(plan)), corpus.batches(config.batch_size, config.seed)
    for _ in range(config.steps):
        state, told = step(states[-1], None, trainer.to_devices(plan, next(batches)))
        states.append(state)
        metrics.append({name: float(value) for name, value in told.items()})
    return states, metrics


def test_every_step_draws_anew_and_every_seed_otherwise(data_set):
    drawn = {}
    for seed in (0, 1):
        handed = []

        def replace(trainable, frozen, batch, step, progress, key, handed=handed):
            jax.debug.callback(lambda x: handed.append(float(x)), jax.random.uniform(key))
            return trainable, None

        _, metrics = states_and_metrics(least_config(data_set, seed=seed), replace)
        jax.effects_barrier()
        # The hook that replaces parameters draws apart from the loss.
        drawn[seed] = [line["drawn"] for line in metrics] + handed
    everything = drawn[0] + drawn[1]
    assert len(everything) == 20 and len(set(everything)) == 20


def test_a_step_tells_its_own_progress_rate_loss_and_batch(data_set):
    config = least_config(data_set, optimizer={"final_fraction": 0.5, "schedule": "linear"})
    states, metrics = states_and_metrics(config)
    # Up in two steps, then down to a half at the sixth, which never comes.
    rates = [0.05, 0.1, 0.1, 0.1 - 0.05 / 3, 0.1 - 0.1 / 3]
    batches = open_corpus(config).batches(config.batch_size, config.seed)
    for step, line in enumerate(metrics):
        assert line["progress"] == pytest.approx(step / 5)
        assert line["learning_rate"] == pytest.approx(rates[step], rel=1e-5)
        before, after = (np.asarray(states[k]["params"]["numbers"]) for k in (step, step + 1))
        np.testing.assert_allclose(before - after, rates[step], rtol=1e-4)  # What was told is what was done.
        assert line["loss"] == pytest.approx((SIZE + 2) * before[0], rel=1e-5)
        assert line["gradient_norm"] == pytest.approx(math.sqrt(SIZE + 2))
        assert line["tokens"] == pytest.approx(next(batches)["tokens"].mean(), rel=1e-5)


def test_the_average_is_of_all_steps_and_what_a_run_evaluates_and_leaves(data_set, tmp_path):
    config = least_config(data_set, optimizer={"ema": 0.4})
    states, _ = states_and_metrics(config)
    average = 1.0
    for done, state in enumerate(states[1:], start=1):
        decay = min(0.4, (1 + done) / (10 + done))
        average = decay * average + (1 - decay) * float(state["params"]["numbers"][0])
        np.testing.assert_allclose(state["average"]["numbers"], average, rtol=1e-6)
    trainer.train(config, tmp_path)
    newest = float(states[-1]["params"]["numbers"][0])
    np.testing.assert_allclose(np.load(tmp_path / "numbers" / "numbers.npy"), average, rtol=1e-6)
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["valid/number"] == pytest.approx(average, rel=1e-6) and abs(average - newest) > 0.02


def test_replaced_parameters_take_the_place_of_updated_ones(data_set):
    def replace(trainable, frozen, batch, step, progress, key):
        old = trainable["numbers"]
        replaced = (step == 2) & (progress == 2 / 5) & (np.arange(SIZE) < 4)
        # The fourth is replaced by what it was: its average begins anew all the same.
        numbers = jax.numpy.where(replaced & (np.arange(SIZE) < 3), 7.0, old)
        return {**trainable, "numbers": numbers}, {"numbers": replaced, "others": None}

    states, _ = states_and_metrics(least_config(data_set, steps=5, optimizer={"ema": 0.5}), replace)
    for kept in ("params", "average"):
        assert not np.any(states[1][kept]["numbers"] == 7.0)
        # An average of what was and what took its place would be neither.
        np.testing.assert_array_equal(states[2][kept]["numbers"] == 7.0, np.arange(SIZE) < 3)
    newest, average = states[2]["params"], states[2]["average"]
    np.testing.assert_array_equal(newest["numbers"] == average["numbers"], np.arange(SIZE) < 4)
    assert not np.any(newest["others"] == average["others"])


@pytest.mark.parametrize("batches", [None, 2])
def test_validation_is_a_ratio_of_sums_over_the_rows_that_are_text(batches, data_set):
    config = least_config(data_set, batch_size=4, length=16, evaluation={"batches": batches})
    corpus = open_corpus(config)
    plan = trainer.make_plan(config, corpus.facts)
    found = trainer.make_evaluation(plan, corpus)({"numbers": np.ones(SIZE)}, None)
    rows = [PackedRows(corpus.valid, 16)[i] for i in range(len(PackedRows(corpus.valid, 16)))]
    rows = rows if batches is None else rows[: 4 * batches]
    tokens = np.stack([row["tokens"] for row in rows])[np.stack([row["segments"] for row in rows]) > 0]
    assert found["token"] == pytest.approx(tokens.mean(), rel=1e-6) and found["number"] == 1
    if batches is None:
        # The last batch is not full, so that a mean of the batches' means is another number.
        each = [
            np.concatenate([r["tokens"][r["segments"] > 0] for r in rows[i : i + 4]]) for i in range(0, len(rows), 4)
        ]
        means = [part.mean() for part in each]
        assert len(rows) % 4 and abs(np.mean(means) / tokens.mean() - 1) > 1e-4
