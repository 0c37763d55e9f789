"""Whose turn it is on a device: processes make ready side by side, and time one at a time.

An accelerator's programs take minutes to compile and moments to time. Where `TANDEM_TURNS` names a file, a process
that times holds a shared lock of it from `join` on, while it makes ready, and the only one while it times (`alone`):
that begins when nobody is making ready any more, and nobody goes on until it is over. A second lock is the gate by
which all come in, so that who is ready is not overtaken by those who begin. A process that ends, in whatever way, gives
its locks back. Without the variable nothing waits; neither do processes of one job that talk to each other, of which
one would wait for what another holds.
"""

import contextlib
import fcntl
import functools
import os
from collections.abc import Iterator
from typing import IO, NamedTuple

from models import processes
from models.errors import UserError

VARIABLE = "TANDEM_TURNS"


class _Locks(NamedTuple):
    """Open files."""

    turn: IO[str]
    gate: IO[str]

    def enter(self, kind: int) -> None:
        """Through the gate, which is shut behind everybody who waits for the turn."""
        fcntl.flock(self.turn, fcntl.LOCK_UN)
        fcntl.flock(self.gate, fcntl.LOCK_EX)
        fcntl.flock(self.turn, kind)
        fcntl.flock(self.gate, fcntl.LOCK_UN)


@functools.cache
def join() -> _Locks | None:
    """Takes part, first of all waiting until nobody times.

    Raises:
      UserError: the file of `TANDEM_TURNS` cannot be written.
    """
    path = os.environ.get(VARIABLE)
    if not path or processes.count() > 1:
        return None
    try:
        locks = _Locks(*(open(name, "a", encoding="utf-8") for name in (path, f"{path}.gate")))  # noqa: SIM115
    except OSError as error:
        raise UserError(f"cannot write {path}, which {VARIABLE} names: {error.strerror}") from None
    locks.enter(fcntl.LOCK_SH)
    return locks


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Nobody else uses the device within."""
    if (locks := join()) is None:
        yield
        return
    locks.enter(fcntl.LOCK_EX)
    try:
        yield
    finally:
        locks.enter(fcntl.LOCK_SH)
