"""The base class of objectives: what must be defined is enough, and an incomplete objective is refused at the start."""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.errors import UserError
from tests.train.least import Least, LeastConfig, least_config
from train import trainer
from train.objectives import OBJECTIVES
from train.objectives.drafting import DraftObjective
from train.objectives.objective import Objective


def test_what_an_objective_must_define_is_enough_for_a_run(data_set, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(OBJECTIVES, "least", Least)
    trainer.train(least_config(data_set), tmp_path / "run")
    assert np.all(np.load(tmp_path / "run" / "numbers" / "numbers.npy") < 1)
    assert "valid: number 0." in capsys.readouterr().out


@pytest.mark.parametrize("member", ["Config", "product", "init", "loss", "evaluate", "export"])
def test_an_incomplete_objective_is_refused_with_one_sentence(member, data_set, monkeypatch):
    members = {name: value for name, value in vars(Least).items() if name != member}
    monkeypatch.setitem(OBJECTIVES, "least", type("Torn", (Objective,), members))
    with pytest.raises(UserError, match=f"^the objective Torn is incomplete: it does not define {member}$"):
        least_config(data_set)


def test_a_drafters_objective_without_guesses_is_refused_too(data_set, monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "least", type("Torn", (DraftObjective,), {"Config": LeastConfig}))
    expected = (
        "depth, guesses, Config.labels, Config.loop_prompts, Config.loop_tokens, Config.weights, Config.untrained"
    )
    with pytest.raises(UserError, match=rf"Torn is incomplete: it does not define {expected}$"):
        least_config(data_set)


@dataclasses.dataclass(frozen=True)
class Unread:
    """A section that says too little."""

    name: Literal["least"]


@dataclasses.dataclass(frozen=True)
class Baseless(Unread):
    """One of text that does not say what it starts from."""

    reads: ClassVar[str] = "text"


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"Config": Unread}, r"it does not define Config\.reads$"),
        ({"Config": Baseless}, r"it does not define Config\.base$"),
        (
            {"Config": type("Sound", (Unread,), {"reads": "sound"})},
            r"its Config\.reads is 'sound', expected one of text, ",
        ),
        ({"Config": object}, "its Config is no dataclass$"),
    ],
)
def test_an_incomplete_section_is_refused_with_one_sentence(members, words, data_set, monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "least", type("Torn", (Least,), members))
    with pytest.raises(UserError, match=f"^the objective Torn is incomplete: {words}"):
        least_config(data_set)


def test_what_an_evaluation_lacks_shows_before_the_first_step(data_set, monkeypatch, tmp_path):
    def evaluate(self, trainable, frozen, batch):
        return {"number": trainable["numbers"].mean()}

    monkeypatch.setitem(OBJECTIVES, "least", type("Torn", (Least,), {"evaluate": evaluate}))
    with pytest.raises(UserError, match=r"Torn: evaluate must return name -> \(sum, weight\)"):
        trainer.train(least_config(data_set), tmp_path)
    members = {name: value for name, value in vars(Least).items() if name != "model"}
    monkeypatch.setitem(OBJECTIVES, "least", type("Torn", (Objective,), members))
    with pytest.raises(UserError, match="Torn is incomplete: its __init__ does not set model"):
        trainer.train(least_config(data_set), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_base_that_nothing_reads_is_refused_before_the_first_step(data_set, monkeypatch, tmp_path):
    base = {"table": jax.ShapeDtypeStruct((2, 3), jnp.float32)}
    monkeypatch.setitem(OBJECTIVES, "least", type("Torn", (Least,), {"base": base}))
    with pytest.raises(UserError, match="Torn is incomplete: it has a base, but no load_base"):
        trainer.train(least_config(data_set), tmp_path)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_is_complete(name):
    OBJECTIVES[name].require_complete()
