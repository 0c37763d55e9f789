"""Several drafters from one forward against jobs of their own, and features kept on disk against the live forward."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from decoding.drafters.registry import load_drafter
from models import schema
from models.errors import UserError
from models.formats.target import load_target
from tests.train.conftest import STUDENT
from train import dry_run, trainer
from train.data.corpus import open_corpus
from train.data.features import files_in
from train.objectives.drafting import DraftObjective
from train.objectives.several import SeveralConfig
from train.objectives.target_features import TargetFeatures, arrays_to_keep, rounded, target_features

HYDRA = {
    "name": "draft_heads",
    "drafter": "hydra",
    "heads": {"num_heads": 1, "num_layers": 1, "prefix": False, "dropout": 0.2},
    "soft": 1.0,
    "feature": 0.1,
    "noise": 2.0,
    "loop_prompts": 0,
}
MEDUSA = {
    "name": "draft_heads",
    "drafter": "medusa",
    "heads": {"num_heads": 1, "num_layers": 1},
    "hard": 0.0,
    "soft": 1.0,
    "loop_prompts": 0,
}
EAGLE3 = {"name": "eagle3", "steps": 1, "vocabulary": 12, "loop_prompts": 0}
BOTH = {"hydra": HYDRA, "third": EAGLE3}
OWN = {"learning_rate": 3e-3, "warmup_steps": 1, "weight_decay": 0.1, "clip_norm": 0.1}


@pytest.fixture
def several(job, target_directory):
    """`several({"name": section}, steps=3)`: the config of a tiny job, in which Hydra has an optimizer of its own."""

    def make(sections, **changes):
        members = {name: {"objective": section} for name, section in sections.items()}
        for name in sections.keys() & {"hydra"}:
            members[name]["optimizer"] = OWN
        section = {"name": "several", "target": str(target_directory), "members": members}
        return job("several", objective=section, **changes)

    return make


def test_a_member_ends_where_a_job_of_its_own_ends(several, job):
    configs = {
        "": several({"hydra": HYDRA, "medusa": MEDUSA}),
        "hydra": job("draft_heads", objective={**HYDRA}, optimizer=OWN),
        "medusa": job("draft_heads", objective={**MEDUSA}),
    }
    corpus = open_corpus(configs[""])
    plans = {name: trainer.make_plan(config, corpus.facts) for name, config in configs.items()}
    frozen = {name: plan.objective.load_base(plan.mesh) for name, plan in plans.items()}
    source = corpus.batches(4, 0)
    batches = [trainer.to_devices(plans[""], next(source)) for _ in range(3)]

    @jax.jit
    def run(frozen, batches):
        """Three steps of every job, as one program: what is the same in two of them is compiled once."""
        states = {n: trainer.init_state(configs[n], p.objective, p.optimizer, frozen[n]) for n, p in plans.items()}

        def step(states, batch):
            done = {n: trainer.make_step(p)(states[n], frozen[n], batch) for n, p in plans.items()}
            return {n: state for n, (state, _) in done.items()}, {n: told for n, (_, told) in done.items()}

        return jax.lax.scan(step, states, jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches))

    def close(ours, theirs):  # XLA may fuse them otherwise.
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)

    states, told = jax.device_get(run(frozen, batches))
    for name in ("hydra", "medusa"):
        jax.tree.map(close, states[""]["params"][name], states[name]["params"])
        np.testing.assert_allclose(told[""][f"{name}/loss"], told[name]["loss"], rtol=1e-6)
        np.testing.assert_array_equal(told[""][f"{name}/learning_rate"], told[name]["learning_rate"])
    both = told["hydra"]["loss"] + told["medusa"]["loss"]
    np.testing.assert_allclose(told[""]["loss"], both, rtol=1e-6)
    assert "learning_rate" not in told[""] and not np.array_equal(told["hydra"]["loss"], told["medusa"]["loss"])


def test_a_job_writes_features_once_and_reads_them_bitwise_alike(several, die_at, target_directory, tmp_path, capsys):
    kept = tmp_path / "kept"
    config = several({"one": MEDUSA}, steps=4, data={"features": str(kept), "features_top_k": 5})
    assert dry_run.describe(config).endswith(f"GB, to be written to {kept}")
    trainer.train(config, tmp_path / "whole")
    assert dry_run.describe(config).endswith(f"GB, read from {kept}")
    written = {path: path.stat().st_mtime_ns for path in files_in(kept)}
    with die_at(3):
        trainer.train(config, tmp_path / "broken")
    trainer.train(config, tmp_path / "broken")
    assert written and {path: path.stat().st_mtime_ns for path in files_in(kept)} == written
    assert "resuming from step 2 of 4" in capsys.readouterr().out
    weights = "drafters/one/model.safetensors"
    assert (tmp_path / "whole" / weights).read_bytes() == (tmp_path / "broken" / weights).read_bytes()
    drafter, _ = load_drafter(tmp_path / "whole" / "drafters" / "one", load_target(target_directory))
    assert drafter.heads.num_heads == 1
    last = json.loads((tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"valid/one/loss_1", "valid/one/accuracy_1", "valid/one/agreement_1"} < last.keys()
    with pytest.raises(
        UserError, match=rf"{kept} has int32\[32,5\] as target/top_tokens, of which this job reads int32"
    ):
        trainer.train(several({"one": MEDUSA}, data={"features": str(kept), "features_top_k": 4}), tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_two_devices_learn_from_kept_features_what_one_learns(several, as_code, on_two_devices, tmp_path):
    def losses(workdir):
        lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        return np.array([[line["hydra/loss"], line["third/loss"]] for line in lines if "loss" in line])

    trainer.train(several(BOTH, steps=3, data={"features": str(tmp_path / "one")}), tmp_path / "run")
    for mesh in ({"data": 2}, {"data": 1, "tensor": 2}):
        name = "-".join(mesh)
        config = several(BOTH, steps=3, data={"features": str(tmp_path / f"kept-{name}")}, mesh=mesh)
        run = (
            f"import pathlib\nfrom train import trainer\ntrainer.train(config, pathlib.Path({str(tmp_path / name)!r}))"
        )
        on_two_devices(as_code(config) + run)
        np.testing.assert_allclose(losses(tmp_path / name), losses(tmp_path / "run"), rtol=1e-3)


def test_a_loss_from_kept_features_is_that_of_the_rounded_forward(draft_setting, several, monkeypatch):
    objective, params, frozen, batch = draft_setting("several", members=several(BOTH).objective.members)
    length, size = batch["tokens"].shape[1], objective.model.vocab_size
    arrays = {k: arrays_to_keep(objective.model, objective.target_taps, length, k) for k in (0, 5)}
    assert [name.removeprefix("target/") for name in arrays[0]] == ["layer:1", "post_norm"]
    assert [name.removeprefix("target/") for name in arrays[5]][2:] == ["top_tokens", "top_log_probabilities"]

    @jax.jit
    def keep(batch):
        live = objective.read_target(frozen, batch)
        return live.taps, live.logits, {k: rounded(live, arrays[k]) for k in arrays}

    @jax.jit
    def losses(batches, taps):
        def loss(batch):
            return objective.loss(params, frozen, batch, jax.random.key(0), 0.0)[0]

        found = {name: loss(batch) for name, batch in batches.items()}
        spread = target_features(objective.model, frozen["target"], batches["5"], ()).logits
        rounded = TargetFeatures(taps, taps["post_norm"], objective.read_target(frozen, batches["live"]).read)
        monkeypatch.setattr(objective, "read_target", lambda frozen, batch: rounded)
        return {**found, "rounded": loss(batch)}, spread

    taps, logits, kept = jax.device_get(keep(batch))
    taps = {name: x.astype(ml_dtypes.bfloat16).astype(x.dtype) for name, x in taps.items()}
    batches = {"live": batch, **{str(k): {**batch, **kept[k]} for k in kept}}
    found, spread = jax.device_get(losses(batches, taps))
    for _, weights in found.values():
        np.testing.assert_array_equal(weights, found["live"][1])  # Everything counts as often.
    np.testing.assert_allclose(found["0"][0], found["rounded"][0], rtol=1e-6)  # Sums of two programs.
    assert not np.array_equal(found["0"][0], found["live"][0])
    np.testing.assert_allclose(found["0"][0], found["live"][0], rtol=0.01)
    # Of five tokens, their own shares; nothing for the rest.
    chances = np.exp(logits - logits.max(axis=-1, keepdims=True)).reshape(-1, size)
    for row, ours in zip(chances, np.exp(spread).reshape(-1, size), strict=True):
        best = np.argsort(-row)[:5]
        np.testing.assert_allclose(ours[best], row[best] / row.sum(), rtol=0.03)
        assert np.count_nonzero(ours) == 5


def test_every_member_is_evaluated_and_told_apart(draft_setting, several, monkeypatch, tmp_path):
    objective, params, frozen, batch = draft_setting("several", members=several(BOTH).objective.members)
    monkeypatch.setattr(DraftObjective, "probe", lambda self, *given: {"loop_1": float(next(given[2]) is batch)})
    assert objective.probe(params, frozen, iter([batch])) == {"hydra/loop_1": 1.0, "third/loop_1": 1.0}
    means = {f"{name}/{measure}_1": 0.5 for name in objective.members for measure in ("loss", "accuracy", "agreement")}
    assert objective.report(means) == means
    objective.export(tmp_path / "drafters", params, frozen)
    target = load_target(objective.inputs["objective.target"])
    for name, member in objective.members.items():
        drafter, stored = load_drafter(tmp_path / "drafters" / name, target)
        assert drafter == member.drafter
        if name == "third":
            np.testing.assert_array_equal(stored["draft_vocab"], frozen["beside"]["third"]["draft_vocab"])


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({}, "objective.members must name at least one drafter"),
        ({"a": {"objective": {"name": "lm"}}}, "members.a: objective.name must be one of draft_heads, eagle, eagle3,"),
        ({"a": {"objective": {"name": "eagel"}}}, "got 'eagel' (did you mean 'eagle'?)"),
        ({"a": {"objective": {"name": "eagle", "depht": 1}}}, "unknown key objective.depht (did you mean 'depth'?)"),
        ({"a": {"objective": {"name": "eagle", "depth": 0}}}, "members.a: objective.depth must be at least 1"),
        ({"a": {"objective": {"name": "eagle", "target": "x"}}}, "members.a: objective.target is the same for all"),
        ({"a": {"objectiv": {}}}, "members.a: the config has an unknown key objectiv (did you mean 'objective'?)"),
        ({"a/b": {"objective": {"name": "eagle"}}}, "a name becomes a directory and must have neither dots"),
        ({"a": 3}, "members.a: a member has sections objective and perhaps optimizer, got 3"),
        (
            {"a": {"objective": {"name": "eagle"}, "optimizer": {"learning_rate": 1.0, "ema": 0.5}}},
            "members.a: optimizer.ema must be 0 here",
        ),
    ],
)
def test_wrong_members_get_one_sentence(members, words):
    raw = {"name": "several", "target": "nowhere", "members": members}
    with pytest.raises(UserError) as caught:
        schema.parse(SeveralConfig, raw, "objective")
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("lm", {"data": {"features": "x"}}, "data.features must be None: the objective lm reads no frozen target"),
        ("eagle", {"data": {"features_top_k": 3}}, "data.features_top_k is about what data.features keeps"),
        ("eagle", {"data": {"features": "x", "features_top_k": -1}}, "data.features_top_k must not be negative"),
        ("eagle", {"data": {"features": "x", "features_top_k": 999}}, "data.features_top_k (999) exceeds the vocab"),
        (
            "distill",
            {"objective": {"divergence": {"name": "reverse_kl"}}, "data": {"features": "x", "features_top_k": 8}},
            "data.features_top_k must be 0 with reverse_kl",
        ),
    ],
)
def test_features_that_cannot_be_kept_are_refused(name, changes, words, job):
    with pytest.raises(UserError) as caught:
        dry_run.describe(job(name, **changes))
    assert words in str(caught.value)


def test_a_warm_up_of_ones_own_must_be_shorter_than_the_run(several):
    with pytest.raises(UserError, match=r"^hydra: optimizer\.warmup_steps \(1\) must be smaller than steps \(1\)$"):
        dry_run.describe(several({"hydra": HYDRA}, steps=1, optimizer={"warmup_steps": 0}))


def test_members_may_learn_from_what_the_target_writes(job, target_directory):
    members = {"medusa": {"objective": MEDUSA}}
    own = {"members": members, "source": "teacher", "sampling": 0.0, "new_tokens": 12}
    config = job("several", objective=own)
    corpus = open_corpus(config)
    plan = trainer.make_plan(config, corpus.facts)
    frozen = plan.objective.load_base(plan.mesh)
    rows = plan.objective.refresh(None, frozen, next(corpus.batches(4, 0)), jax.random.key(0))
    choice = np.argmax(load_target(target_directory).apply(rows["tokens"]).logits, axis=-1)[:, :-1]
    labels = rows["mask"][:, 1:].astype(bool)
    assert labels.sum() >= 20
    np.testing.assert_array_equal(choice[labels], rows["tokens"][:, 1:][labels])
    with pytest.raises(UserError, match="writes as it goes on"):
        distilled = {"name": "distill", "model": STUDENT, "source": "student"}
        trainer.make_plan(job("several", objective={"members": {"own": {"objective": distilled}}}), corpus.facts)
    with pytest.raises(UserError, match="teacher_mesh splits a target that all have"):
        split = {"name": "distill", "model": STUDENT, "teacher_mesh": "tensor=1"}
        trainer.make_plan(job("several", objective={"members": {"own": {"objective": split}}}), corpus.facts)


def test_draft_models_may_be_members(job, several, target_directory):
    """Their losses have one term each, and heads' one by depth; what one begins as is not kept."""
    own = {"name": "distill", "model": STUDENT, "loop_prompts": 0}
    warm = {"name": "distill", "init_from": str(target_directory), "loop_prompts": 0}
    config = several(
        {"a": warm, "b": {**own, "divergence": {"name": "tvd"}}, "medusa": {**MEDUSA, "heads": {"num_heads": 2}}}
    )
    corpus = open_corpus(config)
    plan = trainer.make_plan(config, corpus.facts)
    assert set(plan.objective.inputs) == {"objective.target", *(f"objective.members.{name}.init_from" for name in "ab")}
    assert set(plan.base["beside"]["a"]) == {"student"}
    assert plan.frozen == {"target": plan.base["target"], "beside": {"a": {}, "b": {}, "medusa": {}}}
    batch = {name: jnp.asarray(values) for name, values in next(corpus.batches(4, 0)).items()}
    (sums, weights), told = jax.eval_shape(
        plan.objective.loss, plan.state["params"], plan.frozen, batch, jax.random.key(0), 0.0
    )
    assert sums.shape == weights.shape == (4,) and {"a/loss", "b/loss", "medusa/loss"} <= told.keys()
