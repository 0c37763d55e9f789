"""Who times waits until nobody makes ready, nobody makes ready meanwhile, and who is ready is not overtaken."""

import fcntl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from eval.measure import turns
from eval.measure.timing import measure
from models.errors import UserError
from tests.conftest import ROOT

# Makes ready for some seconds, and then times for some; says when.
PROCESS = """
import sys, time
from eval.measure import turns
from eval.measure.timing import measure
ready, timed = map(float, sys.argv[1:])
class Part:
    def prepare(self):
        print("prepares", time.monotonic())
        time.sleep(ready)
        print("ready", time.monotonic(), flush=True)
    def sample(self):
        print("samples", time.monotonic())
        time.sleep(timed)
        print("sampled", time.monotonic(), flush=True)
        return timed
turns.join()
measure({"part": Part()}, 1)
"""


@pytest.fixture
def line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file by which processes wait for each other."""
    monkeypatch.setenv(turns.VARIABLE, str(tmp_path / "turns"))
    turns.join.cache_clear()
    yield tmp_path / "turns"
    turns.join.cache_clear()


def times(process: subprocess.Popen) -> dict[str, list[float]]:
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    found: dict[str, list[float]] = {}
    for text in said.splitlines():
        found.setdefault(text.split()[0], []).append(float(text.split()[1]))
    return found


def test_they_make_ready_side_by_side_and_time_one_at_a_time_in_order(line: Path) -> None:
    def begin(ready: float) -> subprocess.Popen:
        command = [sys.executable, "-c", PROCESS, str(ready), "0.15"]
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)

    # Held until all have been imported.
    with line.open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        running = [begin(ready) for ready in (0.2, 1.0)]
        time.sleep(4.0)
    quick, slow = map(times, running)
    assert quick["prepares"][0] < slow["ready"][0] and slow["prepares"][0] < quick["ready"][0], "side by side"
    assert quick["samples"][0] >= slow["ready"][0], "nobody times while another makes ready"
    assert len(quick["samples"]) == 2 and quick["sampled"][-1] <= slow["samples"][0], "first ready, first timed"


def test_within_nobody_else_may_begin_and_afterwards_all_may(line: Path) -> None:
    def may_join() -> bool:
        try:
            with line.open("a") as other:
                fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    class Part:
        def sample(self) -> float:
            seen.append(may_join())
            return 1.0

    seen: list[bool] = []
    turns.join()
    measure({"a part": Part()}, 2)
    assert seen == [True, False, False, False], "one to make ready, one that does not count, two that do"
    assert may_join()


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


def test_a_file_that_cannot_be_written_is_one_sentence(line: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(turns.VARIABLE, str(line / "nowhere"))
    with pytest.raises(UserError, match=r"cannot write .*/nowhere, which TANDEM_TURNS names: No such file"):
        turns.join()
