"""The objective of exits: its loss is that of networks cut off there, one by one, and no teacher feels anything."""

import dataclasses
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding.drafters.nested import Nested
from decoding.drafters.registry import load_drafter
from decoding.policies import Static
from decoding.trees import chain
from models import transformer
from models.config import TransformerConfig
from models.errors import UserError
from models.formats.hf import save_target
from models.formats.target import load_target
from models.formats.tokenizer import Tokenizer
from models.layout import Layout
from scripts import convert
from tests.noise import drawn, noisy
from tests.train.conftest import SHAPE, tiny_job
from train import trainer
from train.objectives.divergences import Divergence
from train.objectives.exits import Exits, ExitsConfig

EXITS, LENGTH = (1, 3), 12
DEEP = {**SHAPE, "num_layers": 3}
JSD = Divergence("jsd", beta=0.3)


@pytest.fixture(scope="module")
def tokenizer(data_set):
    return Tokenizer.load(data_set / "tokenizer")


@pytest.fixture(scope="module")
def found(tokenizer):
    """Of labels alone, of the last exit as teacher, and of a teacher each: terms and slopes; of the networks that are
    cut off and of the teachers: what they say. One program, in float64."""
    config = ExitsConfig("exits", DEEP, exits=(1,), weights=(0.5, 2.0), soft=0.7, divergence=JSD)
    alone = Exits(dataclasses.replace(config, soft=0.0, weights=(), divergence=Divergence()), tokenizer)
    self_taught = Exits(config, tokenizer)
    model = alone.model
    teachers = [TransformerConfig(**{**SHAPE, "num_layers": 1, "vocab_size": model.vocab_size + k}) for k in (0, 3)]
    taught = Exits(config, tokenizer)
    taught._config = dataclasses.replace(config, teachers=("a", "b"), hard=0.0)
    taught.teachers = dict(zip("ab", teachers, strict=True))
    rng = np.random.default_rng(0)
    batch = {
        "tokens": rng.integers(0, model.vocab_size, (2, LENGTH)).astype(np.int32),
        "segments": np.repeat([[1, 2], [1, 0]], 6, axis=1).astype(np.int32),
        "mask": np.ones((2, LENGTH), np.uint8),
    }

    def program(params, frozen, batch):
        stacked = transformer.stack_layers(params)

        def of(objective):
            def terms(params, frozen):
                (sums, weights), told = objective.loss(params, frozen, batch, jax.random.key(0), 0.0)
                return sums / weights, (sums / weights, weights, told)

            slopes, told = jax.jacrev(terms, (0, 1), has_aux=True)(stacked, frozen)
            joint = jax.grad(lambda params: jnp.sum(terms(params, frozen)[0]))(stacked)
            return {"slopes": slopes, "joint": joint, **dict(zip(("terms", "weights", "told"), told, strict=True))}

        result = {name: of(one) for name, one in (("labels", alone), ("last", self_taught), ("teachers", taught))}
        layout = Layout.causal(2, LENGTH, batch["segments"])
        networks = [(model, params, e) for e in EXITS] + [(t, f, 1) for t, f in zip(teachers, frozen, strict=True)]
        result["said"] = [
            jax.nn.log_softmax(transformer.forward(c, p, batch["tokens"], layout, layers=(0, e)).logits)
            for c, p, e in networks
        ]
        result["evaluated"] = self_taught.evaluate(stacked, None, batch)
        return result

    with jax.enable_x64(True):
        shapes = [transformer.param_shapes(one, jnp.float64) for one in (model, *teachers)]
        params, *lists = (drawn(shape, 0.3, seed) for seed, shape in enumerate(shapes))
        frozen = [transformer.stack_layers(one) for one in lists]
        run = jax.jit(program)
        result = jax.tree.map(np.asarray, run(params, frozen, batch))
        filler = (batch["tokens"] + 1) % model.vocab_size
        other = {**batch, "tokens": np.where(batch["segments"] > 0, batch["tokens"], filler).astype(np.int32)}
        padded = jax.tree.map(np.asarray, run(params, frozen, other))
    return {**result, "batch": batch, "padded": padded}


def expected(found, e, teacher=None):
    """(cross-entropy, divergence) of exit e, means over the labels, from what whole networks say."""
    batch, log_q = found["batch"], found["said"][e]
    at = np.argwhere((batch["segments"][:, 1:] == batch["segments"][:, :-1]) & (batch["segments"][:, 1:] > 0))
    hard = np.mean([-log_q[b, p, batch["tokens"][b, p + 1]] for b, p in at])
    if teacher is None:
        return hard, None
    q = np.array([np.exp(log_q[b, p]) for b, p in at])
    p = np.array([np.exp(found["said"][teacher][b, p, : q.shape[1]]) for b, p in at])
    p /= p.sum(axis=1, keepdims=True)
    m = JSD.beta * p + (1 - JSD.beta) * q
    soft = JSD.beta * np.sum(p * np.log(p / m), axis=1) + (1 - JSD.beta) * np.sum(q * np.log(q / m), axis=1)
    return hard, np.mean(soft)


def test_the_joint_loss_is_the_sum_of_those_of_networks_cut_off_at_the_exits(found):
    hard = [expected(found, e)[0] for e in (0, 1)]
    # Where no weights are given, an exit has its share of the layers.
    np.testing.assert_allclose(found["labels"]["terms"], [hard[0] / 3, hard[1]], rtol=1e-12)
    shallow = hard[0] + 0.7 * expected(found, 0, 1)[1]
    np.testing.assert_allclose(found["last"]["terms"], [0.5 * shallow, 2 * hard[1]], rtol=1e-12)
    soft = [0.7 * expected(found, 0, 2)[1], 0.7 * expected(found, 1, 3)[1]]
    np.testing.assert_allclose(found["teachers"]["terms"], [0.5 * soft[0], 2 * soft[1]], rtol=1e-12)
    told = found["teachers"]["told"]
    np.testing.assert_allclose([np.divide(*told[f"loss_{e}"]) for e in EXITS], soft, rtol=1e-12)
    assert found["labels"]["weights"].tolist() == [15, 15]
    for of in (found[name] for name in ("labels", "last", "teachers")):
        for apart, together in zip(jax.tree.leaves(of["slopes"][0]), jax.tree.leaves(of["joint"]), strict=True):
            np.testing.assert_allclose(apart.sum(axis=0), together, rtol=1e-9, atol=1e-14)


def test_what_pads_a_row_takes_no_part(found):
    for name in ("labels", "last", "teachers"):
        for kind in ("terms", "weights", "joint"):
            same = zip(*(jax.tree.leaves(of[name][kind]) for of in (found, found["padded"])), strict=True)
            for ours, theirs in same:
                np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-15)


def test_no_teacher_feels_what_it_teaches(found):
    """Not a frozen one, and not the layers behind a shallow exit."""
    for name in ("labels", "last", "teachers"):
        of_params, of_frozen = found[name]["slopes"]
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(of_frozen))
        for leaf in jax.tree.leaves(of_params["layers"]):
            shallow, deep = leaf[:, 0], leaf[:, 1:]
            assert np.any(shallow[0]) and not np.any(deep[0]) and np.any(deep[1])


def test_evaluation_tells_what_the_last_exit_would_keep(found):
    q, p = (np.exp(found["said"][e]) for e in (0, 1))
    counted = np.zeros((2, LENGTH), bool)
    for b, at in np.argwhere(found["batch"]["segments"][:, 1:] == found["batch"]["segments"][:, :-1]):
        counted[b, at] = found["batch"]["segments"][b, at] > 0
    sums = found["evaluated"]
    assert np.divide(*sums["alpha_1"]) == pytest.approx(np.minimum(p, q).sum(axis=-1)[counted].mean(), rel=1e-6)
    agreed = (p.argmax(axis=-1) == q.argmax(axis=-1))[counted].mean()
    assert np.divide(*sums["agreement_1"]) == pytest.approx(agreed, rel=1e-6)
    assert np.divide(*sums["alpha_3"]) == pytest.approx(1, rel=1e-6)
    assert np.divide(*sums["cross_entropy_3"]) == pytest.approx(expected(found, 1)[0], rel=1e-6)


@pytest.mark.parametrize(
    ("section", "complaint"),
    [
        ({"soft": 1.0}, "objective.soft has no use"),
        ({"exits": (2, 1)}, "objective.exits must be numbers of layers that rise"),
        (
            {"exits": (1, 3)},
            r"must lie before the end of the network's 3 layers.*got \[1, 3\]",
        ),
        ({"exits": (1,), "weights": (1.0,)}, "objective.weights must be 2 finite numbers above 0"),
        ({"exits": (1,), "weights": (math.nan, 1.0)}, "objective.weights must be 2 finite numbers above 0"),
        ({"exits": (1,), "weights": (1.0, math.inf)}, "objective.weights must be 2 finite numbers above 0"),
        ({"exits": (1,), "soft": math.inf}, "objective.soft must be 0 or more, and finite"),
        ({"exits": (1,), "teachers": ("a", "b", "c"), "soft": 1.0}, "objective.teachers must be one directory"),
        ({"exits": (1,), "teachers": ("a",)}, "objective.teachers have nothing to teach"),
        ({"exits": (1,), "hard": 0.0, "soft": 1.0}, "the last exit learns nothing"),
        ({"exits": (1,), "layers": 2}, "objective.layers cuts objective.init_from"),
        ({"exits": (1,), "divergence": Divergence("tvd")}, "objective.divergence has no use while objective.soft is 0"),
    ],
)
def test_what_makes_no_sense_is_refused(tokenizer, section, complaint):
    with pytest.raises(UserError, match=complaint):
        Exits(ExitsConfig("exits", DEEP, **section), tokenizer)


@pytest.mark.slow
def test_a_target_teaches_its_own_first_layers_which_then_draft_for_it(data_set, target_directory, tmp_path, capsys):
    """The whole path: a job that begins from a target, the directory it leaves, a drafter of it cut off at an exit."""
    section = {"name": "exits", "model": None, "init_from": str(target_directory), "exits": (1,), "hard": 0.0}
    slow = {"learning_rate": 1e-6}
    config = tiny_job(data_set, {**section, "soft": 1.0, "teachers": ("init_from",)}, steps=2, optimizer=slow)
    trainer.train(config, tmp_path)
    (line,) = [line for line in (tmp_path / "metrics.jsonl").read_text().splitlines() if "valid/" in line]
    told = json.loads(line)
    assert {f"valid/{name}_{e}" for name in ("cross_entropy", "alpha", "agreement") for e in (1, 2)} <= told.keys()
    assert told["valid/alpha_1"] < 0.99 < told["valid/alpha_2"], "its end is still as it was"
    convert.main(
        ["--from", "model", "--src", str(tmp_path / "target"), "--base", str(target_directory), "--exits", "1,2"]
        + ["--thresholds", "0.5", "--policy", "static:tree=chain:2", "--out", str(tmp_path / "nested")]
    )
    assert "which ends after 1,2, for" in capsys.readouterr().out
    drafter, params = load_drafter(tmp_path / "nested", load_target(target_directory))
    assert drafter == Nested(drafter.model, Static(chain(2)), (1, 2), (0.5,)) and len(params["layers"]) == 2

    trained = load_target(tmp_path / "target")
    save_target(tmp_path / "tuned", trained.config, noisy(trained.params, 0.1), trained.tokenizer)
    tuned = load_target(tmp_path / "tuned")
    with pytest.raises(UserError, match="was made for another target"):
        load_drafter(tmp_path / "nested", tuned)
    moved = ["--from", "drafter", "--src", str(tmp_path / "nested"), "--out", str(tmp_path / "moved")]
    convert.main([*moved, "--base", str(tmp_path / "tuned")])
    again, same = load_drafter(tmp_path / "moved", tuned)
    assert again == drafter and jax.tree.all(jax.tree.map(np.array_equal, same, params))


def test_rows_that_a_teacher_cannot_read_are_refused(target_directory, tokenizer):
    shape = {**DEEP, "max_position": 4096}
    objective = Exits(ExitsConfig("exits", shape, exits=(1,), soft=1.0, teachers=(str(target_directory),)), tokenizer)
    objective.check(2048)
    with pytest.raises(UserError, match=r"\(4096\) exceeds the longest sequence of the teacher .* \(2048\)"):
        objective.check(4096)


def test_a_teacher_of_other_tokens_is_refused(target_directory, tokenizer, tmp_path):
    config = ExitsConfig("exits", DEEP, exits=(1,), soft=1.0, teachers=(str(tmp_path / "other"),))
    shutil.copytree(target_directory, tmp_path / "other")
    path = tmp_path / "other" / "tokenizer.json"
    definition = json.loads(path.read_text())
    vocabulary = definition["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(definition))
    with pytest.raises(UserError, match=r"has another tokenizer .* than the data set"):
        Exits(config, tokenizer)
