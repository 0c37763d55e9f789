"""Two processes on one machine train, export and evaluate what one process does."""

import concurrent.futures
import dataclasses
import json
import pathlib
import socket
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from eval import main
from models import load_target
from tests.interpreter import Interpreter
from tests.train.conftest import SHAPE, tiny_job
from train import trainer
from train.config import TrainConfig

EVALUATION = {"drafters": "none", "num_prompts": 3, "prompt_tokens": 8, "max_new_tokens": 6, "repeats": 1, "samples": 1}
EVALUATION |= {"split": "train", "length": 16, "rows": 4}
# What hangs on no clock and on no sum's order.
COUNTS = ("new_tokens", "steps", "accepted_histogram", "distinct_token_share", "identical_to_baseline")

CODE = """
import pathlib
import jax
from eval import main
from models import processes, sharding
from models.errors import UserError
from train import trainer
processes.start("{address},2,{index}")
try:
    sharding.with_whole_rows(sharding.make_mesh(data=1, tensor=2))
    raise AssertionError("a row was split over the two")
except UserError as error:
    assert "spreads a row of the batch over 2 processes" in str(error)
{config}
workdir = pathlib.Path({workdir!r})
trainer.train(config, workdir)
main.run(main.DecodeConfig(target=str(workdir / "target"), out=str(workdir / "eval"), **{evaluation!r}))
print("only the first is heard")
def refuse():
    raise UserError("the first one's")
try:
    processes.on_first(refuse)
    raise AssertionError("no complaint")
except UserError as error:
    assert str(error) == "the first one's"
jax.distributed.shutdown()
"""


@pytest.mark.parametrize("mesh", [{}, pytest.param({"data": 1, "fsdp": 2}, marks=pytest.mark.slow)], ids=str)
def test_two_processes_do_what_one_does(
    as_code: Callable[[TrainConfig], str],
    data_set: pathlib.Path,
    tmp_path: pathlib.Path,
    mesh: dict[str, int],
) -> None:
    """With the rows of a batch shared out, or with the parameters too."""
    model = {**SHAPE, "num_layers": 1}
    config = tiny_job(data_set, {"name": "lm", "model": model}, steps=3, checkpoint={"every": 3})
    shared = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, **mesh))
    evaluation: dict[str, Any] = {**EVALUATION, "data": str(data_set)}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    told = {"address": address, "config": as_code(shared), "workdir": str(tmp_path / "two"), "evaluation": evaluation}
    with (
        Interpreter(1) as first,
        Interpreter(1) as second,
        concurrent.futures.ThreadPoolExecutor() as pool,
    ):
        both = [pool.submit(python.run, CODE.format(index=i, **told)) for i, python in enumerate((first, second))]
        trainer.train(config, tmp_path / "one")
        said = [process.result() for process in both]
    assert "finished 3 steps" in said[0] and "only the first is heard" in said[0]
    assert all("Gloo" in line for line in said[1].splitlines())
    record = json.loads((tmp_path / "two" / "run.json").read_text())
    assert record["finished"] and record["processes"] == 2
    for ours, theirs in zip(*(metrics(tmp_path / name) for name in ("two", "one")), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    products = [load_target(tmp_path / name / "target").params for name in ("two", "one")]
    jax.tree.map(lambda *pair: np.testing.assert_allclose(*pair, atol=1e-4), *products)

    two = json.loads((tmp_path / "two" / "eval" / "results.json").read_text())
    target = str(tmp_path / "two" / "target")
    one = main.run(main.DecodeConfig(target=target, out=str(tmp_path / "one" / "eval"), **evaluation))
    assert two["environment"]["processes"] == 2 and two["samples"] == json.loads(json.dumps(one["samples"]))
    assert two["target"]["perplexity"] == pytest.approx(one["target"]["perplexity"], rel=1e-6)
    for ours, theirs in zip(two["runs"], one["runs"], strict=True):
        assert {name: ours[name] for name in COUNTS} == {name: theirs[name] for name in COUNTS}


def metrics(workdir: pathlib.Path) -> list[dict[str, float]]:
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [
        {name: line[name] for name in line if not name.endswith(("_seconds", "_second", "_share"))} for line in lines
    ]
