"""The base class of objectives: what its defaults do, and that an incomplete objective is refused at the start."""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.errors import UserError
from train import trainer
from train.config import parse
from train.objectives import OBJECTIVES
from train.objectives.drafting import DraftObjective
from train.objectives.objective import Objective


@dataclasses.dataclass(frozen=True)
class Section:
    """The section of `Least`."""

    reads: ClassVar[str] = "text"
    base: ClassVar[None] = None

    name: Literal["least"] = "least"


class Shape:
    """A model of any length."""

    max_position = 64


class Least(Objective):
    """An objective of nothing but what it must define: one number, which learns to be the mean token."""

    Config = Section
    product = "number"
    model = Shape()

    def __init__(self, config, facts):
        pass

    def init(self, key, base):
        return {"number": jnp.zeros(())}

    def loss(self, trainable, frozen, batch, key, progress):
        error = jnp.square(batch["tokens"] / 256 - trainable["number"])
        return (jnp.sum(error), jnp.float32(error.size)), {}

    def evaluate(self, trainable, frozen, batch):
        (total, weight), _ = self.loss(trainable, frozen, batch, None, 0.0)
        return {"error": (total, weight)}

    def export(self, directory, trainable, frozen):
        directory.mkdir()
        np.save(directory / "number.npy", trainable["number"])


def least_job(data_set, **changes):
    raw = {
        "objective": {"name": "least"},
        "data": {"path": str(data_set)},
        "optimizer": {"learning_rate": 0.1},
        "evaluation": {"every": 100, "batches": 1},
        "checkpoint": {"every": 100},
        "steps": 2,
        "batch_size": 2,
        "length": 32,
        **changes,
    }
    return parse(raw, OBJECTIVES)


def test_what_an_objective_must_define_is_enough_for_a_run(data_set, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(OBJECTIVES, "least", Least)
    trainer.train(least_job(data_set), tmp_path / "run")
    assert np.load(tmp_path / "run" / "number" / "number.npy") > 0
    assert "valid: error " in capsys.readouterr().out


@pytest.mark.parametrize("member", ["Config", "product", "init", "loss", "evaluate", "export"])
def test_an_incomplete_objective_is_refused_with_one_sentence(member, data_set, monkeypatch):
    members = {name: value for name, value in vars(Least).items() if name != member}
    monkeypatch.setitem(OBJECTIVES, "least", type("Torn", (Objective,), members))
    with pytest.raises(UserError, match=f"^the objective Torn is incomplete: it does not define {member}$"):
        least_job(data_set)


def test_a_drafter_without_guesses_is_refused_too(data_set, monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "least", type("Torn", (DraftObjective,), {"Config": Section}))
    with pytest.raises(UserError, match="Torn is incomplete: it does not define depth, guesses$"):
        least_job(data_set)


def test_a_base_that_nothing_reads_is_refused_before_the_first_step(data_set, monkeypatch, tmp_path):
    base = {"table": jax.ShapeDtypeStruct((2, 3), jnp.float32)}
    monkeypatch.setitem(OBJECTIVES, "least", type("Torn", (Least,), {"base": base}))
    with pytest.raises(UserError, match="Torn is incomplete: it has a base, but no load_base"):
        trainer.train(least_job(data_set), tmp_path)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_is_complete(name):
    OBJECTIVES[name].require_complete()
