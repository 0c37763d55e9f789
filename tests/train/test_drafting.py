"""What every drafter's objective shares: guesses from some positions, logits read late, drafters without heads."""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from decoding.drafters.draft_model import DraftModel
from decoding.drafters.registry import load_drafter
from models import transformer
from models.formats.storage import leaves_by_path
from models.formats.target import load_target
from tests.train.conftest import tiny_job
from train import trainer
from train.objectives import OBJECTIVES
from train.objectives.drafting import DraftObjective
from train.objectives.guess import Guess, Weights, losses
from train.objectives.shift import ahead

# Places that guesses are made from, per row: out of order, one of them twice, the ends of the row among them.
ANCHORS = [[0, 31, 7, 12, 12], [3, 2, 1, 30, 9], [5, 28, 6, 29, 11], [20, 4, 13, 17, 22]]


def picked(guess: Guess, at: jax.Array) -> Guess:
    """A guess from everywhere, cut to the places `at`."""
    of_at = jax.vmap(lambda row, places: row[places])
    hidden, labels = jax.tree.map(lambda x: of_at(x, at), (guess.hidden, guess.labels))
    return Guess(hidden, at, labels, guess.read)


@pytest.mark.parametrize(
    ("name", "objective"),
    [
        ("draft_heads", {"hard": 0.5, "soft": 0.7, "feature": 0.3, "head_decay": 0.5}),
        ("eagle3", {"vocabulary": 12}),
    ],
)
def test_guesses_from_some_positions_count_as_these_among_all(name, objective, draft_setting, monkeypatch):
    objective, params, frozen, batch = draft_setting(name, **objective)
    at = jnp.array(ANCHORS)
    guesses = objective.guesses

    def everything(params):
        """(sum, weight) that each place adds, by letting it count alone; without anchors."""
        target = objective.read_target(frozen, batch)
        everywhere = objective.teacher_forced(target, params, frozen, batch, None)
        teacher = objective.teacher(target, frozen, asked=False)
        places = jnp.arange(batch["tokens"].size).reshape(batch["tokens"].shape)

        def alone(place):
            labels = [g.labels._replace(counted=g.labels.counted & (places == place)) for g in everywhere]
            some = [g._replace(labels=own) for g, own in zip(everywhere, labels, strict=True)]
            return jnp.stack(losses(some, teacher, objective._config.weights), axis=-1)

        wanted = at + batch["tokens"].shape[1] * jnp.arange(len(at))[:, None]
        return jnp.sum(jax.lax.map(alone, wanted.reshape(-1)), axis=0)

    expected = np.asarray(jax.jit(everything)(params))
    monkeypatch.setattr(objective, "guesses", lambda *a: [picked(guess, at) for guess in guesses(*a)])
    sums = jax.jit(objective.evaluate)(params, frozen, batch)
    for i, (total, weight) in enumerate(expected):
        assert weight > 2
        np.testing.assert_allclose(sums[f"loss_{i + 1}"], (total, weight), rtol=1e-5)
        tokens, counted, _ = objective.labels(batch, i, at)
        np.testing.assert_array_equal(tokens, np.take_along_axis(np.asarray(ahead(batch["tokens"], i + 2)), at, 1))
        assert sums[f"accuracy_{i + 1}"][1] == sums[f"agreement_{i + 1}"][1] == jnp.sum(counted)


def test_choices_at_some_positions_are_compared_with_what_stands_there(draft_setting, monkeypatch):
    objective, params, frozen, batch = draft_setting("draft_heads")
    at = jnp.array(ANCHORS)

    @jax.jit
    def evaluated(params, frozen, batch):
        target = objective.read_target(frozen, batch)

        def perfect(*_):
            logits = [ahead(target.logits, i + 1) for i in range(2)]
            return [picked(Guess(x, None, objective.labels(batch, i), lambda x: x), at) for i, x in enumerate(logits)]

        monkeypatch.setattr(objective, "guesses", perfect)
        return objective.evaluate(params, frozen, batch)

    sums = evaluated(params, frozen, batch)
    for i in range(2):
        agreed, weight = sums[f"agreement_{i + 1}"]
        assert float(agreed) == float(weight) > 2


@pytest.mark.parametrize("name", ["draft_heads", "eagle", "eagle3"])
def test_logits_are_read_late_and_row_by_row(name, draft_setting, monkeypatch):
    objective, params, frozen, batch = draft_setting(name)
    mapped = "vocab" if name == "draft_heads" else "logits"
    read = getattr(type(objective.heads), mapped)
    shapes = []

    def watched(*arguments):
        shapes.append(arguments[-1].shape)
        return read(*arguments)

    monkeypatch.setattr(type(objective.heads), mapped, watched)

    @jax.jit
    def some_and_all(params):
        guesses = objective.teacher_forced(objective.read_target(frozen, batch), params, frozen, batch, None)
        assert not shapes and [guess.at for guess in guesses] == [None] * objective.depth
        return [(guess.read(guess.hidden[1:3, 4:7]), guess.read(guess.hidden)[1:3, 4:7]) for guess in guesses]

    for some, same in some_and_all(params):
        np.testing.assert_allclose(some, same, atol=1e-5)
    assert len(shapes) == 2 * objective.depth


@dataclasses.dataclass(frozen=True)
class DraftModelConfig:
    """The section of `DraftModelObjective`."""

    reads: ClassVar[str] = "text"
    labels: ClassVar[str] = "all"
    weights: ClassVar[Weights] = Weights(1.0, 0.0, 0.0, 1.0)

    name: Literal["draft_model"]
    target: str
    loop_prompts: int = 2
    loop_tokens: int = 6

    @property
    def base(self):
        return self.target

    def untrained(self, model):
        return DraftModel(dataclasses.replace(model, num_layers=1))


class DraftModelObjective(DraftObjective):
    """A draft model that learns the text beside its target: at p + 1 it guesses the first draft token."""

    Config = DraftModelConfig
    depth = 1

    def guesses(self, params, frozen, batch, target, layout, key):
        model = self.drafter.model
        hidden = ahead(transformer.forward(model, params, batch["tokens"], layout).hidden, 1)
        read = Partial(lambda head, x: transformer.head(model, head, x), transformer.head_params(params))
        return [Guess(hidden, None, self.labels(batch, 0), read)]


def test_a_drafter_without_heads_is_trained_like_any_other(data_set, target_directory, monkeypatch, tmp_path):
    monkeypatch.setitem(OBJECTIVES, "draft_model", DraftModelObjective)
    config = tiny_job(data_set, {"name": "draft_model", "target": str(target_directory)}, steps=2)
    target = load_target(target_directory)
    objective = DraftModelObjective(config.objective, target.tokenizer)
    fresh = jax.eval_shape(objective.init, jax.random.key(0), objective.base)
    wanted = transformer.param_shapes(objective.drafter.model, jnp.float32)
    assert leaves_by_path(fresh) == leaves_by_path(wanted)
    trainer.train(config, tmp_path)
    drafter, params = load_drafter(tmp_path / "drafter", target)
    assert drafter == objective.drafter and params is not None
    (found,) = [line for line in (tmp_path / "metrics.jsonl").read_text().splitlines() if "valid/" in line]
    assert '"valid/loop_1": ' in found and "replay_1" not in found
