"""Loop efficiency as a measurement: a decode whose candidates cost nothing and are accepted at a known rate.

A drafter that replays a known text has no network, so the ideal speed-up of a tree of N rows is the acceptance length
times t(target forward on one row) over t(on N rows), all measured in one run, and what is missing is the loop's own:
choosing, verifying, committing and moving on, with candidates that are really accepted. (With random candidates, as
`eval/measure/parts.py` times a step, hardly one is.)

The known text is what the very loop writes when it is told that text. In bfloat16 scores hang on the number of rows and
on which of them a token had, so that a text that another program wrote, or this one while it accepted nothing, parts
from it somewhere, and behind that place nothing would be accepted any more. So what the loop wrote is told it again
until it writes the same: up to the place where they parted it did already. The first to tell is the text of a loop of
few rows, because decoding it with many, none accepted, takes long.
"""

import dataclasses
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from decoding import loop
from decoding.drafter import Drafter
from decoding.stats import Counters
from eval.measure.parts import Scene
from eval.measure.timing import Timing

ALL_STEPS = np.int32(2**31 - 1)
TRIES = 64  # Of a decode, until its text is what it was told.


class Replay:
    """The fused loop from a prompt to its last token.

    Attributes:
      acceptance_length: of the last sample.
      settled: whether the text is the one that was told, to its end.
      text: prompt and text as they were last written to prepare; None before.
    """

    def __init__(
        self,
        scene: Scene,
        drafter: Drafter,
        params_of: Callable[[Int[Array, "known"], float], Any],
        new_tokens: int,
        rate: float,
        after: "Replay | None" = None,
    ):
        """A decode of `new_tokens` tokens on `scene`, of batch 1 and with room for them.

        Args:
          scene: where it begins.
          drafter: what replays.
          params_of: its parameters, for a known text and the rate at which it is told.
          new_tokens: how many are decoded.
          rate: of acceptance, of a candidate behind accepted ones.
          after: another decode of the scene, whose text is told first; None decodes one that accepts nothing.
        """
        self._after, self._preparing = after, threading.Lock()
        self.text: np.ndarray | None = None
        self._drafter, self._params_of, self._rate = drafter, params_of, rate
        self._state = scene.state(drafter)
        limit = scene.lengths + new_tokens
        self._request = dataclasses.replace(scene.request(), limit=limit)
        self._models = scene.models(drafter, params_of(self._state.text.tokens[0], 0.0))
        self._lengths = scene.lengths
        self.acceptance_length, self.settled = 1.0, False

    def prepare(self) -> None:
        """Compiles the loop, and tells it its own text until it writes it again."""
        with self._preparing:  # Several may come after one, each in a thread of its own.
            if self.text is not None:
                return
            if self._after is None:
                known = self._written()
            else:
                self._after.prepare()
                assert self._after.text is not None
                known = self._after.text
            for _ in range(TRIES):
                self._models = dataclasses.replace(
                    self._models, drafter_params=self._params_of(jnp.asarray(known), self._rate)
                )
                told, known = known, self._written()
                self.settled = np.array_equal(told, known)
                if self.settled:
                    break
            self.text = known

    def _written(self) -> np.ndarray:
        """Prompt and text of a decode."""
        self._run()
        return np.array(self._state.text.tokens[0])

    def sample(self) -> float:
        """Seconds per token."""
        return self._run()

    def _run(self) -> float:
        text = dataclasses.replace(self._state.text, length=jnp.array(self._lengths), done=jnp.zeros(1, bool))
        counters = Counters.zeros(1, self._drafter.max_depth, self._drafter.max_nodes)
        start = dataclasses.replace(self._state, text=text, slots=jnp.array(self._lengths), counters=counters)
        start = jax.block_until_ready(start)
        started = time.perf_counter()
        self._state = jax.block_until_ready(loop.run(self._models, start, self._request, ALL_STEPS))
        seconds = time.perf_counter() - started
        committed, steps = int(self._state.counters.committed[0]), int(self._state.counters.steps[0])
        self.acceptance_length = committed / steps
        return seconds / committed


def efficiency(
    plain: Timing, forward: Timing, mine: Timing, wide: Timing, acceptance_length: float
) -> dict[str, float]:
    """The measured speed-up over the ideal one, with what it is made of.

    Args:
      plain, mine: milliseconds per token of plain decoding, and of the replay.
      forward, wide: of the target's forward on one row, and on the replay's.
      acceptance_length: of the replay.
    """
    speedup = plain.median / mine.median
    return {
        "ms_per_token": mine.median,
        "forward_ms": wide.median,
        "acceptance_length": acceptance_length,
        "speedup": speedup,
        "loop_efficiency": speedup / (acceptance_length * forward.median / wide.median),
    }
