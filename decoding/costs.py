"""What steps cost here: seconds of the target's forward by rows, and what a drafter and the loop add to it, measured.

Costs are measured once for a device, a target, a drafter and a batch, and kept in `$XDG_CACHE_HOME/tandem/costs` under
a hash of all that they hang on: the target's weights and shape, batch, dtype, device, cores, versions, XLA's flags and
this package's own source. `decoding/sizing.py` chooses by them how many candidates a drafter has.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import statistics
import time
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

from decoding import loop
from decoding.cache import init_cache
from decoding.drafter import Drafter
from decoding.drafters.plain import Plain
from decoding.request import Request
from decoding.sampling import Sampling, batch_sampling
from models import pages
from models.attention import Sources
from models.formats.target import Target
from models.layout import Layout
from models.transformer import forward

ROWS = (1, 5, 8, 16, 64)  # Of the forward, measured; between them interpolated. Up to 5 a CPU reads parameters once.
LENGTH, CAPACITY = 128, 256  # Of the text in whose middle is measured.
LEAST_ROUNDS, MOST_ROUNDS, SECONDS = 5, 15, 3.0  # Of measuring, after one that does not count.
UNSTEADY = 1.3  # Median over minimum.
STEPS = 4  # Of the loop, in one sample.
STEP, PLAIN = 0, -1  # Whole steps are called by their rows below zero, plain ones as if they had one row.
HOPE = 2.0  # How many times the drafts that it is known for a drafter may at best turn out to have accepted.

Run = Callable[[], tuple[float, float]]

_costs: dict[str, "Costs"] = {}
_fingerprints: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


@dataclasses.dataclass(frozen=True)
class Costs:
    """Seconds, measured.

    Attributes:
      forward: of the target's forward, by rows of each text, in ascending order.
      extra: what a step with a draft adds to it, beyond what one without adds, by rows too.
      steady: whether repetitions agreed, as they do on a machine that does nothing else; only then are they kept, and
        by the clock.
    """

    forward: tuple[tuple[int, float], ...]
    extra: tuple[tuple[int, float], ...] = ()
    steady: bool = True

    def step(self, rows: int) -> float:
        """Of a step with that many rows, piecewise linear, the last piece continued; 1 is plain decoding."""
        extra = _between(self.extra, rows) if rows > 1 and self.extra else 0.0
        return _between(self.forward, rows) + extra

    def ratio(self, rows: int) -> float:
        """Of such a step over a plain one."""
        return self.step(rows) / self.step(1)


def _between(points: tuple[tuple[int, float], ...], rows: int) -> float:
    known, seconds = zip(*points, strict=True)
    if rows > known[-1] and len(known) > 1:
        slope = max(0.0, (seconds[-1] - seconds[-2]) / (known[-1] - known[-2]))
        return seconds[-1] + slope * (rows - known[-1])
    return float(np.interp(rows, known, seconds))


def rows_of(drafter: Drafter) -> int:
    """Rows of the target's forward in a step of it."""
    return drafter.max_nodes + drafter.num_riders


def measured(target: Target, drafter: Drafter, params: Any, batch: int) -> Costs:
    """What steps of the target and of this drafter cost here: from this process, from a file, or measured now."""
    key = key_of(target, drafter, batch)
    if key not in _costs:
        path = _path(key)
        found = _read(path) if path else None
        if found is None:
            found = _measure(target, drafter, params, batch)
            if path and found.steady:
                _write(path, found)
        _costs[key] = found
    return _costs[key]


def _path(key: str) -> Path | None:
    """Where costs are kept; None for a user who has no home, as in some containers."""
    with contextlib.suppress(RuntimeError):
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tandem" / "costs" / f"{key}.json"
    return None


def _write(path: Path, costs: Costs) -> None:
    with contextlib.suppress(OSError):  # Where nothing can be written, the next process measures again.
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(dataclasses.asdict(costs)))
        partial.replace(path)


def _read(path: Path) -> Costs | None:
    """Costs in a file; None where there is none, or where it is damaged."""
    try:
        found = json.loads(path.read_text())
        forward, extra = (
            tuple((int(rows), float(seconds)) for rows, seconds in found[name]) for name in ("forward", "extra")
        )
        return Costs(forward, extra) if forward else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def key_of(target: Target, drafter: Drafter, batch: int) -> str:
    """A hash of everything that costs hang on."""
    if target not in _fingerprints:
        root = Path(__file__).resolve().parents[1]
        source = hashlib.sha256()
        for path in sorted((*(root / "models").rglob("*.py"), *(root / "decoding").rglob("*.py"))):
            source.update(path.read_bytes())
        device = jax.devices()[0]
        _fingerprints[target] = [
            target.fingerprint(),
            repr(target.config),
            str(target.params["embed"]["embedding"].dtype),
            (device.platform, device.device_kind, device.client.platform_version, os.cpu_count()),
            sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
            (jax.__version__, jaxlib.__version__, os.environ.get("XLA_FLAGS"), pages.are_huge()),
            source.hexdigest(),
        ]
    whole = json.dumps([_fingerprints[target], batch, drafter.to_record(), drafter.open_sizes], default=str)
    return hashlib.sha256(whole.encode()).hexdigest()[:32]


def _measure(target: Target, drafter: Drafter, params: Any, batch: int) -> Costs:
    """Forwards of more and more rows, until no acceptance could pay for more; and whole steps of two trees."""
    sizes = [(drafter.with_budget(size), length) for size, length in drafter.open_sizes]
    fitted = [(one, 1 + HOPE * (length - 1)) for one, length in sizes if one is not None]
    most_rows, most_length = max(rows_of(one) for one, _ in fitted), max(length for _, length in fitted)
    runs: dict[int, Run] = {}
    for rows in ROWS:
        runs[rows] = _forward_run(target, batch, rows)
        best, _ = _fastest(runs)
        if rows >= most_rows or best[rows] > most_length * best[1]:
            break
    # The smallest, and the largest that its rows leave any hope.
    alone = Costs(tuple((rows, best[rows]) for rows in best))
    hopeful = [one for one, length in fitted if length > alone.ratio(rows_of(one))]
    smallest = min((one for one, _ in fitted), key=rows_of)
    trees = {rows_of(one): one for one in (smallest, max([smallest, *hopeful], key=rows_of))}
    runs |= {STEP - rows: _step_run(target, one, params, batch) for rows, one in trees.items()}
    runs[PLAIN] = _step_run(target, Plain(), None, batch)
    best, steady = _fastest(runs)
    # No forward costs more than one on more rows, whatever else the machine did during its turns.
    forward = tuple((rows, min(best[more] for more in best if more >= rows)) for rows in best if rows > 0)
    alone = Costs(forward)
    plain = max(0.0, best[PLAIN] - alone.step(1))
    extra = tuple((rows, max(0.0, best[STEP - rows] - alone.step(rows) - plain)) for rows in sorted(trees))
    return Costs(forward, extra, steady)


def _fastest(runs: Mapping[int, Run]) -> tuple[dict[int, float], bool]:
    """The least seconds of each, in turns, for other work on the machine only ever adds; and whether there was none.

    Where there was, and processors compute, it is their time that counts: the clock would measure the other work.
    """
    for run in runs.values():
        run()
    taken: dict[int, list[tuple[float, float]]] = {name: [] for name in runs}
    started = time.perf_counter()
    while len(taken[1]) < LEAST_ROUNDS or (len(taken[1]) < MOST_ROUNDS and time.perf_counter() - started < SECONDS):
        for name, run in runs.items():
            taken[name].append(run())
    clock, processors = ({name: [both[i] for both in samples] for name, samples in taken.items()} for i in (0, 1))
    steady = all(statistics.median(samples) < UNSTEADY * min(samples) for samples in clock.values())
    chosen = clock if steady or jax.default_backend() != "cpu" else processors
    return {name: min(samples) for name, samples in chosen.items()}, steady


def _timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Seconds by the clock, and of this process's processors."""
    clock, processors = time.perf_counter(), time.process_time()
    jax.block_until_ready(work())
    return time.perf_counter() - clock, time.process_time() - processors


@jax.jit
def _likeliest(models: loop.Models, cache, slots, tokens):
    layout = Layout.extend(slots, tokens.shape[1])
    return jnp.argmax(forward(models.config, models.params, tokens, layout, Sources(cache)).logits, axis=-1)


def _forward_run(target: Target, batch: int, rows: int) -> Run:
    """Seconds of one forward on `rows` rows of each of `batch` texts."""
    models = loop.Models(target.config, Plain(), target.params, None)
    cache = init_cache(target.config, batch, CAPACITY, target.params["embed"]["embedding"].dtype)
    slots, tokens = jnp.full(batch, LENGTH, jnp.int32), jnp.zeros((batch, rows), jnp.int32)

    return lambda: _timed(lambda: _likeliest(models, cache, slots, tokens))


def _step_run(target: Target, drafter: Drafter, params: Any, batch: int) -> Run:
    """Seconds of one step of the loop, of several."""
    models = loop.Models(target.config, drafter, target.params, drafter.for_decoding(params))
    dtype = target.params["embed"]["embedding"].dtype
    held = [loop.init_state(target.config, drafter, batch, CAPACITY, dtype)]
    lengths = np.full(batch, LENGTH, np.int32)
    request = Request(
        prompt_length=jnp.asarray(lengths),
        limit=jnp.full(batch, CAPACITY, jnp.int32),
        stops=jnp.full((batch, 4, 8), -1, jnp.int32),
        keys=jax.vmap(jax.random.key)(jnp.arange(batch, dtype=jnp.uint32)),
        sampling=batch_sampling([Sampling()] * batch),
    )

    def run() -> tuple[float, float]:
        state = held.pop()
        text = dataclasses.replace(state.text, length=jnp.asarray(lengths), done=jnp.zeros(batch, bool))
        state = jax.block_until_ready(dataclasses.replace(state, text=text, slots=jnp.asarray(lengths)))

        def step() -> list[Any]:
            held.append(loop.run(models, state, request, np.int32(STEPS)))
            return held

        clock, processors = _timed(step)
        return clock / STEPS, processors / STEPS

    return run
