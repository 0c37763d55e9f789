"""The loop in segments, each with the number of candidates that a `Pace` says (`decoding/sizing.py`).

Every width is a program of its own, and so is drafting nothing; they hand one state to each other. The drafter's part
of it is the widest one's, which serves all; what counts accepted nodes has every width's own shape and is added up on
the host. All programs that may be needed are compiled before the first token: one for each width, one for none, and one
with which a drafter catches up after it (`decoding/drafters/idle.py`).
"""

import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from decoding import loop
from decoding.drafters.idle import Idle, Waiting
from decoding.drafters.plain import Plain
from decoding.place import Place
from decoding.request import Request
from decoding.sizing import SEGMENT, Pace, Width
from decoding.stats import Counters, Stats
from models.sharding import keep_rows


class Paced:
    """One request of an open drafter; `stats` counts each of its texts."""

    def __init__(self, models: loop.Models, request: Request, pace: Pace):
        """Of a target and the widest of the drafter's widths, and what says which of them is next."""
        self._models, self._pace, self._request = models, pace, request
        self._idle = Idle(models.drafter, SEGMENT)
        self.stats = [Stats(0, 0, np.zeros(0, np.int64), np.zeros(1, np.int64)) for _ in range(len(request.keys))]
        self._taps: dict[str, jax.Array] = {}
        self._over = False

    def compiled(self, state: loop.DecodeState) -> loop.DecodeState:
        """The state after no steps of every loop that may come, so that nobody waits for the compiler in mid-text."""
        for width in (*self._pace.widths, None):
            state = self._run(state, width, 0)
        return state

    def segment(self, state: loop.DecodeState, steps: int, request: Request) -> loop.DecodeState:
        """The state after the next segment, of at most so many steps, of a request that may end earlier than before."""
        self._request = request
        width, most = (None, steps) if self._over else self._pace.next()
        started = time.perf_counter()
        state = self._run(state, width, int(min(steps, most)))
        counted = [Stats.of(state.counters, row) for row in range(len(self.stats))]  # Which waits for the steps.
        seconds = time.perf_counter() - started
        self.stats = [before + new for before, new in zip(self.stats, counted, strict=True)]
        self._pace.count(width, counted, seconds)
        return state

    def _run(self, state: loop.DecodeState, width: Width | None, steps: int) -> loop.DecodeState:
        """The state after so many steps, with what they counted."""
        batch = len(state.slots)
        drafter = self._idle if width is None else width.drafter
        if width is None and not jax.tree.leaves(state.drafter):
            # Nothing has to be kept up to date: this is plain decoding, and its program.
            drafter = Plain()
        fresh = Counters.zeros(batch, drafter.max_depth, drafter.max_nodes)
        state = dataclasses.replace(state, counters=fresh)
        models = dataclasses.replace(self._models, drafter=drafter)
        if drafter is self._idle:
            return self._idly(models, state, steps)
        if width is None:
            models = dataclasses.replace(models, drafter_params=None)
        return loop.run(models, state, self._request, np.int32(steps))

    def _idly(self, models: loop.Models, state: loop.DecodeState, steps: int) -> loop.DecodeState:
        """Steps without a draft, after which the drafter has caught up; unless the cache has no room, once for all."""
        # Copies: the loop donates its state, and no buffer twice.
        start = jax.tree.map(lambda x: jnp.asarray(np.array(x)), state.place)
        waiting = Waiting(state.drafter, start, self._buffers(models, len(state.slots)))
        state = loop.run(models, dataclasses.replace(state, drafter=waiting), self._request, np.int32(steps))
        waiting = state.drafter
        self._taps = waiting.taps
        length, done = np.asarray(state.text.length), np.asarray(state.text.done)
        crowded = bool(np.any(~done & (length > state.text.tokens.shape[1] - self._idle.rows)))
        # Before the first step nothing waits.
        self._over |= crowded and self._idle.drafter.ingests and steps > 0
        if crowded or not self._idle.drafter.ingests:
            return dataclasses.replace(state, drafter=waiting.state)
        state = dataclasses.replace(state, drafter=None)
        request = dataclasses.replace(self._request, sampling=self._request.sampling.of_any_mode)
        view = models.view(state, request)
        made = _catch_up(self._idle, models.drafter_params, view, waiting.state, waiting.start, waiting.taps)
        return dataclasses.replace(state, drafter=made)

    def _buffers(self, models: loop.Models, batch: int) -> dict[str, jax.Array]:
        dtype = models.params["embed"]["embedding"].dtype
        shape = (batch, self._idle.rows, models.config.width)
        return self._taps or {name: jnp.asarray(np.zeros(shape, dtype)) for name in self._idle.taps}


@functools.partial(jax.jit, static_argnames=("idle",), donate_argnames=("state",))
def _catch_up(idle: Idle, params, view, state: Any, start: Place, taps):
    return keep_rows(idle.caught_up(params, view, Waiting(state, start, taps)))
