"""Everything that touches Orbax: training state on disk, asynchronous, atomic, a few steps deep.

A checkpoint holds the state, a tree of arrays (trainable parameters, optimizer state, step, key), which is restored
straight into the shardings that are asked for, so on another mesh too; and, as its metadata, the position of the data
iterator as JSON, which is the same on every process because each reads its own shard in step with the others. Frozen
parameters are never here. A step's directory appears under its name only when it is whole.
"""

import contextlib
import errno
import gc
import itertools
import logging
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from models import processes
from models.errors import UserError
from models.formats.storage import exponent_bits

_STATE = "state"  # What Orbax calls what `save_async` saves.


class Checkpoints:
    """The newest few training states under one directory.

    Saving returns once the state has been copied from the devices; the disk is written meanwhile.
    """

    def __init__(self, directory: Path, keep: int):
        """Opens, or creates, `directory`; what a killed run left half-written there is removed."""
        self._checkpointer = ocp.training.Checkpointer(
            directory.absolute(),
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            cleanup_tmp_directories=True,
        )

    @property
    def latest(self) -> int | None:
        """Step of the newest whole checkpoint, or None."""
        newest = self._checkpointer.latest
        return None if newest is None else newest.step

    def save(self, step: int, state: Any, data: dict[str, Any]) -> None:
        """Starts saving `state` (arrays) and `data` (JSON) under `step`; waits only for the save before it."""
        with self._telling_a_full_disk():
            metadata = {"data": data, "sums": _sums(state)}
            self._checkpointer.save_async(step, state, force=True, custom_metadata=metadata)

    def wait(self) -> None:
        """Returns when nothing is left to write. Raises OSError when the disk was full."""
        with self._telling_a_full_disk():
            self._checkpointer.wait()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        """Waits and frees the checkpointer's threads."""
        with self._telling_a_full_disk():
            self._checkpointer.close()

    @contextlib.contextmanager
    def _telling_a_full_disk(self) -> Iterator[None]:
        """What Orbax's storage layer reports as a message becomes the OSError it is; the torn checkpoint goes."""
        try:
            yield
        except Exception as error:
            if "No space left on device" not in str(error):
                raise
            directory = Path(self._checkpointer.directory)
            for torn in directory.glob("*.orbax-checkpoint-tmp"):
                shutil.rmtree(torn, ignore_errors=True)
            raise OSError(errno.ENOSPC, "No space left on device", str(directory)) from error


def restore(directory: Path, abstract: Any) -> tuple[Any, dict[str, Any]]:
    """The state and the data position in one step's directory.

    Args:
      directory: of one step.
      abstract: tree of `jax.ShapeDtypeStruct`s with the shardings to restore into.

    Raises:
      UserError: what is on disk has other names, shapes or dtypes, or other numbers than were saved. What else is
        damaged makes Orbax fail, in any way.
    """
    found = ocp.metadata(directory, _STATE)
    saved, wanted = _shapes(found.metadata), _shapes(abstract)
    for name in sorted(saved.keys() | wanted.keys()):
        if saved.get(name) != wanted.get(name):
            raise UserError(
                f"it does not fit this run: {name} is {saved.get(name, 'absent')} there and "
                f"{wanted.get(name, 'absent')} here"
            )
    told = found.custom_metadata or {}
    if not isinstance(told.get("data"), dict):
        raise UserError("it does not say how far the data had been read")
    state = ocp.load(directory, abstract, checkpointable_name=_STATE)
    if told.get("sums") != _sums(state):
        raise UserError("its numbers are not those that were saved")
    return state, told["data"]


def restore_newest(
    directory: Path, abstract: Any, say: Callable[[str], None]
) -> tuple[int, Any, dict[str, Any]] | None:
    """The newest state that can be read: its step, itself and its data position; None where none was ever saved.

    What is damaged is put aside under another name once a whole one is found, so that its step can be saved again.
    To be called before `Checkpoints` opens the directory, which a damaged checkpoint may keep from being opened.

    Args:
      directory: holds one directory per step.
      abstract: as for `restore`.
      say: told about every checkpoint that is damaged.

    Raises:
      UserError: there are checkpoints, and none of them can be read.
    """
    directory, failed, found = directory.absolute(), {}, None
    with _leaving_no_tasks():
        for step in saved_steps(directory):
            try:
                if found is None:
                    found = (step, *restore(directory / str(step), abstract))
                else:
                    ocp.metadata(directory / str(step), _STATE)
            except (MemoryError, jax.errors.JaxRuntimeError):  # Of the machine, not of what is on disk.
                raise
            except Exception as error:  # What Orbax makes of damage depends on where it is.
                failed[step] = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        if failed:
            with warnings.catch_warnings(action="ignore"):
                gc.collect()  # What was left behind, now, while nobody listens.
    if found is None and failed:
        reasons = "; ".join(f"{step}: {reason}" for step, reason in failed.items())
        raise UserError(
            f"no checkpoint in {directory} can be read ({reasons}): choose another --workdir, or remove that one to "
            "start over"
        )
    for step, reason in failed.items():
        assert found is not None
        name = _put_aside(directory, step)
        say(
            f"checkpoint {step} in {directory} is damaged ({reason}); it is kept as {name}, and the run goes on from "
            f"checkpoint {found[0]}"
        )
    return found


def saved_steps(directory: Path) -> list[int]:
    """Steps whose checkpoints lie in a directory, newest first, whole or not."""
    names = [path.name for path in directory.iterdir()] if directory.is_dir() else []
    return sorted((int(name) for name in names if name.isdecimal()), reverse=True)


def _put_aside(directory: Path, step: int) -> str:
    aside = next(path for n in itertools.count(1) if not (path := directory / f"damaged-{step}-{n}").exists())
    processes.gathered(None)  # All have read, and all have found the same name.
    processes.on_first(lambda: (directory / str(step)).rename(aside))
    return aside.name


@contextlib.contextmanager
def _leaving_no_tasks() -> Iterator[None]:
    """Of a read that fails Orbax leaves others behind, whose errors Python would print, each with a traceback."""
    logger, hook = logging.getLogger("asyncio"), sys.unraisablehook
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda _: None
    try:
        yield
    finally:
        logger.setLevel(level)
        sys.unraisablehook = hook


def not_finite(state: Any) -> str | None:
    """Path of the first array of a state that holds NaN or infinity, or None."""
    named = {path: leaf for path, leaf in _by_path(state).items() if jnp.issubdtype(leaf.dtype, jnp.floating)}

    def of(leaves: list[Any]) -> list[Any]:
        masks = [exponent_bits(np.dtype(leaf.dtype)) for leaf in leaves]
        return [(leaf.view(mask.dtype) & mask == mask).any() for leaf, mask in zip(leaves, masks, strict=True)]

    found = _where_they_lie(of, list(named.values()))
    return next((path for path, wrong in zip(named, found, strict=True) if wrong), None)


def _sums(state: Any) -> list[int]:
    """A check sum of every array, whatever its sharding: Orbax's files would hide changed and zeroed bytes.

    Of the bits as whole numbers, modulo 2^32, so that the order of summation does not matter.
    """

    def of(leaves: list[Any]) -> list[Any]:
        sums = []
        for leaf in leaves:
            kind = {1: np.uint8, 2: np.uint16}.get(leaf.dtype.itemsize, np.uint32)
            sums.append(leaf.reshape(-1).view(kind).sum(dtype=np.uint32))
        return sums

    return [int(total) for total in _where_they_lie(of, jax.tree.leaves(state))]


def _where_they_lie(measure: Callable[[list[Any]], list[Any]], leaves: list[Any]) -> list[Any]:
    """Something small of every array, found on accelerators by a program and on a CPU by NumPy, which compiles none."""
    on_host = all(leaf.is_fully_addressable and next(iter(leaf.devices())).platform == "cpu" for leaf in leaves)
    return measure(jax.device_get(leaves)) if on_host else jax.device_get(jax.jit(measure)(leaves))


def _shapes(tree: Any) -> dict[str, str]:
    """`{path: 'float32[3,4]'}`; named tuples and dicts give the same paths."""
    return {
        path: f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}".replace(" ", "") for path, leaf in _by_path(tree).items()
    }


def _by_path(tree: Any) -> dict[str, Any]:
    def name(key: Any) -> str:
        return str(next(getattr(key, field) for field in ("name", "key", "idx") if hasattr(key, field)))

    return {"/".join(map(name, path)): leaf for path, leaf in jax.tree.flatten_with_path(tree)[0]}
