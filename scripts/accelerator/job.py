"""Parts of a job side by side or in turn, each a process with a log and a limit; what becomes of them is written as it
comes.

The process that watches never touches the device; parts share it, so that one compiles while others compute, without
reserving its memory. Those that time wait for each other (`eval/measure/turns.py`).
"""

import dataclasses
import importlib.util
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from eval.measure import turns
from eval.report.files import write_json

# Of programs that run once, compilation takes longer than what tuning and generated matrix products would save.
QUICK = "--xla_gpu_enable_triton_gemm=false --xla_gpu_autotune_level=0"


@dataclasses.dataclass
class Part:
    """One process.

    Attributes:
      name: of its log and of its entry in `parts.json`.
      command: module and arguments.
      needs: a path without which it is skipped.
      done: asked now and then; true ends the process early, as a success.
      quick: compiled with little tuning; not for what is timed.
      packages: modules that are not ours, without which it is skipped.
      seconds: its own limit, waiting for others included.
    """

    name: str
    command: list[str]
    needs: Path | None = None
    done: Callable[[], bool] = lambda: False
    quick: bool = True
    packages: tuple[str, ...] = ()
    seconds: float = math.inf

    @property
    def lacks(self) -> str | None:
        """What it would need and does not find."""
        if self.needs is not None and not self.needs.exists():
            return f"there is no {self.needs}"
        missing = [name for name in self.packages if importlib.util.find_spec(name) is None]
        return f"not installed: {', '.join(missing)}; give a folder with their --wheels" if missing else None


class Job:
    """The parts so far, and the time that is left."""

    def __init__(self, out: Path, minutes: float, cache: Path, ended: Callable[[], None] = lambda: None):
        """Of `minutes`, with results in `out` and compiled programs in `cache`; `ended` is called behind every part."""
        self.out, self._end, self._ended = out, time.monotonic() + 60 * minutes, ended
        self.parts: dict[str, Any] = {}
        self._environment = {
            **os.environ,
            "JAX_COMPILATION_CACHE_DIR": str(cache.absolute()),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "PYTHONUNBUFFERED": "1",
            turns.VARIABLE: str((out / ".turns").absolute()),
        }
        self._began = time.monotonic()

    @property
    def left(self) -> float:
        """Seconds."""
        return self._end - time.monotonic()

    def run(self, parts: Sequence[Part], seconds: float, at_once: int | None = None) -> None:
        """Runs parts side by side, no more than so many, until all are done or the time is over."""
        end, waiting = time.monotonic() + min(seconds, self.left), list(parts)
        running: list[tuple[Part, subprocess.Popen, float]] = []
        at_once = at_once or len(parts)
        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    part = waiting.pop(0)
                    if (lacks := part.lacks) is not None or time.monotonic() >= end:
                        self._note(part.name, "skipped", 0.0, lacks or "no time was left for it")
                    else:
                        running.append((part, self._start(part, min(at_once, len(parts))), time.monotonic()))
                time.sleep(0.2)
                self._watch(running, end)
        finally:  # Whoever ends this process ends them too.
            for _, process, _ in running:
                self._stop(process)

    def _start(self, part: Part, together: int) -> subprocess.Popen:
        with (self.out / f"{part.name}.log").open("w", encoding="utf-8") as log:
            log.write("python -m " + " ".join(part.command) + "\n")
            log.flush()
            return subprocess.Popen(
                [sys.executable, "-m", *part.command],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment | self._of(part, together),
                start_new_session=True,
            )

    def _of(self, part: Part, together: int) -> dict[str, str]:
        """Of its environment what is not everybody's."""
        own = {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {QUICK}"} if part.quick else {}
        if together == 1 and not {"XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"} & {*os.environ}:
            # Three quarters of the memory, JAX's most, are too little for the largest.
            own["XLA_CLIENT_MEM_FRACTION"] = ".95"
        return own

    def _watch(self, running: list[tuple[Part, subprocess.Popen, float]], end: float) -> None:
        """Takes out those that have ended by themselves, by a limit or by their wish."""
        for entry in list(running):
            part, process, began = entry
            took = time.monotonic() - began
            if process.poll() is not None:
                state = "ok" if process.returncode == 0 else f"failed ({process.returncode})"
            elif part.done():
                state = "ok, ended early"
            elif time.monotonic() > end or took > part.seconds:
                state = "out of time"
            else:
                continue
            self._stop(process)
            self._note(part.name, state, took, _last_line(self.out / f"{part.name}.log"))
            running.remove(entry)

    def _stop(self, process: subprocess.Popen) -> None:
        for how in (signal.SIGTERM, signal.SIGKILL):
            if process.poll() is None:
                os.killpg(process.pid, how)
                try:
                    process.wait(5)
                except subprocess.TimeoutExpired:
                    continue

    def _note(self, name: str, state: str, seconds: float, last: str) -> None:
        at = time.monotonic() - self._began
        self.parts[name] = {"state": state, "seconds": round(seconds, 1), "ended_at": round(at, 1), "last_line": last}
        write_json(self.parts, self.out / "parts.json")
        print(f"[{at:5.0f} s] {name}: {state} after {seconds:.0f} s: {last[:200]}", flush=True)
        self._ended()


def _last_line(path: Path) -> str:
    lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else ""


def end_when_told() -> None:
    """Makes of SIGTERM an exit like any other, by which a job ends its parts."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
