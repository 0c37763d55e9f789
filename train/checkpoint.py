"""Everything that touches Orbax: training state on disk, asynchronous, atomic, a few steps deep.

A checkpoint holds the state, a tree of arrays (trainable parameters, optimizer state, step, key), which is restored
straight into the shardings that are asked for, so on another mesh too; and, as its metadata, the position of the data
iterator as JSON, which is the same on every process because each reads its own shard in step with the others. Frozen
parameters are never here. A step's directory appears under its name only when it is whole.
"""

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from models.errors import UserError


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
            self._checkpointer.save_async(step, state, force=True, custom_metadata={"data": data})

    def restore(self, step: int, abstract: Any) -> tuple[Any, dict[str, Any]]:
        """The state and the data position saved at `step`.

        Args:
          step: one of the saved steps.
          abstract: tree of `jax.ShapeDtypeStruct`s with the shardings to restore into.

        Raises:
          UserError: what is on disk has other names, shapes or dtypes.
        """
        metadata = self._checkpointer.metadata(step)
        saved, wanted = _shapes(metadata.metadata), _shapes(abstract)
        for name in sorted(saved.keys() | wanted.keys()):
            if saved.get(name) != wanted.get(name):
                raise UserError(
                    f"checkpoint {step} in {self._checkpointer.directory} does not fit this run: {name} is "
                    f"{saved.get(name, 'absent')} there and {wanted.get(name, 'absent')} here"
                )
        return self._checkpointer.load(step, abstract), metadata.custom_metadata["data"]

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


def _shapes(tree: Any) -> dict[str, str]:
    """`{path: 'float32[3,4]'}`; named tuples and dicts give the same paths."""

    def name(key: Any) -> str:
        return str(next(getattr(key, field) for field in ("name", "key", "idx") if hasattr(key, field)))

    leaves, _ = jax.tree.flatten_with_path(tree)
    return {
        "/".join(map(name, path)): f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}".replace(" ", "")
        for path, leaf in leaves
    }
