"""Who times waits until nobody makes ready, and nobody makes ready meanwhile."""

import fcntl
import threading
from pathlib import Path

import pytest

from eval.measure import turns
from eval.measure.timing import measure


@pytest.fixture
def line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file by which processes wait for each other."""
    monkeypatch.setenv(turns.VARIABLE, str(tmp_path / "turns"))
    turns.join.cache_clear()
    yield tmp_path / "turns"
    turns.join.cache_clear()


def test_what_is_timed_is_alone(line: Path) -> None:
    sampled = threading.Event()

    class Sampled:
        def sample(self) -> float:
            sampled.set() if ready.is_set() else ready.set()
            with line.open("a") as late, pytest.raises(BlockingIOError):
                fcntl.flock(late, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if sampled.is_set():
                with line.open("a") as late, pytest.raises(BlockingIOError):
                    fcntl.flock(late, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return 1.0

    ready = threading.Event()
    turns.join()
    with line.open("a") as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        thread = threading.Thread(target=measure, args=({"a part": Sampled()}, 1))
        thread.start()
        assert ready.wait(10) and not sampled.wait(0.2), "the other one makes ready"
    assert sampled.wait(10)
    thread.join()
    with line.open("a") as other:
        fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)


def test_nobody_waits_for_nothing(line: Path) -> None:
    turns.join()
    with line.open("a") as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        assert measure({}, 1) == {}


def test_without_others_nothing_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(turns.VARIABLE, raising=False)
    turns.join.cache_clear()
    assert turns.join() is None
    with turns.alone():
        pass
