"""What drafters that fill one static tree answer alike, whatever fills it."""

import dataclasses

from decoding.drafter import Drafter
from decoding.trees import Topology
from models.errors import UserError


class StaticTreeDrafter(Drafter):
    """A drafter with a field `tree`, the ranks of whose nodes are those of its guesses."""

    tree: Topology

    @property
    def max_nodes(self) -> int:
        return self.tree.size

    @property
    def max_depth(self) -> int:
        return self.tree.max_depth

    @property
    def ranked_tree(self) -> Topology:
        return self.tree

    def with_tree(self, tree: Topology) -> "StaticTreeDrafter":
        return dataclasses.replace(self, tree=tree)  # type: ignore[type-var]

    def check(self, config):
        if not self.tree.paths:
            raise UserError(f"the draft tree of {self.name} is empty: it needs at least one candidate")
        self.tree.check(heads=self.num_heads or self.tree.max_depth, vocab_size=config.vocab_size)
