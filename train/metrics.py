"""Metrics to files and to the person watching.

`metrics.jsonl` is always written: one object per line with `step`, readable without tools. A resumed run first drops
the lines beyond the step it restored, so that the file of a run that was killed equals that of one that was not, but
for timings. TensorBoard and Weights & Biases are extras. On a terminal a bar shows the run; elsewhere plain lines do.
"""

import contextlib
import importlib
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import rich.progress

from models.errors import UserError
from models.schema import resolved as resolve
from train.config import MetricsConfig, TrainConfig


class MetricWriter:
    """Appends metric lines to every sink; opened by the first process alone."""

    def __init__(self, config: MetricsConfig, workdir: Path, step: int, resolved: dict[str, Any], run_id: str):
        """Opens the sinks.

        Args:
          config: which extras to use.
          workdir: where `metrics.jsonl` and the extras' files live.
          step: the step the run starts from; later lines of an earlier attempt are dropped.
          resolved: the whole config, for W&B.
          run_id: the run's name there; a resumed run continues its curves.

        Raises:
          UserError: an extra was asked for and is not installed.
        """
        self._tensorboard = None
        self._wandb = None
        if config.tensorboard:
            module = _extra("tensorboardX", "metrics.tensorboard", "tensorboardX")
            self._tensorboard = module.SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)
        if config.wandb is not None:
            module = _extra("wandb", "metrics.wandb", "wandb")
            self._wandb = module.init(
                project=config.wandb, dir=str(workdir), name=workdir.name, id=run_id, resume="allow", config=resolved
            )
        path = workdir / "metrics.jsonl"
        truncate(path, step)
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, values: dict[str, float]) -> None:
        """Appends one line and flushes it, so that a kill loses nothing that was reported."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def close(self) -> None:
        """Closes the sinks."""
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def truncate(path: Path, step: int) -> None:
    """Keeps the lines of `path` up to `step`; a line that a kill cut short, or that is damaged otherwise, goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    temporary = path.with_suffix(".jsonl.tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)


class Stopwatch:
    """Where the time of a logging window went: each bucket's seconds, and the rest, which is the steps' own."""

    def __init__(self):
        self._start = time.perf_counter()
        self._buckets: dict[str, float] = {}

    @contextlib.contextmanager
    def timed(self, bucket: str) -> Iterator[None]:
        """Adds the time inside to `bucket`."""
        begin = time.perf_counter()
        yield
        self._buckets[bucket] = self._buckets.get(bucket, 0.0) + time.perf_counter() - begin

    def window(self, steps: int, size: int, unit: str) -> dict[str, float]:
        """Rates over the window that ends now, of `steps` steps of `size` tokens or images each; begins the next one.

        Evaluations and checkpoints are not counted as step time; waiting for data is, and its share is given.
        """
        now = time.perf_counter()
        aside = sum(seconds for bucket, seconds in self._buckets.items() if bucket != "data")
        busy = max(now - self._start - aside, 1e-9)
        waited = self._buckets.get("data", 0.0)
        self._start, self._buckets = now, {}
        return {
            "step_seconds": busy / steps,
            f"{unit}_per_second": steps * size / busy,
            "data_share": waited / busy,
        }


class NotFinite(ArithmeticError):
    """The loss or its gradient became NaN or infinite."""


class Report:
    """What a run says: metric lines to files, progress to the person; silent on all processes but the first.

    Numbers are pushed as device arrays and looked at when the next ones arrive, so that the host never makes the device
    wait.
    """

    def __init__(self, config: TrainConfig, workdir: Path, start: int, show: bool = True, run_id: str = ""):
        """Opens the sinks and the bar for the run `run_id`, which continues after step `start`."""
        self._every, self._steps, self._show = config.metrics.every, config.steps, show
        self._unit, self._size = config.unit, config.batch_size * (config.length or 1)
        self._watch = Stopwatch()
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        self._last_line = start
        self._writer = MetricWriter(config.metrics, workdir, start, resolve(config), run_id) if show else None
        self._bar = _bar() if show and sys.stdout.isatty() else None
        if self._bar is not None:
            self._task = self._bar.add_task("training", total=config.steps, completed=start, text="")
            self._bar.start()

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, *_: object) -> None:
        """Leaves the bar as it is and closes the sinks."""
        if self._bar is not None:
            self._bar.stop()
        if self._writer is not None:
            self._writer.close()

    def timed(self, bucket: str) -> contextlib.AbstractContextManager[None]:
        """Counts the time inside as `data`, which is told, or as something that is no part of a step."""
        return self._watch.timed(bucket)

    def push(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Takes the metrics of a step that was dispatched, and looks at those of the step before.

        Raises:
          NotFinite: the earlier step's loss or gradient is NaN or infinite.
        """
        self.flush()
        self._pending = (step, metrics)

    def flush(self) -> None:
        """Looks at what is pending. Raises NotFinite as `push` does."""
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        fetched = jax.device_get(metrics)  # Sorted by name; the loss comes first for readers.
        values = {"loss": float(fetched.pop("loss")), **{name: float(value) for name, value in fetched.items()}}
        # First the loss of the one that it is, where several are trained.
        for name in (*(name for name in values if name.endswith("/loss")), "loss", "gradient_norm"):
            if not math.isfinite(values[name]):
                raise NotFinite(f"at step {step} the {name.replace('_', ' ')} is {values[name]}")
        if self._bar is not None:
            self._bar.update(self._task, completed=step)
        if step % self._every == 0 or step == self._steps:
            self._line(step, values)

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        """Writes and shows the numbers of the valid split."""
        if self._writer is not None:
            self._writer.write(step, {f"valid/{name}": value for name, value in values.items()})
        shown: dict[str, str] = {}  # Measures by depth (`loss_1`, `loss_2`, ...) share a line's place.
        for name, value in values.items():
            measure = re.sub(r"_\d+$", "", name)
            shown[measure] = f"{shown.get(measure, measure)} {value:.4g}"
        self.say(f"step {step}/{self._steps}  valid: {'  '.join(shown.values())}")

    def say(self, text: str) -> None:
        """One line for the person."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        elif self._show:
            print(text, flush=True)

    def _line(self, step: int, values: dict[str, float]) -> None:
        rates = self._watch.window(step - self._last_line, self._size, self._unit)
        self._last_line = step
        if self._writer is not None:
            self._writer.write(step, {**values, **rates})
        text = (
            f"loss {values['loss']:.4f}  {rates[f'{self._unit}_per_second']:,.0f} {self._unit}/s  "
            f"{1e3 * rates['step_seconds']:,.0f} ms/step  data {rates['data_share']:.0%}"
        )
        if self._bar is not None:
            self._bar.update(self._task, text=text)
        else:
            self.say(f"step {step:>{len(str(self._steps))}}/{self._steps}  {text}")


def _bar() -> rich.progress.Progress:
    return rich.progress.Progress(
        rich.progress.TextColumn("{task.completed}/{task.total}"),
        rich.progress.BarColumn(),
        rich.progress.TimeRemainingColumn(),
        rich.progress.TextColumn("{task.fields[text]}", markup=False),
    )


def _extra(module: str, key: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"{key} needs the package {package}, which is not installed") from None
