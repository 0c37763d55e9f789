"""Where a run came from: `run.json` in its workdir, and whether that run may be continued or is finished.

It holds the resolved config, the command, package versions, devices and the git commit. A workdir belongs to one
config: sections that cannot change what is learnt (how often to save, evaluate and log, and on which mesh) may differ
when a run is resumed, the rest may not, because the result would be neither run's.
"""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from models.errors import UserError
from models.schema import flattened

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "numpy", "tokenizers")
MAY_CHANGE = ("evaluation.", "checkpoint.", "metrics.", "mesh.")


def is_finished(workdir: Path, config: Mapping[str, Any]) -> bool:
    """Whether `workdir` holds this run, finished.

    Args:
      workdir: of the run.
      config: resolved, as `schema.resolved` gives it.

    Raises:
      UserError: `workdir` holds training state of another config.
    """
    record = _read(workdir)
    if record is None or not _has_state(workdir):
        return False
    theirs, ours = flattened(record["config"]), flattened(json.loads(json.dumps(config)))
    for key in sorted(theirs.keys() | ours.keys()):
        if theirs.get(key) != ours.get(key) and not key.startswith(MAY_CHANGE):
            raise UserError(
                f"{workdir} holds a run with {key} = {theirs.get(key)!r}, not {ours.get(key)!r}: "
                "choose another --workdir, or remove that one to start over"
            )
    return bool(record.get("finished"))


def record_start(workdir: Path, config: Mapping[str, Any], command: Sequence[str]) -> None:
    """Writes `run.json` for a run that starts or resumes."""
    _write(
        workdir,
        {
            "config": config,
            "command": list(command),
            "finished": False,
            "git": _git_commit(),
            "python": platform.python_version(),
            "versions": {name: _version(name) for name in PACKAGES},
            "devices": [device.device_kind for device in jax.devices()],
            "processes": jax.process_count(),
        },
    )


def record_finish(workdir: Path) -> None:
    """Marks the run in `workdir` as finished; its product is then complete."""
    _write(workdir, {**(_read(workdir) or {}), "finished": True})


def command_line() -> list[str]:
    """The command that is running, as one would type it."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    module = [] if spec is None else ["-m", spec.name.removesuffix(".__main__")]
    return ["python", *module, *sys.argv[1 if module else 0 :]]


def _read(workdir: Path) -> dict[str, Any] | None:
    path = workdir / "run.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be used: {error.strerror}") from error
    except ValueError:
        raise UserError(f"{path} is not valid JSON; it was not written by this project") from None


def _write(workdir: Path, record: Mapping[str, Any]) -> None:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except (PermissionError, FileExistsError, NotADirectoryError) as error:
        raise UserError(f"--workdir={workdir} cannot be made: {error.strerror}") from error
    temporary = workdir / ".run.json.tmp"
    temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, workdir / "run.json")


def _has_state(workdir: Path) -> bool:
    return any(path.name.isdigit() for path in (workdir / "checkpoints").glob("*"))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of the source tree, with `+` when files differ from it; None outside a git checkout."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(("git", *arguments), cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
