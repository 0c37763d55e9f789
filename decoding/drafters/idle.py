"""A drafter while nothing is drafted: width 0 of one whose number of candidates is chosen by cost.

The target decodes plainly, and the drafter stays up to date: what it ingests waits in a buffer until some steps have
passed, and is then ingested as one part of a prompt would be, whose weights are read once for all of them. Row by row
EAGLE-3's layer would be 4% more weights to read in every step of SmolLM2-135M.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from decoding.drafter import Drafter, TargetView, TrueRows
from decoding.drafters.plain import Plain
from decoding.place import Place


@struct.dataclass
class Waiting:
    """A drafter's state, and true rows that it has not ingested.

    Attributes:
      state: of the drafter.
      start: where the first of them stands.
      taps: their features, R at most.
    """

    state: Any
    start: Place
    taps: dict[str, Float[Array, "B R H"]]


@dataclasses.dataclass(frozen=True)
class Idle(Plain):
    """Plain decoding for at most `rows` steps, with a drafter that looks on.

    What it observes it observes at once, but for a drafter with riders: there are none now.

    Attributes:
      drafter: who looks on.
      rows: steps until it must have caught up.
    """

    drafter: Drafter
    rows: int
    name: ClassVar[str] = "idle"
    bare_names: ClassVar[tuple[str, ...]] = ()

    @property
    def taps(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.drafter.taps if self.drafter.ingests else ()

    def ingest(self, params, target, state, rows):
        at = rows.start.length - state.start.length

        def put(buffer_BRH, row_B1H):
            return jax.vmap(lambda b, r, i: jax.lax.dynamic_update_slice_in_dim(b, r, i, axis=0))(
                buffer_BRH, row_B1H.astype(buffer_BRH.dtype), at
            )

        return dataclasses.replace(state, taps={name: put(state.taps[name], tap) for name, tap in rows.taps.items()})

    def observe(self, params, target, state, tree, output, verdict, live):
        if self.drafter.num_riders:
            return state
        seen = self.drafter.observe(params, target, state.state, tree, output, verdict, live)
        return dataclasses.replace(state, state=seen)

    def caught_up(self, params, target: TargetView, waiting: Waiting) -> Any:
        """The drafter's state after the rows that were waiting; the cache has `rows` slots from `waiting.start` on."""
        if not self.drafter.ingests:
            return waiting.state
        place_BR = waiting.start.length[:, None] + jnp.arange(self.rows, dtype=jnp.int32)
        tokens_BR = jnp.take_along_axis(target.text, jnp.minimum(place_BR, target.text.shape[1] - 1), axis=1)
        count = target.length - waiting.start.length
        rows = TrueRows(tokens_BR, waiting.start, count, waiting.taps, "target")
        return self.drafter.ingest(params, target, waiting.state, rows)
