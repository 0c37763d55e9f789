"""What steps cost: read between what was measured, measured once, and kept under all that it hangs on."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest

from decoding import costs
from decoding.costs import Costs
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
