"""Trains.

    python -m train.main --config=configs/X.py[:variant] --workdir=DIR [--config.key=value ...]
        [--dry_run [--memory]] [--profile_steps=FIRST:LAST] [--distributed=HOST:PORT,N,I]

The same command again continues a run that was stopped, and says so if it is finished. `--dry_run` prints the resolved
config, parameter counts, shardings and memory, and touches no device memory; with `--memory` it compiles the step and
prints what that takes, too.
"""

import functools
import re
import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from models.errors import UserError, exit_on_user_error
from train.command_line import DISTRIBUTED, read_flags

_CONFIG = config_flags.DEFINE_config_file("config", None, "The job: a file, perhaps with :variant.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Receives checkpoints, metrics and what training makes.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print what would run and how large it is, then exit.")
_MEMORY = flags.DEFINE_bool("memory", False, "With --dry_run: compile the step, and print what memory it takes.")
_PROFILE = flags.DEFINE_string("profile_steps", None, "Trace these steps, FIRST:LAST, into WORKDIR/profile.")


def train_command(argv: list[str]) -> None:
    """The command, once its flags are parsed."""
    logging.set_verbosity(logging.FATAL)  # Orbax narrates, and logs with a traceback what it then raises.
    if len(argv) > 1:
        raise UserError(f"{argv[1]!r} is not a flag; options are written --name=value")
    if _CONFIG.value is None:
        raise UserError("which job? Give --config=configs/NAME.py")
    if _WORKDIR.value is None and not _DRY_RUN.value:
        raise UserError("where to? Give --workdir=DIR")
    if _MEMORY.value and not _DRY_RUN.value:
        raise UserError("--memory goes with --dry_run: a step that runs tells its memory anyway")
    workdir = Path(_WORKDIR.value or ".")
    profile = _steps(_PROFILE.value)

    # Objectives and the trainer bring JAX, Orbax and TFDS; a mistyped flag is answered before that.
    from models import processes
    from models.schema import resolved
    from train import dry_run, provenance, trainer
    from train.config import parse
    from train.objectives import OBJECTIVES

    source = flags.FLAGS["config"].config_filename  # type: ignore[attr-defined]
    config = parse(_CONFIG.value, OBJECTIVES, source)
    processes.start(DISTRIBUTED.value)
    if _DRY_RUN.value:
        print(dry_run.describe(config, _MEMORY.value))
        return
    if processes.on_first(lambda: provenance.is_finished(workdir, resolved(config))):
        print(f"{workdir} is finished ({config.steps} steps); remove it, or choose another --workdir, to train again")
        return
    try:
        trainer.train(config, workdir, profile)
    except KeyboardInterrupt:
        print(f"\nstopped; the same command {provenance.would_do(workdir)}", file=sys.stderr)
        sys.exit(130)


def _steps(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    found = re.fullmatch(r"(\d+):(\d+)", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise UserError(f"--profile_steps must be FIRST:LAST, such as 10:15, got {text!r}")
    return int(found[1]), int(found[2])


def _fill_in(config: ConfigDict) -> None:
    from train.config import fill_in
    from train.objectives import OBJECTIVES

    fill_in(config, OBJECTIVES)


@exit_on_user_error
def main() -> None:
    """Parses the flags and runs the command."""
    app.run(train_command, flags_parser=functools.partial(read_flags, fill_in=_fill_in))


if __name__ == "__main__":
    main()
