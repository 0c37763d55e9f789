"""How every command reads its options: one parser, one wording of complaints, the types that options share.

    parser = command_line.parser("scripts.generate", __doc__)
    parser.add_argument("--rows", type=at_least(1), default=32, help="decoded together")

Help tells defaults by itself. A complaint is one sentence that begins with the option, `--rows must be at least 1, got
0`, raised as `UserError` and so shown by `exit_on_user_error` as any other. (`train.main` and `eval.main` take configs,
and with them absl's flags: `train/command_line.py`.)
"""

import argparse
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from models.errors import UserError
from models.schema import nearest

DISTRIBUTED = (
    "the processes of this job: HOST:PORT of process 0, their number, and which one this is; off: this one alone "
    "(default: as SLURM, Open MPI or the TPU pod says)"
)
_KINDS = {"int": "a whole number", "float": "a number"}


class _Help(argparse.HelpFormatter):
    """Appends defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str:
        told = action.help or ""
        silent = action.default in (None, "", argparse.SUPPRESS) or isinstance(action.default, bool | list)
        return told if silent or not action.option_strings or "%(default)" in told else f"{told} (%(default)s)"


class _Parser(argparse.ArgumentParser):
    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        # Nearly always a shell's variable that is not set; as a path it would be the directory that one stands in, and
        # as a text no option at all. Where there is a default, it may mean none of that.
        if not arg_string and action.default in (None, []) and action.option_strings:
            raise argparse.ArgumentError(action, "must not be empty")
        return super()._get_value(action, arg_string)

    def error(self, message: str) -> NoReturn:
        for pattern, form in (
            (r"argument ([^:/]+)(?:/[^:]+)?: (must .*)", "{0} {1}"),
            (r"argument ([^:/]+)(?:/[^:]+)?: invalid (?P<kind>int|float) value: (.*)", "{0} must be {kind}, got {2}"),
            (r"argument ([^:/]+)(?:/[^:]+)?: invalid \S+ value: (.*)", "{0} cannot be {1}"),
            (r"argument ([^:/]+)(?:/[^:]+)?: invalid choice: ('.*?') \((choose from .*)\)", "{0} cannot be {1}: {2}"),
            (r"argument ([^:/]+)(?:/[^:]+)?: (.*)", "{0}: {1}"),
            (r"the following arguments are required: (.*)", "give {0}"),
        ):
            if found := re.fullmatch(pattern, message, re.DOTALL):
                kind = _KINDS.get(found.groupdict().get("kind") or "", "")
                raise UserError(form.format(*found.groups(), kind=kind))
        if found := re.fullmatch(r"unrecognized arguments: (\S+).*", message, re.DOTALL):
            options = [option for action in self._actions for option in action.option_strings]
            raise UserError(f"there is no option {found[1]}{nearest(found[1].partition('=')[0], options)}")
        raise UserError(message)


def parser(module: str, docstring: str | None) -> argparse.ArgumentParser:
    """The parser of `python -m MODULE`, which its docstring's first line describes."""
    told = (docstring or "").split("\n")[0]
    return _Parser(prog=f"python -m {module}", description=told, formatter_class=_Help)


def add_overwrite(parser: argparse.ArgumentParser) -> None:
    """The option `--overwrite`, without which `keep_files` lets nothing be replaced."""
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")


def add_distributed(parser: argparse.ArgumentParser) -> None:
    """The option `--distributed`, for `models.processes.start`."""
    parser.add_argument("--distributed", metavar="HOST:PORT,N,I", help=DISTRIBUTED)


def add_mesh(parser: argparse.ArgumentParser) -> None:
    """The option `--mesh`, for `models.sharding.parse_mesh`."""
    parser.add_argument("--mesh", help="devices that share the work, such as tensor=4 (default: one device)")


def keep_files(paths: Iterable[str | Path | None], overwrite: bool, option: str = "--overwrite") -> None:
    """Refuses, before any work, what would replace a file that is there.

    Args:
      paths: of files that will be written; None is no file.
      overwrite: whether they may be replaced.
      option: how to ask for it.

    Raises:
      UserError: one exists, and it may not be replaced; or its directory cannot be one, or may not be written in.
    """
    for path in paths:
        if path is None or (Path(path).exists() and not Path(path).is_file()):
            continue
        if Path(path).is_file() and not overwrite:
            raise UserError(f"{path} already exists: give another name, or {option} to replace it")
        above = next(place for place in Path(path).absolute().parents if place.exists())
        if not above.is_dir():
            raise UserError(f"cannot write {path}: {above} is not a directory")
        if not os.access(above, os.W_OK | os.X_OK):
            raise UserError(f"cannot write {path}: nothing may be written in {above}")


def at_least(least: int) -> Callable[[str], int]:
    """The type of whole numbers that are not smaller."""

    def convert(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
        if number < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {number}")
        return number

    return convert


def positive(text: str) -> float:
    """The type of numbers above zero that have an end."""
    try:
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from None
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return number


def numbers(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """The type of numbers, `int` or `float`, with commas between them."""

    def convert(text: str) -> list[Any]:
        try:
            return [kind(part) for part in text.split(",")]
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be numbers with commas between them, got {text!r}") from None

    return convert


def listed(text: str) -> list[str]:
    """The type of names with commas between them."""
    return [name.strip() for name in text.split(",") if name.strip()]


def like(pattern: str, form: str, build: Callable[[Sequence[str]], Any]) -> Callable[[str], Any]:
    """The type of texts of some form.

    Args:
      pattern: that all of the text must match.
      form: what to say that it must be, with an example.
      build: makes the value from the pattern's groups.
    """

    def convert(text: str) -> Any:
        found = re.fullmatch(pattern, text)
        if found is None:
            raise argparse.ArgumentTypeError(f"must be {form}, got {text!r}")
        return build(found.groups())

    return convert
