"""The trainer end to end: learning, resuming, freezing, sharding, stopping, and what it leaves behind."""

import functools
import json
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from decoding.drafters.registry import load_drafter
from models.errors import UserError
from models.formats.storage import leaves_by_path
from models.formats.target import load_target
from models.schema import resolved
from tests.train.least import Least, least_config
from train import dry_run, provenance, trainer
from train.checkpoint import not_finite, saved_steps
from train.data.corpus import open_corpus
from train.objectives import OBJECTIVES

ROOT = pathlib.Path(__file__).resolve().parents[2]
TIMINGS = ("step_seconds", "tokens_per_second", "images_per_second", "data_share")


def lines(workdir: pathlib.Path) -> list[dict]:
    """Metric lines without what a clock says."""
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMINGS} for line in found]


def weights(directory: pathlib.Path) -> bytes:
    return (directory / "model.safetensors").read_bytes()


def test_a_run_learns_and_leaves_a_target(job, tmp_path, capsys):
    config = job("lm", steps=20, checkpoint={"every": 10}, evaluation={"every": 10})
    trainer.train(config, tmp_path)
    found = lines(tmp_path)
    losses = [line["loss"] for line in found if "loss" in line]
    valid = [line["valid/loss"] for line in found if "valid/loss" in line]
    target = load_target(tmp_path / "target")
    assert abs(losses[0] - math.log(target.config.vocab_size)) < 0.1
    assert losses[-1] < losses[0] - 1.0 and valid[1] < valid[0]
    assert [line["step"] for line in found if "loss" in line] == list(range(1, 21))
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["finished"] and record["versions"]["jax"] == jax.__version__
    assert record["config"] == json.loads(json.dumps(resolved(config)))
    said = capsys.readouterr().out
    for words in ("trainable parameters", "compiled in", "tokens/s", "ms/step", "data ", "perplexity", "finished 20"):
        assert words in said


@pytest.mark.parametrize("ema", [pytest.param(0.0, marks=pytest.mark.slow), 0.9])
def test_a_killed_run_ends_bitwise_as_one_that_was_not(ema, job, tmp_path, die_at, capsys):
    config = job("lm", evaluation={"every": 3}, optimizer={"ema": ema})
    trainer.train(config, tmp_path / "whole")
    for step in (3, 6):  # Between two checkpoints; then after the last step, before its checkpoint.
        with die_at(step):
            trainer.train(config, tmp_path / "broken")
    trainer.train(config, tmp_path / "broken")
    assert "resuming from step 4 of 6" in capsys.readouterr().out
    assert weights(tmp_path / "whole" / "target") == weights(tmp_path / "broken" / "target")
    assert lines(tmp_path / "whole") == lines(tmp_path / "broken")


def test_draft_heads_resume_bitwise_with_noise_and_dropout_in_parts_and_in_bfloat16(job, tmp_path, die_at):
    heads = {"num_heads": 2, "num_layers": 2, "prefix": True, "dropout": 0.3}
    cheap = {"accumulate": 2, "precision": "bfloat16"}
    config = job("draft_heads", objective={"heads": heads, "noise": 5.0, "soft": 1.0}, **cheap)
    trainer.train(config, tmp_path / "whole")
    with die_at(5):
        trainer.train(config, tmp_path / "broken")
    trainer.train(config, tmp_path / "broken")
    assert weights(tmp_path / "whole" / "drafter") == weights(tmp_path / "broken" / "drafter")


def test_what_is_drawn_beside_the_loss_shares_no_key_with_any_part_of_a_step() -> None:
    state = {"key": jax.random.key_data(jax.random.key(3)), "step": np.int32(7)}
    step = jax.random.fold_in(jax.random.key(3), 7)
    drawn = [jax.random.key_data(key).tolist() for key in (trainer.refresh_key(state), trainer.beside(step, 2))]
    parts = jax.random.key_data(jax.random.split(step, 64)).tolist()
    assert drawn[0] != drawn[1] and not any(key in parts for key in drawn)
    assert jax.random.key_data(jax.random.fold_in(step, 2)).tolist() in parts


def test_what_an_objective_makes_between_steps_serves_as_many_as_it_says_and_is_made_again(
    data_set, monkeypatch, tmp_path, die_at
):
    def refresh(self, trainable, frozen, batch, key):
        drawn = np.asarray(jax.random.randint(key, batch["tokens"].shape, 0, 100), np.int32)
        return {"tokens": drawn + int(trainable["numbers"][0] * 1000)}

    monkeypatch.setitem(OBJECTIVES, "least", type("Drawing", (Least,), {"refresh_every": 2, "refresh": refresh}))
    config = least_config(data_set, steps=6, checkpoint={"every": 4})
    trainer.train(config, tmp_path / "whole")
    with die_at(6):
        trainer.train(config, tmp_path / "broken")
    trainer.train(config, tmp_path / "broken")
    assert lines(tmp_path / "whole") == lines(tmp_path / "broken")
    tokens = [line["tokens"] for line in lines(tmp_path / "whole") if "tokens" in line]
    assert tokens[::2] == tokens[1::2] and len(set(tokens)) == 3
    # A run that ended between two refreshes and is given more steps makes its text anew; none is on record.
    ended = functools.partial(least_config, data_set, optimizer={"final_fraction": 1.0}, checkpoint={"every": 2})
    trainer.train(ended(steps=3), tmp_path / "longer")
    trainer.train(ended(steps=5), tmp_path / "longer")
    tokens = [line["tokens"] for line in lines(tmp_path / "longer") if "tokens" in line]
    assert len(set(tokens)) == 4 and tokens[0] == tokens[1] and min(tokens) > 500
    with pytest.raises(UserError, match="must be a multiple of the 2 steps"):
        trainer.train(least_config(data_set, checkpoint={"every": 3}), tmp_path / "odd")


@pytest.mark.slow
def test_a_real_kill(data_set, tmp_path):
    def command(workdir):
        options = [f"--config.data.path={data_set}", f"--workdir={workdir}", "--config.steps=200"]
        frequent = ["--config.checkpoint.every=7", "--config.metrics.every=1", "--config.batch_size=4"]
        return [sys.executable, "-m", "train.main", "--config=configs/lm.py:smoke", *options, *frequent]

    subprocess.run(command(tmp_path / "whole"), cwd=ROOT, check=True)
    for least in (20, 90):
        process = subprocess.Popen(command(tmp_path / "broken"), cwd=ROOT)
        metrics = tmp_path / "broken" / "metrics.jsonl"
        while not (metrics.exists() and metrics.read_text().count("\n") > least):
            assert process.poll() is None
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run(command(tmp_path / "broken"), cwd=ROOT, check=True)
    assert weights(tmp_path / "whole" / "target") == weights(tmp_path / "broken" / "target")
    assert lines(tmp_path / "whole") == lines(tmp_path / "broken")


def test_a_finished_run_says_so_and_another_config_is_refused(data_set, monkeypatch, tmp_path):
    monkeypatch.setitem(OBJECTIVES, "least", Least)
    job = functools.partial(least_config, data_set)
    config = job(steps=3)
    assert not provenance.is_finished(tmp_path, resolved(config))
    trainer.train(config, tmp_path)
    assert provenance.is_finished(tmp_path, resolved(config))
    assert provenance.is_finished(tmp_path, resolved(job(steps=3, checkpoint={"every": 9}, mesh={"data": 1})))
    with pytest.raises(UserError, match=r"holds a run with optimizer\.learning_rate = 0\.1, not 0\.5"):
        provenance.is_finished(tmp_path, resolved(job(steps=3, optimizer={"learning_rate": 0.5})))


def test_a_finished_run_is_known_without_its_checkpoints(data_set, monkeypatch, tmp_path):
    monkeypatch.setitem(OBJECTIVES, "least", Least)
    config = least_config(data_set, steps=3)
    trainer.train(config, tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")
    assert provenance.is_finished(tmp_path, resolved(config))
    with pytest.raises(UserError, match=r"holds a run with optimizer\.learning_rate = 0\.1, not 0\.5"):
        provenance.is_finished(tmp_path, resolved(least_config(data_set, steps=3, optimizer={"learning_rate": 0.5})))
    (tmp_path / "run.json").unlink()
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match=r"holds numbers but no run\.json"):
        trainer.train(config, tmp_path)
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(UserError, match=r"run\.json is damaged, or was not written by this project"):
        provenance.is_finished(tmp_path, resolved(config))


def test_two_jobs_in_one_workdir_are_refused(data_set, monkeypatch, tmp_path):
    monkeypatch.setitem(OBJECTIVES, "least", Least)
    with provenance.locked(tmp_path), pytest.raises(UserError) as caught:
        trainer.train(least_config(data_set, steps=3), tmp_path)
    assert str(caught.value).startswith(f"{tmp_path} is in use by another job (process {os.getpid()} on ")
    trainer.train(least_config(data_set, steps=3), tmp_path)  # The lock of a job that is over holds nobody up.
    with pytest.raises(UserError, match="cannot be made: Not a directory"), provenance.locked(tmp_path / "run.json/x"):
        pass


def test_a_run_whose_inputs_were_replaced_is_not_resumed(data_set, monkeypatch, tmp_path, die_at):
    base = tmp_path / "base"
    base.mkdir()
    (base / "weights").write_bytes(b"one")
    monkeypatch.setitem(OBJECTIVES, "least", type("Based", (Least,), {"inputs": {"objective.x": str(base)}}))
    config = least_config(data_set, steps=3, checkpoint={"every": 1})
    with die_at(2):
        trainer.train(config, tmp_path / "run")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    name = "the data set {} ({})".format
    known = [name(data_set, "train"), name(data_set, "valid"), "the tokenizer", f"objective.x ({base})"]
    assert list(record["inputs"]) == known
    (base / "weights").write_bytes(b"two")
    with pytest.raises(UserError, match=rf"holds a run that read another version of objective\.x \({base}\): put back"):
        trainer.train(config, tmp_path / "run")
    (base / "weights").write_bytes(b"one")
    (base / "README.md").write_text("Said later.")
    trainer.train(config, tmp_path / "run")
    after = json.loads((tmp_path / "run" / "run.json").read_text())
    assert after["finished"] and after["id"] == record["id"] and after["inputs"] == record["inputs"]


def test_a_run_that_starts_over_has_another_name(tmp_path):
    names = {provenance.record_start(tmp_path, {}, [], {}) for _ in range(2)}
    assert len(names) == 2
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    names.add(provenance.record_start(tmp_path, {}, [], {}))
    assert len(names) == 2


def test_an_interrupt_promises_only_what_is_there(tmp_path):
    assert provenance.would_do(tmp_path) == "starts over: no checkpoint had been saved yet"
    (tmp_path / "checkpoints" / "40").mkdir(parents=True)
    (tmp_path / "checkpoints" / "damaged-60-1").mkdir()
    assert provenance.would_do(tmp_path) == "continues from checkpoint 40"


def test_a_run_killed_before_its_export_only_exports(data_set, tmp_path, monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "least", Least)
    config = least_config(data_set, steps=3)
    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(trainer, "gathered", lambda params: (_ for _ in ()).throw(InterruptedError))
        trainer.train(config, tmp_path)
    assert not (tmp_path / "numbers").exists()
    written = lines(tmp_path)
    trainer.train(config, tmp_path)
    # Three steps of 0.05, 0.1 and 0.1; a run that had begun again would have written its lines anew.
    np.testing.assert_allclose(np.load(tmp_path / "numbers" / "numbers.npy"), 0.75, rtol=1e-5)
    assert lines(tmp_path) == written


def test_finetuning_starts_from_the_target(job, target_directory, tmp_path):
    config = job("lm", steps=2, objective={"model": None, "init_from": str(target_directory)})
    corpus = open_corpus(config)
    plan = trainer.make_plan(config, corpus.facts)
    base = plan.objective.load_base(plan.mesh)
    state = trainer.init_state(config, plan.objective, plan.optimizer, base)
    np.testing.assert_array_equal(state["params"]["embed"]["embedding"], base["embed"]["embedding"])
    assert plan.frozen is None
    trainer.train(config, tmp_path)
    assert load_target(tmp_path / "target").config == load_target(target_directory).config


def test_frozen_parameters_are_neither_changed_nor_optimized(job, tmp_path):
    config = job("draft_heads")
    corpus = open_corpus(config)
    plan = trainer.make_plan(config, corpus.facts)
    trainable = {path for path in leaves_by_path(plan.state["params"])}
    moments = leaves_by_path(plan.state["optimizer"])
    of_params = {path.split("mu/")[1] for path in moments if "mu/" in path}
    assert of_params == trainable and not any("layers" in path for path in moments)

    frozen = plan.objective.load_base(plan.mesh)
    before = jax.tree.map(np.array, frozen)
    state = trainer.init_state(config, plan.objective, plan.optimizer, frozen)
    batch = trainer.to_devices(plan, next(corpus.batches(config.batch_size, 0)))
    step = jax.jit(trainer.make_step(plan), donate_argnums=0)
    old = state["params"]["heads"][0]["vocab"]["kernel"]
    state, _ = step(state, frozen, batch)
    assert old.is_deleted() and not any(leaf.is_deleted() for leaf in jax.tree.leaves(frozen))
    jax.tree.map(np.testing.assert_array_equal, before, frozen)
    assert leaves_by_path(state["params"]).keys() == trainable


def test_a_drafter_is_exported_for_its_base(job, target_directory, tmp_path):
    trainer.train(job("draft_heads", steps=2), tmp_path)
    drafter, params = load_drafter(tmp_path / "drafter", load_target(target_directory))
    assert drafter.heads.num_heads == 2 and drafter.max_depth == 2
    assert len(params["heads"]) == 2


RUN = """
import pathlib
{config}
from train import trainer
trainer.train(config, pathlib.Path({workdir!r}))
"""

DIE_AT_STEP_5 = """
import pathlib
from unittest import mock
{config}
from train import trainer
from train.metrics import Report
push = Report.push
def push_or_die(self, step, metrics):
    push(self, step, metrics)
    if step == 5:
        raise SystemExit(0)
with mock.patch.object(Report, "push", push_or_die):
    trainer.train(config, pathlib.Path({workdir!r}))
"""

DRY_RUN = """
{config}
import jax
from train import dry_run
before = jax.live_arrays()  # Of what ran in this process until now.
try:
    print(dry_run.describe(config))
except ValueError as error:
    print("error:", error)
print(sum(not any(array is old for old in before) for array in jax.live_arrays()), "arrays")
"""


def test_two_devices_learn_what_one_learns(job, as_code, on_two_devices, tmp_path):
    jobs = {
        "data": ("lm", {"data": 2}),
        "tensor": ("lm", {"data": 1, "tensor": 2}),
        "heads": ("draft_heads", {"data": 2}),
    }
    code = "".join(
        RUN.format(config=as_code(job(name, steps=3, mesh=mesh)), workdir=str(tmp_path / case))
        for case, (name, mesh) in jobs.items()
    )
    on_two_devices(code)
    expected = {}
    for name in ("lm", "draft_heads"):
        trainer.train(job(name, steps=3), tmp_path / name)
        expected[name] = lines(tmp_path / name)
    for case, (name, _) in jobs.items():
        for ours, theirs in zip(expected[name], lines(tmp_path / case), strict=True):
            assert ours.keys() == theirs.keys()
            for key in ours.keys() - {"valid/accuracy"}:  # A near-tie may fall either way.
                assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-6), (case, key)


def test_a_checkpoint_restores_on_another_mesh(job, as_code, on_two_devices, tmp_path):
    whole, broken = job("lm"), job("lm", mesh={"data": 1, "fsdp": 2})
    trainer.train(whole, tmp_path / "whole")
    on_two_devices(DIE_AT_STEP_5.format(config=as_code(broken), workdir=str(tmp_path / "broken")))
    assert not (tmp_path / "broken" / "target").exists()
    trainer.train(whole, tmp_path / "broken")
    ours, theirs = lines(tmp_path / "whole"), lines(tmp_path / "broken")
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    assert ours[-1]["valid/loss"] == pytest.approx(theirs[-1]["valid/loss"], rel=1e-4)


def test_a_batch_that_does_not_divide_is_refused(job, as_code, on_two_devices):
    said = on_two_devices(DRY_RUN.format(config=as_code(job("lm", batch_size=3))))
    assert "error: batch_size (3) must be a multiple of the mesh's data x fsdp size (2)" in said


def test_a_loss_that_is_not_finite_stops_the_run(job, tmp_path):
    config = job("lm", steps=9, checkpoint={"every": 1}, optimizer={"learning_rate": 1e38, "warmup_steps": 0})
    with pytest.raises(UserError) as caught:
        trainer.train(config, tmp_path)
    found = [int(path.name) for path in (tmp_path / "checkpoints").iterdir()]
    assert "at step " in str(caught.value) and "nan" in str(caught.value)
    assert f"the last good checkpoint: checkpoint {max(found)} in {tmp_path / 'checkpoints'}" in str(caught.value)
    assert not (tmp_path / "target").exists()


def test_a_run_that_fails_early_promises_no_checkpoint(data_set, monkeypatch, tmp_path):
    monkeypatch.setitem(OBJECTIVES, "least", Least)
    with pytest.raises(UserError, match=r"^at step 2 the loss is -inf; no checkpoint had been saved yet$"):
        trainer.train(least_config(data_set, optimizer={"learning_rate": 1e38, "warmup_steps": 0}), tmp_path)


def test_a_state_that_is_not_finite_is_no_good_checkpoint(data_set, monkeypatch, tmp_path):
    monkeypatch.setitem(OBJECTIVES, "least", Least)
    spoilt = {"params": {"numbers": jax.device_put(np.full(2, np.inf))}}
    monkeypatch.setattr(trainer, "not_finite", lambda state: not_finite(spoilt if state["step"] == 2 else state))
    with pytest.raises(UserError) as caught:
        trainer.train(least_config(data_set, checkpoint={"every": 1}), tmp_path)
    good = f"the last good checkpoint: checkpoint 1 in {tmp_path / 'checkpoints'}"
    assert str(caught.value) == f"after step 2 params/numbers holds NaN or infinite values; {good}"
    assert saved_steps(tmp_path / "checkpoints") == [1]


def test_dry_run_tells_all_and_allocates_nothing(job, as_code, on_two_devices, tmp_path):
    config = job("draft_heads", mesh={"data": 1, "tensor": 2})
    said = on_two_devices(DRY_RUN.format(config=as_code(config)))
    assert said.strip().endswith("\n0 arrays")
    for words in (
        '"learning_rate": 0.01',
        "heads/1/vocab/kernel",
        "P('fsdp', 'tensor')",
        "frozen: ",
        "optimizer state",
    ):
        assert words in said, words
    plan = trainer.make_plan(job("draft_heads"), open_corpus(config).facts)
    assert f"trainable: {trainer.count(plan.state['params']):,} parameters" in said
    assert f"frozen: {trainer.count(plan.frozen):,} parameters" in said


def test_memory_counts_bytes_per_device(job):
    config = job("lm")
    plan = trainer.make_plan(config, open_corpus(config).facts)
    said = dry_run.describe(config)
    size = 4 * trainer.count(plan.state["params"]) / 2**20
    (line,) = (line for line in said.splitlines() if "trainable parameters  " in line)
    assert float(line.split()[-2]) == pytest.approx(size, abs=0.06)


def test_the_memory_of_the_compiled_step_is_told(data_set, monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "least", Least)
    said = dry_run.describe(least_config(data_set), memory=True)
    (peak,) = (line for line in said.splitlines() if line.startswith("  peak "))
    assert float(peak.split()[1]) < 0.01 and "the step, per device (compiled in " in said
    program = """
%fused_computation (p: f32[9]) -> f32[900,900] {
  ROOT %inside = f32[900,900]{1,0} broadcast(%p)
}
ENTRY %main (x: bf16[8,8]) -> f32[4,8] {
  %x = bf16[8,8]{1,0} parameter(0)
  %a = bf16[8,8]{1,0:T(8,128)} add(%x, %x)
  %b = (f32[2], pred[3]) custom-call(%a)
  ROOT %c.1 = f32[4,8]{1,0} fusion(%a), calls=%fused_computation
  %d = f32[4,8]{1,0} multiply(%c.1, %c.1)
  %e = pred[300]{0} compare(%a, %a)
}"""
    assert dry_run.arrays_of(program) == [(300, "pred[300]", 1), (128, "f32[4,8]", 2), (128, "bf16[8,8]", 1)]


@pytest.mark.parametrize("name", ["vqvae", "var", "code_refiner"])
def test_image_objectives_are_described(name, image_job):
    config = image_job(name)
    plan = trainer.make_plan(config, open_corpus(config).facts)
    said = dry_run.describe(config)
    assert f"{name}: {trainer.count(plan.state['params']):,} trainable parameters" in said
    assert "6 steps of 4 images on 1 cpu device" in said and ("frozen: " in said) == (name != "vqvae")
