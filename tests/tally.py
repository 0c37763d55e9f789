"""A pytest plugin: what each test file costs, printed at the end as its ten slowest files.

A *program* is one executable that JAX makes for a jitted function and its shapes, small ones included (a lone
`jnp.ones` is one). It is compiled, or read from the persistent cache of compiled programs. Counted are those of the
test processes and of the processes that the fixtures of `tests/conftest.py` start; those of commands that tests start
by themselves, and those of importing the test files, are not.

Each report of a phase of a test carries what was made during it, so that under xdist the numbers reach the process
that prints. Seconds are of all phases, fixtures included: a fixture of the session counts for the first file that asks.
"""

import collections
import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest

SLOWEST = 10
# Every program, whether compiled or read; the second event comes during the first.
MADE = "/jax/core/compile/backend_compile_duration"
READ = "/jax/compilation_cache/cache_hits"


@dataclasses.dataclass
class Programs:
    """Programs made, those of them read from the cache, and the seconds that took."""

    made: int = 0
    read: int = 0
    seconds: float = 0.0

    def add(self, made: int, read: int, seconds: float) -> None:
        """Counts some more."""
        self.made, self.read, self.seconds = self.made + made, self.read + read, self.seconds + seconds

    def take(self) -> list[Any]:
        """[made, read, seconds] since the last call, as reports carry it."""
        taken = [self.made, self.read, self.seconds]
        self.made, self.read, self.seconds = 0, 0, 0.0
        return taken


def listen() -> Programs:
    """What this process makes from now on. Imports JAX, whose environment must be set."""
    import jax.monitoring

    programs = Programs()
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: programs.add(1, 0, seconds) if event == MADE else None
    )
    jax.monitoring.register_event_listener(lambda event, **_: programs.add(0, 1, 0.0) if event == READ else None)
    return programs


@dataclasses.dataclass
class File:
    """What one file has cost so far."""

    tests: int = 0
    seconds: float = 0.0
    programs: Programs = dataclasses.field(default_factory=Programs)


PROGRAMS = listen()


class Tally:
    """Sums up the reports of a run and prints them at its end."""

    def __init__(self) -> None:
        self.files: dict[str, File] = collections.defaultdict(File)

    @pytest.hookimpl
    def pytest_runtest_logstart(self) -> None:
        """What importing files made belongs to no test."""
        PROGRAMS.take()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Iterator[None]:
        """Gives every report what was made during its phase."""
        report = yield
        report.programs = PROGRAMS.take()
        return report

    @pytest.hookimpl
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Adds a report to its file's sums. One that xdist writes for a worker that died carries nothing."""
        file = self.files[report.nodeid.split("::")[0]]
        file.tests += report.when == "call"
        file.seconds += report.duration
        file.programs.add(*getattr(report, "programs", (0, 0, 0.0)))

    @pytest.hookimpl
    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Prints the table."""
        if not any(file.tests for file in self.files.values()):
            return
        slowest = sorted(self.files, key=lambda name: -self.files[name].seconds)[:SLOWEST]
        total = File()
        for file in self.files.values():
            total.tests, total.seconds = total.tests + file.tests, total.seconds + file.seconds
            total.programs.add(*dataclasses.astuple(file.programs))
        width = max(map(len, [*slowest, "all 000 files"]))
        terminalreporter.section("slowest files")
        terminalreporter.line(f"{'':{width}} seconds  tests  programs compiled  programs read  seconds for both")
        for name, file in [*((name, self.files[name]) for name in slowest), (f"all {len(self.files)} files", total)]:
            made, read, seconds = dataclasses.astuple(file.programs)
            terminalreporter.line(
                f"{name:{width}} {file.seconds:7.1f} {file.tests:6d} {made - read:18d} {read:14d} {seconds:17.1f}"
            )
