"""What drafters made of a draft network share: the network scores, a growth makes the tree and decides its law."""

import dataclasses
from typing import Any

from decoding.drafter import Drafter, TargetView
from decoding.growth import DraftNetwork, Growth, Static
from decoding.trees import Topology


class GrowthDrafter(Drafter):
    """A draft network with a growth; subclasses are dataclasses that have the latter as a field.

    Attributes:
      growth: how the network's guesses make a tree.
    """

    growth: Growth

    @property
    def max_nodes(self) -> int:
        return self.growth.max_nodes

    @property
    def max_depth(self) -> int:
        return self.growth.max_depth

    @property
    def tree(self) -> Topology | None:
        """The tree, where it is static and holds the best guesses."""
        return self.growth.tree if isinstance(self.growth, Static) and self.growth.draws == "top" else None

    def with_tree(self, tree: Topology) -> "GrowthDrafter":
        """The same network with a static tree of its best guesses."""
        return dataclasses.replace(self, growth=Static(tree, "top"))  # type: ignore[type-var]

    def law(self, greedy):
        return self.growth.law(greedy)

    def check(self, config):
        self.growth.check(config.vocab_size)

    def network(self, params, target: TargetView, state: Any) -> DraftNetwork:
        """The network in the middle of the text."""
        raise AttributeError(f"{type(self).__name__} must define network")

    def draft(self, params, target, state, root, keys):
        return self.growth.grow(self.network(params, target, state), root, keys, target.warps).tree, None
