"""What is replayed is what the loop writes while it replays, also where accepting rounds otherwise."""

import dataclasses
import threading
import types

import numpy as np
import pytest

from eval.measure import replay as replay_module
from eval.measure.replay import Replay


@dataclasses.dataclass(frozen=True)
class Told:
    """In the place of the models."""

    drafter_params: np.ndarray


class Parting(Replay):
    """Writes what it is told for `steady` tokens more than the time before, and then something else."""

    def __init__(self, steady: int, size: int, after: Replay | None = None):
        self._steady, self._rng, self.runs = steady, np.random.default_rng(0), 0
        self._params_of, self._rate, self.settled = lambda text, rate: np.asarray(text), 0.8, False
        self._after, self._preparing, self.text = after, threading.Lock(), None
        self._models, self._state = Told(np.zeros(size, int)), None

    def _run(self) -> float:
        told, self.runs = self._models.drafter_params, self.runs + 1
        written = told.copy()
        rest = written[self._steady * self.runs :]
        rest[:] = self._rng.integers(1, 1000, rest.shape)
        self._state = types.SimpleNamespace(text=types.SimpleNamespace(tokens=written[None]))
        return 1.0


def test_the_loop_is_told_its_own_text_until_it_writes_it_again() -> None:
    replay = Parting(steady=7, size=40)
    replay.prepare()
    assert replay.settled and replay.runs == 6, "five parted, and the sixth did not"
    replay.prepare()
    assert replay.runs == 6, "nothing is left to prepare"
    assert replay.sample() == 1.0 and replay.runs == 7 and replay.settled


def test_the_text_of_another_loop_is_told_first() -> None:
    first = Parting(steady=40, size=40)
    replay = Parting(steady=40, size=40, after=first)
    replay.prepare()
    assert first.settled and first.runs == 2 and replay.settled and replay.runs == 1
    np.testing.assert_array_equal(replay.text, first.text)


def test_a_text_that_parts_to_the_end_is_not_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay_module, "TRIES", 3)
    replay = Parting(steady=7, size=40)
    replay.prepare()
    assert not replay.settled and replay.runs == 4
    replay.sample()
    assert not replay.settled
