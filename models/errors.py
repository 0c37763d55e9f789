"""One kind of exception for what a person can put right, and one way of showing it.

Library code raises `UserError` with a sentence that names what was wrong, what was expected and where. Commands wrap
their `main` with `exit_on_user_error`, which prints that sentence alone; every other exception keeps its traceback,
because it is a defect of ours.
"""

import errno
import functools
import sys
from collections.abc import Callable


class UserError(ValueError):
    """Bad input: the message is one sentence for the person who gave it."""


def exit_on_user_error(main: Callable[..., object]) -> Callable[..., object]:
    """Wraps a command: a `UserError` or a full disk becomes `error: ...` on stderr and exit status 2."""

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except UserError as error:
            message = str(error)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            message = f"the disk is full: could not write {error.filename or 'the output'}"
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)

    return wrapped
