"""What steps cost: read between what was measured, measured once, and kept under all that it hangs on."""

import dataclasses
import itertools
import pathlib

import jax
import numpy as np
import pytest

from decoding import costs
from decoding.costs import Costs
from decoding.drafters.oracle import Oracle
from decoding.drafters.token_recycling import TokenRecycling
from models.formats.target import Target
from tests.decoding.drafter_cases import random_target

STEEP = Costs(((1, 1.0), (4, 2.5), (16, 8.0)))


def test_costs_between_and_beyond_what_was_measured() -> None:
    assert [STEEP.step(rows) for rows in (1, 2, 4, 10, 16, 28)] == pytest.approx([1, 1.5, 2.5, 5.25, 8, 13.5])
    network = dataclasses.replace(STEEP, extra=((2, 0.5), (4, 0.7)))
    assert [network.step(rows) for rows in (1, 2, 3, 5)] == pytest.approx([1, 2, 2.6, 2.5 + 5.5 / 12 + 0.8])
    assert network.ratio(2) == pytest.approx(2.0) and Costs(((1, 2.0), (4, 5.0))).ratio(4) == 2.5
    assert Costs(((1, 1.0),)).step(9) == 1.0
    assert Costs(((1, 1.0), (4, 0.9))).step(10) == 0.9, "noise makes no rows cheaper than free"


def timed(seconds: float, odd: float) -> costs.Run:
    """A run of so many seconds by the clock, but every third time `odd` times as many; of processors always twice."""
    samples = itertools.cycle([1.0, odd, 1.0])
    return lambda: (seconds * next(samples), 2 * seconds)


@pytest.mark.parametrize(("odd", "steady"), [(1.2, True), (50.0, True), (0.1, False)])
def test_what_steps_add_is_told_apart_from_forwards_and_from_plain_steps(
    odd: float, steady: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the clock, unless most samples are far from the least: then by the time of processors, here twice as much."""
    clock = {1: 1.0, 5: 1.4, 8: 1.3, 16: 2.0, 64: 9.0}
    # A plain step is 0.1 longer than its forward, one of 3 rows 0.3 and one of 9 rows 0.5.
    steps = {0: 1.1, 3: 1.15 + 0.3, 9: 1.3 + 0.7 / 8 + 0.5}

    def step_run(target, drafter, params, batch):
        return timed(steps[costs.rows_of(drafter) if drafter.max_depth else 0], odd)

    monkeypatch.setattr(costs, "_forward_run", lambda target, batch, rows: timed(clock[rows], odd))
    monkeypatch.setattr(costs, "_step_run", step_run)
    target = random_target(vocab_size=12, dtype=np.float32)
    found = costs._measure(target, Oracle(8).opened(((2, 1.7), (8, 2.1))), None, 1)
    unit = 1.0 if steady else 2.0
    rows, seconds = zip(*found.forward, strict=True)
    # Five rows cost no more than eight; sixteen are more than the nine that are asked for, and sixty-four not tried.
    assert rows == (1, 5, 8, 16) and seconds == pytest.approx([unit * x for x in (1.0, 1.3, 1.3, 2.0)])
    rows, seconds = zip(*found.extra, strict=True)
    assert rows == (3, 9) and seconds == pytest.approx([unit * 0.2, unit * 0.4])
    assert found.steady == steady


def test_costs_are_measured_once_and_kept(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(costs, "_costs", {})
    monkeypatch.setattr(costs, "UNSTEADY", 1e9)
    target: Target = random_target(vocab_size=12, dtype=np.float32)
    free = TokenRecycling().opened(((2, 1.5),))
    found = costs.measured(target, free, None, 1)
    assert [rows for rows, _ in found.forward] == [1, 5] and [rows for rows, _ in found.extra] == [3]
    assert min(seconds for _, seconds in found.forward) > 0 and found.extra[0][1] >= 0
    (path,) = (tmp_path / "tandem" / "costs").iterdir()

    monkeypatch.setattr(costs, "_measure", lambda *_: STEEP)
    assert costs.measured(target, free, None, 1) == found
    costs._costs.clear()
    assert costs.measured(target, free, None, 1) == found, "from the file"
    assert costs.measured(target, free, None, 2) == STEEP, "another batch"
    other = dataclasses.replace(target, params=jax.tree.map(lambda x: x + 1, target.params))
    assert costs.measured(other, free, None, 1) == STEEP, "other weights"
    costs._costs.clear()
    path.write_text("{")
    monkeypatch.setattr(costs, "_measure", lambda *_: dataclasses.replace(STEEP, steady=False))
    assert not costs.measured(target, free, None, 1).steady, "a damaged file"
    assert path.read_text() == "{", "what was measured beside other work is not kept"

    def homeless() -> pathlib.Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(costs.Path, "home", homeless)
    costs._costs.clear()
    monkeypatch.setattr(costs, "_measure", lambda *_: STEEP)
    assert costs.measured(target, free, None, 1) == STEEP, "kept by the process alone"
