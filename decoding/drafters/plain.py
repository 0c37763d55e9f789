"""Plain autoregressive decoding: the drafter that proposes nothing. Every speed-up is measured against it."""

import dataclasses
from typing import ClassVar

from decoding.drafter import Drafter
from decoding.trees import Topology

_ROOT = Topology(())


@dataclasses.dataclass(frozen=True)
class Plain(Drafter):
    """No candidates: one token per target forward."""

    name: ClassVar[str] = "none"
    bare_names: ClassVar[tuple[str, ...]] = ("none",)

    @classmethod
    def from_name(cls, argument):
        return None if argument else cls()

    @property
    def max_nodes(self) -> int:
        return 1

    @property
    def max_depth(self) -> int:
        return 0

    def draft(self, params, target, state, root, keys):
        return _ROOT.fill(root[:, None], self.rule(target.sampling.greedy)), None
