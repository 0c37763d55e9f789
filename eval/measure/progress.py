"""What a long measurement is doing: one changing line on a terminal, elsewhere a line now and then.

Of several processes the first one tells.
"""

import sys
import time
from typing import TextIO

from models import processes

QUIET_SECONDS = 5.0  # Between lines where there is no terminal.


class Progress:
    """Call it with what is being done; leave its `with` block to clear the line."""

    def __init__(self, stream: TextIO | None = None):
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._started = time.monotonic()
        self._told = float("-inf")
        self._silent = not processes.is_first()

    def __call__(self, line: str) -> None:
        if self._silent:
            return
        now = time.monotonic()
        line = f"[{now - self._started:4.0f} s] {line}"
        if self._terminal:
            print(f"\r\x1b[K{line[:100]}", end="", file=self._stream, flush=True)
        elif now - self._told >= QUIET_SECONDS:
            self._told = now
            print(line, file=self._stream, flush=True)

    def note(self, line: str) -> None:
        """Prints a line that stays."""
        if self._silent:
            return
        start = "\r\x1b[K" if self._terminal else ""
        print(f"{start}note: {line}", file=self._stream, flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._terminal:
            print("\r\x1b[K", end="", file=self._stream, flush=True)
