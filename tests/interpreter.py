"""A Python process with a number of CPU devices of its own, which runs pieces of code one after another.

The number of devices cannot change once the backend runs, so tests that want several need another process. Starting one
takes seconds and leaves it without compiled programs, so the checks of a file share one; each still has its own output,
its own verdict, and, when the process dies, its own name on it.

Started as `python -m tests.interpreter FD`, this module is the process: it reads pieces of code from standard input, a
JSON string a line, and answers each on FD with one line, its traceback or null and what `tests.tally` counted.
"""

import contextlib
import json
import os
import pathlib
import select
import subprocess
import sys
import tempfile
import traceback
from typing import Self

from tests import tally

ROOT = pathlib.Path(__file__).resolve().parents[1]


class Interpreter:
    """The process as its parent sees it: `with Interpreter(devices=8) as python: python.run("print(1)")`."""

    def __init__(self, devices: int) -> None:
        environment = {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices)}
        self._outputs = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115  (they live as long as the process)
        self._answers, theirs = os.pipe()
        command = [sys.executable, "-m", "tests.interpreter", str(theirs)]
        stdout, stderr = self._outputs
        pipes = {"stdin": subprocess.PIPE, "stdout": stdout, "stderr": stderr, "pass_fds": [theirs]}
        self.ended = False  # By a piece of code, whose caller knows.
        self._process = subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes)
        os.close(theirs)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        status = self._process.wait()
        os.close(self._answers)
        assert self.ended or status == 0, f"after its last piece of code the process ended with exit status {status}"

    def run(self, code: str, timeout: float = 300) -> str:
        """What `code` prints, run in a namespace of its own and until it exits; raises AssertionError with all that
        is known where it raises, takes longer than `timeout` seconds or ends the process."""
        __tracebackhide__ = True
        starts = [os.fstat(output.fileno()).st_size for output in self._outputs]
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(code) + "\n")
            self._process.stdin.flush()
        in_time = select.select([self._answers], [], [], timeout)[0]
        if not in_time:
            self._process.kill()
        answer = b""
        # Ends with a line, or where the process does.
        while not answer.endswith(b"\n") and (more := os.read(self._answers, 65536)):
            answer += more
        said = []
        for output, start in zip(self._outputs, starts, strict=True):
            # At a place, because the process writes where this handle's own offset is.
            size = os.fstat(output.fileno()).st_size - start
            said.append(os.pread(output.fileno(), size, start).decode(errors="replace"))
        if not answer:
            self.ended = True
            end = f"the process ended with exit status {self._process.wait()}" if in_time else f"took over {timeout} s"
            raise AssertionError("\n".join([end, *said]))
        error, programs = json.loads(answer)
        tally.PROGRAMS.add(*programs)
        assert error is None, "\n".join([*said, error])
        return said[0]


def serve(answers: int) -> None:
    """The process itself: runs what comes on standard input until that ends."""
    os.set_inheritable(answers, False)
    lines = os.fdopen(os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for line in lines:
        error = None
        try:
            exec(compile(json.loads(line), "<code of a test>", "exec"), {"__name__": "__main__"})
        except BaseException as raised:
            if not isinstance(raised, SystemExit) or raised.code not in (None, 0):
                error = traceback.format_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os.write(answers, (json.dumps([error, tally.PROGRAMS.take()]) + "\n").encode())


if __name__ == "__main__":
    serve(int(sys.argv[1]))
