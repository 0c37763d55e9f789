"""One kind of exception for what a person can put right, and one way of showing it.

Library code raises `UserError` with a sentence that names what was wrong, what was expected and where. Commands wrap
their `main` with `exit_on_user_error`, which prints that sentence alone; every other exception keeps its traceback,
because it is a defect of ours.
"""

import contextlib
import errno
import functools
import io
import sys
from collections.abc import Callable

_FULL = (errno.ENOSPC, errno.EDQUOT)
# Files that are not where, what or whose they should be: the command is right, the path or its permissions are not.
_MISPLACED = (
    *(errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP),
)


class UserError(ValueError):
    """Bad input: the message is one sentence for the person who gave it, and `status` what a command then ends with."""

    status = 2


class OutOfReach(UserError):
    """Nothing was wrong but that another machine could not be reached: a script may go another way."""

    status = 3


def exit_on_user_error(main: Callable[..., object]) -> Callable[..., object]:
    """Wraps a command, so that what is no defect ends it without a traceback.

    A `UserError`, a full disk and a file that may not be used as asked become `error: ...` on stderr and exit status 2
    (3 for `OutOfReach`);
    an interrupt becomes `stopped` and 130; a reader of our output that went away ends the command silently with 141.
    Those are the statuses that a shell gives to processes killed by SIGINT and SIGPIPE.
    """

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        # A terminal that knows few characters, or a file's name that is no text, must not end a command.
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            result = main(*args, **kwargs)
            sys.stdout.flush()  # Here a closed pipe is caught; at the interpreter's exit it no longer would be.
            return result
        except UserError as error:
            message, status = str(error), error.status
        except KeyboardInterrupt:
            print("\nstopped", file=sys.stderr)
            sys.exit(130)
        except BrokenPipeError:
            with contextlib.suppress(BrokenPipeError):
                sys.stdout.close()
            sys.exit(141)
        except OSError as error:
            status = UserError.status
            if error.errno in _FULL:
                message = f"the disk is full: could not write {error.filename or 'the output'}"
            elif error.errno in _MISPLACED and error.filename is not None:
                message = f"cannot read or write {error.filename}: {error.strerror}"
            else:
                raise
        print(f"error: {message}", file=sys.stderr)
        sys.exit(status)

    return wrapped
