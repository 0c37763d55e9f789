"""Tree policies by the names of their papers, each with the way in which its trees are fitted to a budget.

`Static` trees differ in how the topology is chosen and how candidates are; what grows them is the same. So a published
way of choosing is a subclass that only answers `with_budget`, with a plain `Static`.
"""

import dataclasses

from decoding.policies.confidence import Confidence
from decoding.policies.dyspec import DySpec
from decoding.policies.policy import TreePolicy
from decoding.policies.rsd import StochasticBeam
from decoding.policies.static import Static
from decoding.tree_search import NETWORK_DEPTH, RANKS, branching_tree, sequoia_tree
from decoding.trees import Topology, chain

LONGEST_CHAIN = 16


@dataclasses.dataclass(frozen=True)
class Chain(Static):
    """A single path of drawn candidates: speculative decoding as first published (Leviathan et al. 2023)."""

    def probing(self):
        return None

    def best(self, candidates, acceptance):
        return chain(candidates) if candidates <= LONGEST_CHAIN else None


@dataclasses.dataclass(frozen=True)
class Sequoia(Static):
    """The tree with the most expected tokens if ranks alone matter (Chen et al. 2024)."""

    def best(self, candidates, acceptance):
        return sequoia_tree(acceptance, candidates, NETWORK_DEPTH)


@dataclasses.dataclass(frozen=True)
class ConstantBranching(Static):
    """RSD-C: as many children everywhere on a level (Jeon et al. 2024)."""

    def best(self, candidates, acceptance) -> Topology | None:
        return branching_tree(acceptance, candidates, NETWORK_DEPTH, RANKS)


# The best guesses in the best static tree, the dynamic tree by confidence (EAGLE-2), and those that draw candidates
# from the network's distribution when there is a temperature, EAGLE-1 without replacement on its static tree.
PUBLISHED: dict[str, TreePolicy] = {
    "top": Static(draws="top"),
    "eagle-1": Static(draws="without"),
    "confidence": Confidence(),
    "chain": Chain(),
    "specinfer": Static(draws="with"),
    "sequoia": Sequoia(),
    "rsd-c": ConstantBranching(),
    "rsd-s": StochasticBeam(),
    "dyspec": DySpec(width=16, branch=RANKS),
}
