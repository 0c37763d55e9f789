"""Metric files, what a person sees, and when a run must stop."""

import contextlib
import importlib.util
import json
import time

import jax.numpy as jnp
import pytest

from models.errors import UserError
from train.config import MetricsConfig
from train.metrics import MetricWriter, NotFinite, Report, Stopwatch, truncate


def test_truncate_keeps_lines_up_to_the_step_and_drops_a_torn_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    whole = [json.dumps({"step": step, "loss": 1.0}) + "\n" for step in (1, 2, 2, 3)]
    path.write_text("".join(whole) + '{"step": 2, "lo')
    truncate(path, 2)
    assert path.read_text() == "".join(whole[:3])
    path.write_bytes("".join(whole).encode() + b'{"loss": 2}\n[3]\n"x"\n\xff\n{"step": "a"}\n\0\0')
    truncate(path, 2)
    assert path.read_text() == "".join(whole[:3])
    truncate(tmp_path / "absent.jsonl", 2)
    assert sorted(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("changes", "module"), [({"tensorboard": True}, "tensorboardX"), ({"wandb": "project"}, "wandb")]
)
def test_an_extra_that_is_not_installed_is_one_sentence(changes, module, tmp_path):
    if importlib.util.find_spec(module):
        pytest.skip(f"{module} is installed")
    with pytest.raises(UserError, match=f"needs the package {module}, which is not installed"):
        MetricWriter(MetricsConfig(**changes), tmp_path, 0, {}, "id")


def test_a_report_fetches_one_step_late_and_writes_every_nth(job, tmp_path, capsys):
    config = job("lm", metrics={"every": 2}, steps=5)
    path = tmp_path / "metrics.jsonl"
    with Report(config, tmp_path, 0) as report:
        for step in range(1, 6):
            report.push(step, {"loss": jnp.float32(step), "gradient_norm": jnp.float32(0)})
            written = [json.loads(line)["step"] for line in path.read_text().splitlines()]
            assert written == [line for line in (2, 4) if line < step]
        report.flush()
        report.evaluation(5, {"loss_1": 2.0, "loss_2": 3.0, "accuracy_1": 0.25})
    last = json.loads(path.read_text().splitlines()[-1])
    assert last == {"step": 5, "valid/loss_1": 2.0, "valid/loss_2": 3.0, "valid/accuracy_1": 0.25}
    said = capsys.readouterr().out
    assert "step 2/5  loss 2.0000" in said and "valid: loss 2 3  accuracy 0.25" in said


@pytest.mark.parametrize("bad", [{"loss": float("nan")}, {"gradient_norm": float("inf")}])
def test_a_number_that_is_not_finite_stops(bad, job, tmp_path):
    with Report(job("lm"), tmp_path, 0, show=False) as report:
        report.push(1, {"loss": jnp.float32(1), "gradient_norm": jnp.float32(1)})
        report.push(2, {"loss": jnp.float32(1), "gradient_norm": jnp.float32(1), **bad})
        with pytest.raises(NotFinite, match=r"at step 2 the (loss|gradient norm) is (nan|inf)"):
            report.push(3, {"loss": jnp.float32(1), "gradient_norm": jnp.float32(1)})
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_stopwatch_counts_waiting_for_data_and_leaves_evaluation_out(monkeypatch):
    now = [10.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    watch = Stopwatch()
    for bucket, seconds in (("evaluation", 5.0), ("data", 0.5), ("checkpoint", 7.0), ("data", 0.25), (None, 2.25)):
        with watch.timed(bucket) if bucket else contextlib.nullcontext():
            now[0] += seconds
    assert watch.window(steps=2, size=100, unit="tokens") == pytest.approx(
        {"step_seconds": 1.5, "tokens_per_second": 2 * 100 / 3.0, "data_share": 0.75 / 3.0}
    )
    now[0] += 1.0  # The next window begins where the last ended, with nothing waited for.
    assert watch.window(steps=1, size=6, unit="images") == pytest.approx(
        {"step_seconds": 1.0, "images_per_second": 6.0, "data_share": 0.0}
    )
