"""A drafter around another one, for what wants to see or change a part of it: all the rest is the inner one's."""

import dataclasses

from decoding.drafter import Drafter


@dataclasses.dataclass(frozen=True)
class Around(Drafter):
    """Does what another drafter does. Its state has that one's as `inner`, beside whatever a subclass adds.

    Attributes:
      inner: the other one.
    """

    inner: Drafter

    @property
    def taps(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.inner.taps

    @property
    def max_nodes(self) -> int:
        return self.inner.max_nodes

    @property
    def max_depth(self) -> int:
        return self.inner.max_depth

    @property
    def num_riders(self) -> int:
        return self.inner.num_riders

    @property
    def ingests(self) -> bool:
        return self.inner.ingests

    @property
    def begins(self) -> bool:
        return self.inner.begins

    def rule(self, greedy):
        return self.inner.rule(greedy)

    def check(self, config):
        self.inner.check(config)

    def init_params(self, config, target, key):
        return self.inner.init_params(config, target, key)

    def for_decoding(self, params, mesh=None):
        return self.inner.for_decoding(params, mesh)

    def init(self, config, batch, capacity, dtype, mesh=None):
        return {"inner": self.inner.init(config, batch, capacity, dtype, mesh)}

    def ingest(self, params, target, state, rows):
        return {**state, "inner": self.inner.ingest(params, target, state["inner"], rows)}

    def begin(self, params, target, state):
        return {**state, "inner": self.inner.begin(params, target, state["inner"])}

    def draft(self, params, target, state, root, keys):
        return self.inner.draft(params, target, state["inner"], root, keys)

    def riders(self, params, target, state, tree):
        return self.inner.riders(params, target, state["inner"], tree)

    def observe(self, params, target, state, tree, output, verdict, live):
        inner = self.inner.observe(params, target, state["inner"], tree, output, verdict, live)
        return {**state, "inner": inner}
