"""A tiny data set, a tiny target and tiny jobs, shared by the tests of training."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import pytest

from scripts import build_dataset
from train import trainer
from train.config import TrainConfig, parse
from train.objectives import OBJECTIVES

SHAPE = {"width": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "mlp_width": 32}


@pytest.fixture(scope="session")
def data_set(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Source files with much repetition, so that little training shows."""
    folder = tmp_path_factory.mktemp("source")
    for number in range(12):
        lines = [f"def function_{number}_{k}(x, y):\n    return x + {k} * y\n\n" for k in range(20)]
        (folder / f"file_{number}.py").write_text("".join(lines))
    out = folder / "out"
    arguments = ["--kind", "source", "--src", str(folder), "--glob", "*.py", "--train_tokenizer", "280"]
    build_dataset.main([*arguments, "--valid_documents", "2", "--out", str(out)])
    return out


def tiny_job(data_set: pathlib.Path, objective: dict[str, Any], **changes: Any) -> TrainConfig:
    """A config of a few short steps, sections updated by `changes`."""
    raw: dict[str, Any] = {
        "objective": objective,
        "data": {"path": str(data_set)},
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 1},
        "evaluation": {"every": 100, "batches": 2},
        "checkpoint": {"every": 2},
        "metrics": {"every": 1},
        "steps": 6,
        "batch_size": 4,
        "length": 32,
    }
    for key, value in changes.items():
        raw[key] = {**raw.get(key, {}), **value} if isinstance(value, dict) else value
    return parse(raw, OBJECTIVES)


@pytest.fixture(scope="session")
def target_directory(data_set: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A target that has learnt the data's most frequent turns, so that its greedy choices can be guessed."""
    workdir = tmp_path_factory.mktemp("target")
    trainer.train(tiny_job(data_set, {"name": "lm", "model": SHAPE}, steps=60, checkpoint={"every": 60}), workdir)
    return workdir / "target"


@pytest.fixture
def job(data_set: pathlib.Path, target_directory: pathlib.Path) -> Callable[..., TrainConfig]:
    """`job("lm", steps=3, objective={...})`: a tiny config, sections updated by the arguments."""
    objectives: dict[str, dict[str, Any]] = {
        "lm": {"name": "lm", "model": SHAPE},
        "draft_heads": {
            "name": "draft_heads",
            "target": str(target_directory),
            "drafter": "hydra",
            "heads": {"num_heads": 2},
            "loop_prompts": 0,
        },
        "eagle": {"name": "eagle", "target": str(target_directory), "depth": 3, "loop_prompts": 0},
        "eagle3": {"name": "eagle3", "target": str(target_directory), "steps": 3, "loop_prompts": 0},
    }

    def make(name: str, objective: dict[str, Any] | None = None, **changes: Any) -> TrainConfig:
        return tiny_job(data_set, {**objectives[name], **(objective or {})}, **changes)

    return make


@pytest.fixture
def as_code() -> Callable[[TrainConfig], str]:
    """A config as Python source, for tests that run in their own process."""

    def write(config: TrainConfig) -> str:
        imports = "from train.config import parse\nfrom train.objectives import OBJECTIVES\n"
        return f"{imports}config = parse({dataclasses.asdict(config)!r}, OBJECTIVES)\n"

    return write


@pytest.fixture
def on_two_devices(run_python: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Runs code in a process with two CPU devices, and threads enough for collectives to wait for each other.

    XLA's CPU client runs independent collectives of a program in any order, each blocking a thread until the other
    device arrives; with one thread per core, two of them can wait for ever.
    """
    monkeypatch.setenv("NPROC", "16")
    return lambda code: run_python(code, devices=2)
