"""What a decode counts, and the one definition of each number made from the counts.

* **Acceptance length** (tau): tokens committed per target forward, bonus included; the token that prefill chooses is
  not counted. Plain decoding has exactly 1.
* **Accepted by depth**: entry d-1 counts the steps whose draft of depth d was accepted and emitted.
* **Conditional acceptance** at depth d: steps that accepted depth d over steps that accepted depth d-1.

A step that a stop token or the length limit cuts short counts what it emitted.
"""

import collections
import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Int


@struct.dataclass
class Counters:
    """Device-side counts per batch row.

    Attributes:
      steps: target forwards after prefill in which the row was live.
      committed: tokens those steps emitted.
      accepted: steps in which the draft of depth d+1 was accepted and emitted.
      nodes: times that node was accepted, for trees whose nodes keep their meaning from step to step.
    """

    steps: Int[Array, "B"]
    committed: Int[Array, "B"]
    accepted: Int[Array, "B D"]
    nodes: Int[Array, "B N"]

    @classmethod
    def zeros(cls, batch: int, depth: int, nodes: int) -> "Counters":
        """All counts at 0."""
        zero = lambda *shape: jax.device_put(np.zeros(shape, np.int32))  # noqa: E731
        return cls(zero(batch), zero(batch), zero(batch, depth), zero(batch, nodes))

    def record(
        self, path: Int[Array, "B R"], emitted: Int[Array, "B"], drafts: Int[Array, "B"], live: Array
    ) -> "Counters":
        """Adds one step: `emitted` tokens of which the first `drafts` are accepted candidates along `path`."""
        depth_D = jnp.arange(1, self.accepted.shape[1] + 1)
        hit_BD = (depth_D <= drafts[:, None]).astype(jnp.int32)
        # Not a scatter: over a batch that is split, XLA would add that up across devices.
        on_path_BDN = path[:, 1:, None] == jnp.arange(self.nodes.shape[1])
        return Counters(
            self.steps + live,
            self.committed + emitted,
            self.accepted + hit_BD,
            self.nodes + jnp.sum(hit_BD[:, :, None] * on_path_BDN, axis=1, dtype=jnp.int32),
        )


@dataclasses.dataclass(frozen=True)
class Stats:
    """Counts of one or more finished texts, on the host.

    Attributes:
      steps: target forwards after prefill.
      committed: tokens they emitted.
      accepted_by_depth: int `[D]`.
      accepted_by_node: int `[N]`, root included (always 0 there).
      sizes: target forwards by number of candidates; of an open drafter there may be several.
    """

    steps: int
    committed: int
    accepted_by_depth: np.ndarray
    accepted_by_node: np.ndarray
    sizes: Mapping[int, int] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, counters: Counters, row: int | slice = slice(None)) -> "Stats":
        """Sums of the chosen batch rows."""
        pick = slice(row, row + 1) if isinstance(row, int) else row
        steps, committed = (int(np.asarray(x)[pick].sum()) for x in (counters.steps, counters.committed))
        return cls(
            steps,
            committed,
            np.asarray(counters.accepted)[pick].sum(axis=0),
            np.asarray(counters.nodes)[pick].sum(axis=0),
            {counters.nodes.shape[1] - 1: steps},
        )

    def cut(self, runs: Sequence[Sequence[int]]) -> "Stats":
        """Of a text that was ended before its last steps: the counts of the steps that made what is left.

        Counts of single nodes stay: no text tells which branch of a tree it came from. Nor does one tell how large the
        tree of a step was: of several sizes the shares stay.

        Args:
          runs: who wrote each token that is left, in runs of steps between tokens that no step chose, as the first.
        """
        by = np.concatenate([np.zeros(0, np.int64), *runs]).astype(np.int64)
        depths = np.arange(1, len(self.accepted_by_depth) + 1)
        # Every step but one that was cut short ends with a token of the target.
        steps = int(np.sum(by == 0)) + sum(bool(len(run) and run[-1]) for run in runs)
        usual = max(self.sizes, key=self.sizes.__getitem__, default=0)
        sizes = {size: round(of * steps / self.steps) for size, of in self.sizes.items() if size != usual}
        sizes = {usual: steps - sum(sizes.values()), **sizes} if self.sizes else {}
        return dataclasses.replace(
            self, steps=steps, committed=len(by), accepted_by_depth=np.sum(by[:, None] == depths, axis=0), sizes=sizes
        )

    @classmethod
    def total(cls, parts: Sequence["Stats"]) -> "Stats":
        """Of all; trees of different sizes, as an open drafter has them, count as the largest with idle places."""
        sizes: collections.Counter = collections.Counter()
        for part in parts:
            sizes.update(part.sizes)
        return cls(
            sum(part.steps for part in parts),
            sum(part.committed for part in parts),
            _added([part.accepted_by_depth for part in parts]),
            _added([part.accepted_by_node for part in parts]),
            {size: steps for size, steps in sizes.items() if steps > 0},
        )

    def __add__(self, other: "Stats") -> "Stats":
        """Of both."""
        return Stats.total([self, other])

    @property
    def acceptance_length(self) -> float:
        """Tokens per target forward; 1.0 when no forward was needed."""
        return self.committed / self.steps if self.steps else 1.0

    @property
    def conditional_acceptance(self) -> np.ndarray:
        """Float `[D]`: acceptance at depth d among steps that reached it; nan where none did."""
        reached = np.concatenate([[self.steps], self.accepted_by_depth])[:-1]
        return np.where(reached > 0, self.accepted_by_depth / np.maximum(reached, 1), np.nan)

    @property
    def histogram(self) -> np.ndarray:
        """Int `[D + 1]`: steps that accepted exactly n drafts."""
        at_least = np.concatenate([[self.steps], self.accepted_by_depth, [0]])
        return at_least[:-1] - at_least[1:]

    def line(self) -> str:
        """One line for people; depths that no step reached are left out."""
        by_depth = " ".join(f"{x:.2f}" for x in self.conditional_acceptance if not np.isnan(x))
        text = (
            f"{self.committed} tokens in {self.steps} target forwards, acceptance length {self.acceptance_length:.2f}"
        )
        return text + (f", conditional acceptance by depth {by_depth}" if by_depth else "")


def _added(counts: Sequence[np.ndarray]) -> np.ndarray:
    """The sum, as if the shorter ones went on with zeros."""
    longest = max(counts, key=len)
    total = np.zeros_like(longest)
    for count in counts:
        total[: len(count)] += count
    return total
