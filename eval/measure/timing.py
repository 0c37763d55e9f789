"""How long a piece of computation takes when nothing but it runs: the one stopwatch of every benchmark here.

A part runs many times inside one jitted loop, so that neither Python nor dispatch is in the number, and samples of
several parts are taken in turn, so that a machine that slows down slows all of them down. Compilation and the first run
come before the first sample.
"""

import concurrent.futures
import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from eval.measure import turns
from models.sharding import mesh_of, on_mesh

SAMPLE_SECONDS = 0.03  # A sample repeats a short part until it lasts about this long.
MOST_TIMES = 2000


@dataclasses.dataclass(frozen=True)
class Timing:
    """Milliseconds of one run of a part: median and minimum over samples."""

    median: float
    minimum: float


class Timed(Protocol):
    """Something that `measure` can time; what has a `prepare`, too, does there all that is not to be timed."""

    def sample(self) -> float:
        """Runs once or more and returns seconds per run; the first call may be slow and is thrown away."""


class Part:
    """A pure function, run again and again inside one compiled loop.

    The compiler must not move work out of that loop. So some of what the function reads varies, as far as anybody can
    tell at compile time: after each run one element of every varying array is changed in place by an amount that
    depends on the result and is zero. All of the result is the next carry, so nothing of it is dropped either.
    """

    def __init__(self, function: Callable[[Any, Any, Any], Any], fixed: Any, varying: Any, carry: Any):
        """Wraps `function(fixed, varying, carry) -> carry`.

        Args:
          function: what to time.
          fixed: large things that are only read (parameters, caches).
          varying: inputs such that every product in the function depends on at least one of them; copied.
          carry: the result of a run that was not made, for functions that work on their last result; copied.
        """
        # Bare leaves: `text` lowers with shapes in the place of arrays, which structs with checked fields would refuse.
        self._fixed, structure_of_fixed = jax.tree.flatten(fixed)
        leaves, structure = jax.tree.flatten((varying, carry))
        self._state = [jnp.array(leaf) for leaf in leaves]
        self._times: int | None = None
        self._mesh = mesh_of((fixed, self._state))

        def body(fixed, state):
            varying, carry = jax.tree.unflatten(structure, state)
            nothing = _never(jax.tree.leaves(carry)[0])
            varying = jax.tree.map(lambda leaf: _touched(leaf, nothing), varying)
            read = jax.tree.unflatten(structure_of_fixed, fixed)
            return jax.tree.leaves((varying, function(read, varying, carry)))

        def loop(fixed, state, times):
            return jax.lax.fori_loop(0, times, lambda _, state: body(fixed, state), state)

        self._loop = jax.jit(loop, donate_argnums=1)

    @classmethod
    def of(cls, function: Callable[[Any, Any], Any], fixed: Any, varying: Any) -> "Part":
        """A part that ignores its last result: `function(fixed, varying)`."""
        shapes = jax.eval_shape(function, fixed, varying)
        carry = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return cls(lambda fixed, varying, _: function(fixed, varying), fixed, varying, carry)

    def prepare(self) -> None:
        """Compiles the loop, by running it once."""
        self._run(1)

    def sample(self) -> float:
        """Seconds per run."""
        if self._times is None:
            once = self._run_compiled()
            self._times = max(1, min(MOST_TIMES, round(SAMPLE_SECONDS / once)))
        return self._run(self._times) / self._times

    def text(self) -> str:
        """The compiled program, for tests."""
        with on_mesh(self._mesh):
            return self._loop.lower(self._fixed, self._state, 1).compile().as_text() or ""

    def _run_compiled(self) -> float:
        """Seconds of a run for which nothing was compiled.

        The second one may be the first of these or not: on a mesh a result may lie elsewhere than what the first run
        began with, and a program is compiled for where its arguments lie.
        """
        seconds, known = 0.0, -1
        while known != (programs := self._loop._cache_size()):  # type: ignore[attr-defined]
            seconds, known = self._run(1), programs
        return seconds

    def _run(self, times: int) -> float:
        started = time.perf_counter()
        with on_mesh(self._mesh):
            self._state = jax.block_until_ready(self._loop(self._fixed, self._state, times))
        return time.perf_counter() - started


def _never(leaf: Array) -> Bool[Array, ""]:
    """False, though the compiler cannot know: whether an element holds the largest value of its type."""
    limits = jnp.finfo if jnp.issubdtype(leaf.dtype, jnp.inexact) else jnp.iinfo
    return leaf[(0,) * leaf.ndim] == limits(leaf.dtype).max


def _touched(leaf: Array, nothing: Bool[Array, ""]) -> Array:
    """`leaf` with one element changed by `nothing`."""
    first = (0,) * leaf.ndim
    if leaf.dtype == bool:
        return leaf.at[first].set(leaf[first] | nothing)
    return leaf.at[first].add(nothing.astype(leaf.dtype))


class Prepared(Protocol):
    """Something that can be compiled before it is timed."""

    def prepare(self) -> None:
        """Compiles."""


def prepare_together(parts: Iterable[Prepared]) -> None:
    """Compiles parts side by side: one after the other, the programs of an accelerator take minutes."""
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for done in [pool.submit(part.prepare) for part in parts]:
            done.result()


def measure(
    parts: dict[str, Timed], rounds: int, progress: Callable[[str], None] = lambda line: None
) -> dict[str, Timing]:
    """Times parts in turn, `rounds` times each, after one run of each that is not counted.

    Args:
      parts: what to time, by name.
      rounds: samples of each part.
      progress: told what is being done.

    Returns:
      Timings by name.
    """
    for name, part in parts.items():
        progress(f"compiling {name}")
        getattr(part, "prepare", part.sample)()
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    if not parts:
        return {}
    progress("waiting for the device")
    with turns.alone():
        for part in parts.values():
            part.sample()
        for turn in range(rounds):
            progress(f"round {turn + 1} of {rounds}")
            for name, part in parts.items():
                seconds[name].append(part.sample())
    return {name: summary(samples) for name, samples in seconds.items()}


def summary(seconds: Sequence[float]) -> Timing:
    """Median and minimum of samples in seconds, as milliseconds."""
    return Timing(1e3 * statistics.median(seconds), 1e3 * min(seconds))
