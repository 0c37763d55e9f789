"""Whose turn it is on a device: processes make ready side by side, and time one at a time.

An accelerator's programs take minutes to compile and moments to time. Where `TANDEM_TURNS` names a file, processes that
time hold a shared lock of it from `join` on, and the only one while they time (`alone`): that begins when nobody is
making ready any more, and nobody goes on until it is over. A process that ends, however, gives its lock back.
Without the variable nothing waits.
"""

import contextlib
import fcntl
import functools
import os
from collections.abc import Iterator
from typing import IO

VARIABLE = "TANDEM_TURNS"


@functools.cache
def join() -> IO[str] | None:
    """Takes part, first of all waiting until nobody times."""
    if not (path := os.environ.get(VARIABLE)):
        return None
    file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - the lock lasts as long as the process.
    fcntl.flock(file, fcntl.LOCK_SH)
    return file


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Nobody else uses the device within."""
    if (file := join()) is None:
        yield
        return
    fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_SH)
