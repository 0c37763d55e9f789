"""`--config=FILE[:variant] --config.key=value ...`, with every complaint as one sentence.

`ml_collections` does the parsing; what it would answer with a traceback is looked for first: a config file that does
not load, an overridden key that the config does not have, a value of another type.
"""

import re
import runpy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from models.command_line import DISTRIBUTED as _TOLD
from models.errors import UserError
from models.schema import nearest

# For `models.processes.start`; of all commands that take configs.
DISTRIBUTED = flags.DEFINE_string("distributed", None, _TOLD)

_OVERRIDE = re.compile(r"--?(?:no)?config\.([^=]*)(?:=(.*))?", re.DOTALL)


def load_config(argument: str) -> ConfigDict:
    """What `get_config` returns for `FILE` or `FILE:variant`.

    Raises:
      UserError: there is no such file, it fails, or it returns something else than a `ConfigDict`.
    """
    name, *variant = argument.split(":", 1)
    path = Path(name)
    if not path.is_file():
        near = nearest(path.name, (other.name for other in path.parent.glob("*.py")))
        raise UserError(f"there is no config file {name}{near}")
    try:
        get_config = runpy.run_path(name).get("get_config")
        config = None if get_config is None else get_config(*variant)
    except ValueError as error:  # What `configs.variant` raises, a sentence already.
        raise UserError(f"{argument}: {error}") from error
    except Exception as error:  # A config is input: whatever goes wrong inside it is its author's to mend.
        raise UserError(f"the config {argument} fails with {type(error).__name__}: {error}") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"{name} must define get_config(variant='') and return a ConfigDict from it")
    return config


def read_flags(
    argv: Sequence[str],
    values: flags.FlagValues = flags.FLAGS,
    fill_in: Callable[[ConfigDict], None] | None = None,
) -> list[str]:
    """Parses `argv` into absl's flags, for `app.run(main, flags_parser=read_flags)`.

    Args:
      argv: the command line.
      values: the flags; `config` is one of them, from `config_flags.DEFINE_config_file`.
      fill_in: adds to a config the keys that its file leaves out, because they have defaults; called only where the
        command line names one of them.

    Raises:
      UserError: an unknown flag or config key, a value of the wrong type, a config that does not load.
    """
    chosen = [value for argument in argv if (value := re.sub(r"^--?config=", "", argument)) != argument]
    config = load_config(chosen[-1]) if chosen else None
    overrides = [found for argument in argv if (found := _OVERRIDE.fullmatch(argument))]
    for override in overrides:
        if config is None:
            raise UserError(f"{override[0]} needs --config=FILE before it")
        if fill_in is not None and not _has(config, override[1]):
            fill_in(config)
            _fill_in_when_read(values, fill_in)
            fill_in = None
        _check_key(config, override[1])
    try:
        return values(list(argv))
    except flags.IllegalFlagValueError as error:
        for override in overrides:
            # A flag may be repeated: the value that does not fit is the one that the library names.
            if override[2] is not None and f"{override[0]}:" in f"{error}:":
                kind = _parent(config, override[1])[0].get_type(override[1].split(".")[-1]).__name__
                raise UserError(f"--config.{override[1]} must be {kind}, got {override[2]!r}") from error
        raise UserError(str(error)) from error
    except flags.Error as error:
        raise UserError(str(error)) from error


def _parent(config: Any, key: str) -> tuple[Any, str]:
    """The section that holds the last part of a dotted key, and that section's own dotted place."""
    *sections, _ = key.split(".")
    for section in sections:
        config = config[section]
    return config, ".".join(sections)


def _has(config: Any, key: str) -> bool:
    """Whether the config has a place for a dotted key."""
    for part in key.split("."):
        if not isinstance(config, ConfigDict) or part not in config:
            return False
        config = config[part]
    return True


def _fill_in_when_read(values: flags.FlagValues, fill_in: Callable[[ConfigDict], None]) -> None:
    """The flag `config` reads its file by itself, when it is parsed; from now on it fills in what it read."""
    parser = values["config"].parser
    read = parser.parse

    def read_and_fill_in(path):
        config = read(path)
        if isinstance(config, ConfigDict):
            fill_in(config)
        return config

    parser.parse = read_and_fill_in  # type: ignore[method-assign]


def _check_key(config: ConfigDict, key: str) -> None:
    section: Any = config
    seen: list[str] = []
    for part in key.split("."):
        if not isinstance(section, ConfigDict):
            raise UserError(f"--config.{key}: {'.'.join(seen)} is {section!r}, not a section")
        if part not in section:
            place = f" in the section {'.'.join(seen)}" if seen else ""
            raise UserError(f"--config.{key}: the config has no key {part!r}{place}{nearest(part, section)}")
        section = section[part]
        seen.append(part)
