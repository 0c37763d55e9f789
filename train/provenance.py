"""Where a run came from: `run.json` in its workdir, and whether that run may be continued or is finished.

It holds the resolved config, fingerprints of what is read (`fingerprint.py`), the command, package versions, devices
and the git commit. A workdir belongs to one config and one set of inputs: sections that cannot change what is learnt
(how often to save, evaluate and log, and on which mesh) may differ when a run is resumed, the rest may not, because the
result would be neither run's. Of several jobs at a time it belongs to one.
"""

import contextlib
import fcntl
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from models.errors import UserError
from models.schema import flattened
from train.checkpoint import saved_steps

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "numpy", "tokenizers")
MAY_CHANGE = ("evaluation.", "checkpoint.", "metrics.", "mesh.")


def is_finished(workdir: Path, config: Mapping[str, Any]) -> bool:
    """Whether `workdir` holds this run, finished.

    Args:
      workdir: of the run.
      config: resolved, as `schema.resolved` gives it.

    Raises:
      UserError: `workdir` holds a run of another config, finished or with training state.
    """
    record = _read(workdir)
    if record is None:
        return False
    finished = bool(record.get("finished"))
    if not finished and not saved_steps(workdir / "checkpoints"):
        return False
    theirs, ours = flattened(record["config"]), flattened(json.loads(json.dumps(config)))
    for key in sorted(theirs.keys() | ours.keys()):
        if theirs.get(key) != ours.get(key) and not key.startswith(MAY_CHANGE):
            raise UserError(
                f"{workdir} holds a run with {key} = {theirs.get(key)!r}, not {ours.get(key)!r}: "
                "choose another --workdir, or remove that one to start over"
            )
    return finished


def check_place(workdir: Path, product: str) -> None:
    """Raises UserError where a run would write over what no run in `workdir` is known to have written."""
    taken = [name for name in ("checkpoints", "metrics.jsonl", product) if (workdir / name).exists()]
    if taken and _read(workdir) is None:
        raise UserError(
            f"{workdir} holds {taken[0]} but no run.json, so it is not known what made it: choose another --workdir"
        )


@contextlib.contextmanager
def locked(workdir: Path, option: str = "--workdir") -> Iterator[None]:
    """Keeps `workdir`, made where it is not, from every other job until the block ends or this process does.

    Args:
      workdir: of a run, or any directory that one job writes.
      option: what names another one.

    Raises:
      UserError: another job holds it, or it cannot be made.
    """
    _make(workdir, option)
    with (workdir / ".lock").open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"{workdir} is in use by another job ({file.read().strip() or 'which is starting'}): wait for its end, "
                f"or choose another {option}"
            ) from None
        except OSError:
            pass  # A file system without locks: two jobs there are not told of each other.
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        yield


def check_inputs(workdir: Path, inputs: Mapping[str, str]) -> None:
    """Refuses to resume a run whose inputs are no longer what they were.

    Args:
      workdir: of a run with training state.
      inputs: name of each -> its fingerprint.

    Raises:
      UserError: one of them was replaced or changed; the message names it.
    """
    theirs = (_read(workdir) or {}).get("inputs", {})
    changed = [name for name in inputs if theirs.get(name, inputs[name]) != inputs[name]]
    if changed:
        raise UserError(
            f"{workdir} holds a run that read another version of {' and '.join(changed)}: put back what it read, or "
            "choose another --workdir, or remove that one to start over"
        )


def record_start(workdir: Path, config: Mapping[str, Any], command: Sequence[str], inputs: Mapping[str, str]) -> str:
    """Writes `run.json` for a run that starts or resumes.

    Returns:
      The run's name among all runs: a resumed one keeps it, one that starts over in the same place gets another.
    """
    record = (_read(workdir) or {}) if saved_steps(workdir / "checkpoints") else {}
    run_id = str(record.get("id") or uuid.uuid4().hex[:16])
    _write(
        workdir,
        {
            "id": run_id,
            "config": config,
            "inputs": dict(inputs),
            "command": list(command),
            "finished": False,
            "git": _git_commit(),
            "python": platform.python_version(),
            "versions": {name: _version(name) for name in PACKAGES},
            "devices": [device.device_kind for device in jax.devices()],
            "processes": jax.process_count(),
        },
    )
    return run_id


def record_finish(workdir: Path) -> None:
    """Marks the run in `workdir` as finished; its product is then complete."""
    _write(workdir, {**(_read(workdir) or {}), "finished": True})


def would_do(workdir: Path) -> str:
    """What the command of the run in `workdir` would do if it were given again."""
    saved = saved_steps(workdir / "checkpoints")
    return f"continues from checkpoint {saved[0]}" if saved else "starts over: no checkpoint had been saved yet"


def command_line() -> list[str]:
    """The command that is running, as one would type it."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    module = [] if spec is None else ["-m", spec.name.removesuffix(".__main__")]
    return ["python", *module, *sys.argv[1 if module else 0 :]]


def _read(workdir: Path) -> dict[str, Any] | None:
    path = workdir / "run.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(record, dict) and isinstance(record.get("config"), dict):
            return record
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be used: {error.strerror}") from error
    except (ValueError, RecursionError):
        pass
    raise UserError(f"{path} is damaged, or was not written by this project: choose another --workdir")


def _make(workdir: Path, option: str) -> None:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except (PermissionError, FileExistsError, NotADirectoryError) as error:
        raise UserError(f"{option}={workdir} cannot be made: {error.strerror}") from error


def _write(workdir: Path, record: Mapping[str, Any]) -> None:
    temporary = workdir / ".run.json.tmp"
    temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, workdir / "run.json")


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
