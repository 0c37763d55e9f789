"""How many candidates pay on this device, for this target and batch: chosen by measured cost, none at all included.

An *open* drafter (`Drafter.opened`) comes with the acceptance lengths that its trees of several sizes had elsewhere.
What their steps cost here is measured once: the target's forward on a few numbers of rows, and what the drafter and the
loop add to it. The size with the most expected tokens per second is taken, or none. While it decodes, accepted tokens
are counted; as soon as they no longer pay for the tree's rows the request goes on as plain decoding, and requests after
it begin with what was counted.

Costs are kept in `$XDG_CACHE_HOME/tandem/costs` under a hash of all that they hang on: the target's weights and shape,
batch, dtype, device, cores, versions, XLA's flags and this package's own source.
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
from decoding.stats import Counters
from models import pages
from models.attention import Sources
from models.formats.target import Target
from models.layout import Layout
from models.transformer import forward

ROWS = (1, 4, 16, 64)  # Of the forward, measured; between them interpolated.
LENGTH, CAPACITY = 128, 256  # Of the text in whose middle is measured.
LEAST_ROUNDS, MOST_ROUNDS, SECONDS = 5, 15, 3.0  # Of measuring, after one that does not count.
UNSTEADY = 1.3  # Median over minimum.
STEPS = 4  # Of the loop, in one sample.
STEP, PLAIN = 0, -1  # Where whole steps stand among the forwards, which are called by their rows.
WEIGHT = 4.0  # Accepted tokens that what a drafter brings along is worth beside those that are counted.
MEMORY = 128.0  # Most tokens that earlier requests are worth.
MARGIN = 1.05  # What a tree must promise, over plain decoding, to begin with it.
FADING = 0.9  # Of that memory, with each request that drafts nothing for it.
FIRST_LOOK, LAST_LOOK = 8, 64  # Steps between looks at the counts, which double from one look to the next.

Run = Callable[[], tuple[float, float]]

_costs: dict[str, "Costs"] = {}
_seen: dict[tuple, "Gain"] = {}
_fingerprints: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


@dataclasses.dataclass(frozen=True)
class Costs:
    """Seconds, measured.

    Attributes:
      forward: of the target's forward, by rows of each text, in ascending order.
      extra: what a step with a draft adds to it, beyond what one without adds.
      steady: whether repetitions agreed, as they do on a machine that does nothing else; only then are they kept, and
        by the clock.
    """

    forward: tuple[tuple[int, float], ...]
    extra: float
    steady: bool = True

    def step(self, rows: int) -> float:
        """Of a step with that many rows, piecewise linear, the last piece continued; 1 is plain decoding."""
        known, seconds = zip(*self.forward, strict=True)
        if rows > known[-1] and len(known) > 1:
            slope = max(0.0, (seconds[-1] - seconds[-2]) / (known[-1] - known[-2]))
            forward = seconds[-1] + slope * (rows - known[-1])
        else:
            forward = float(np.interp(rows, known, seconds))
        return forward + (self.extra if rows > 1 else 0.0)


@dataclasses.dataclass
class Gain:
    """How many more tokens than one a step accepted, and how many it was expected to."""

    counted: float = 0.0
    expected: float = 0.0

    @property
    def share(self) -> float:
        """The first over the second, what was expected being worth `WEIGHT` tokens beforehand."""
        return (WEIGHT + self.counted) / (WEIGHT + self.expected)

    def scaled(self, factor: float) -> "Gain":
        """The same share, worth less."""
        return Gain(self.counted * factor, self.expected * factor)


def best_size(lengths: Mapping[int, float], seconds: Mapping[int, float]) -> int:
    """The number of candidates with the most tokens per second; among equals the least, so 0 where nothing pays.

    Args:
      lengths: acceptance length by candidates; plain decoding's 1 need not be among them.
      seconds: of a step by candidates, 0 included.
    """
    rates = {size: length / seconds[size] for size, length in lengths.items()} | {0: 1 / seconds[0]}
    return max(sorted(rates), key=rates.__getitem__)


class Watch:
    """Counts what a tree gains while it decodes, and says when it no longer pays."""

    def __init__(self, before: Gain, length: float, ratio: float):
        """Begins with the gain of earlier requests.

        Args:
          before: what they counted.
          length: acceptance length that is expected.
          ratio: seconds of a step over those of plain decoding.
        """
        self._before, self._length, self._ratio = before, length, ratio
        self.gain = before
        self.steps = FIRST_LOOK

    def pays(self, counters: Counters) -> bool:
        """Whether to go on, from the counts of the request so far."""
        steps, committed = (int(np.asarray(x).sum()) for x in (counters.steps, counters.committed))
        expected = self._before.expected + (self._length - 1) * steps
        self.gain = Gain(self._before.counted + committed - steps, expected)
        self.steps = min(2 * self.steps, LAST_LOOK)
        return 1 + (self._length - 1) * self.gain.share > self._ratio


@dataclasses.dataclass(frozen=True)
class Sized:
    """A drafter, sized for a request.

    Attributes:
      drafter: of the chosen size, or plain decoding.
      params: its parameters.
      watch: what may end it; None where nothing is drafted, or where the size is fixed.
      key: of what is remembered of it; None where the size is fixed.
    """

    drafter: Drafter
    params: Any
    watch: Watch | None = None
    key: tuple | None = None

    def finish(self) -> None:
        """Keeps what was counted, for requests to come."""
        if self.key is None:
            return
        if self.watch is None:
            _seen[self.key] = _seen[self.key].scaled(FADING) if self.key in _seen else Gain()
        else:
            gain = self.watch.gain
            _seen[self.key] = gain.scaled(min(1.0, MEMORY / max(gain.expected, 1.0)))


def sized(target: Target, drafter: Drafter, params: Any, batch: int, greedy: bool) -> Sized:
    """What an open drafter decodes a request with.

    Args:
      target: the model, on one device.
      drafter: with `open_sizes`.
      params: its parameters.
      batch: texts at once.
      greedy: all of them; what is counted of greedy and of sampled texts is kept apart.
    """
    costs = measured(target, drafter, params, batch)
    # The size is chosen once, by what the drafter brings along, so that no request waits for the compiler again.
    fitted, length = chosen(drafter, costs)
    key = (_key(target, drafter, batch), drafter, greedy)
    if not fitted.max_depth:
        return Sized(fitted, None, key=key)
    ratio = costs.step(_rows(fitted)) / costs.step(1)
    before = _seen.get(key, Gain())
    if 1 + (length - 1) * before.share <= MARGIN * ratio:
        return Sized(Plain(), None, key=key)
    return Sized(fitted, params, Watch(before, length, ratio), key)


def chosen(drafter: Drafter, costs: Costs) -> tuple[Drafter, float]:
    """The drafter of the size that pays most, and its expected acceptance length; plain decoding where none does."""
    fitted: dict[int, Drafter] = {}
    for size, _ in drafter.open_sizes:
        one = drafter.with_budget(size)
        if one is not None:
            fitted[size] = one
    lengths = {size: length for size, length in drafter.open_sizes if size in fitted}
    seconds = {size: costs.step(_rows(one)) for size, one in fitted.items()} | {0: costs.step(1)}
    size = best_size(lengths, seconds)
    return (fitted[size], lengths[size]) if size else (Plain(), 1.0)


def _rows(drafter: Drafter) -> int:
    return drafter.max_nodes + drafter.num_riders


def measured(target: Target, drafter: Drafter, params: Any, batch: int) -> Costs:
    """What steps of the target and of this drafter cost here: from this process, from a file, or measured now."""
    key = _key(target, drafter, batch)
    if key not in _costs:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tandem" / "costs"
        path = folder / f"{key}.json"
        found = _read(path)
        if found is None:
            found = _measure(target, drafter, params, batch)
            if found.steady:
                _write(path, found)
        _costs[key] = found
    return _costs[key]


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
        forward = tuple((int(rows), float(seconds)) for rows, seconds in found["forward"])
        return Costs(forward, float(found["extra"])) if forward else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _key(target: Target, drafter: Drafter, batch: int) -> str:
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
    """Forwards of more and more rows, until no acceptance could pay for more; and whole steps of the smallest tree."""
    fitted = [one for one in (drafter.with_budget(size) for size, _ in drafter.open_sizes) if one is not None]
    smallest, most_rows = min(fitted, key=_rows), max(map(_rows, fitted))
    most_length = max(length for _, length in drafter.open_sizes)
    runs: dict[int, Run] = {}
    for rows in ROWS:
        runs[rows] = _forward_run(target, batch, rows)
        best, _ = _fastest(runs)
        if rows >= most_rows or best[rows] > 2 * most_length * best[1]:
            break
    runs[STEP], runs[PLAIN] = _step_run(target, smallest, params, batch), _step_run(target, Plain(), None, batch)
    best, steady = _fastest(runs)
    # No forward costs more than one on more rows, whatever else the machine did during its turns.
    forward = tuple((rows, min(best[more] for more in best if more >= rows)) for rows in best if rows > 0)
    alone = Costs(forward, 0.0)
    extra = best[STEP] - alone.step(_rows(smallest)) - max(0.0, best[PLAIN] - alone.step(1))
    return Costs(forward, max(0.0, extra), steady)


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
