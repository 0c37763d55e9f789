"""What drafters made of a draft network share: the network scores, a policy makes the tree and decides its rule."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from decoding.drafter import CostPart, Drafter, TargetView
from decoding.policies import DraftNetwork, Static, TreePolicy
from decoding.trees import Topology
from models.config import TransformerConfig
from models.transformer import Params


@struct.dataclass
class TrainedNetwork:
    """A network with parameters of its own in the middle of a text (`decoding.policies.DraftNetwork`).

    Attributes:
      heads: shape of the network.
      params: its parameters.
      target: the target before this step.
      state: of the drafter.
    """

    heads: Any = struct.field(pytree_node=False)
    params: Params
    target: TargetView
    state: dict[str, Any]

    @property
    def vocab_size(self) -> int:
        """The target's."""
        return self.target.config.vocab_size


class NetworkDrafter(Drafter):
    """A draft network with a policy; subclasses are dataclasses that have the latter as a field.

    Attributes:
      policy: how the network's guesses make a tree.
    """

    policy: TreePolicy

    @property
    def max_nodes(self) -> int:
        return self.policy.max_nodes

    @property
    def max_depth(self) -> int:
        return self.policy.max_depth

    @property
    def tree_policy(self) -> TreePolicy:
        return self.policy

    @property
    def ranked_tree(self) -> Topology | None:
        return self.policy.ranked_tree

    def with_tree(self, tree: Topology) -> "NetworkDrafter":
        """The same network with a static tree of its best guesses."""
        return dataclasses.replace(self, policy=Static(tree, "top"))  # type: ignore[type-var]

    def rule(self, greedy):
        return self.policy.rule(greedy)

    def outputs(self, config: TransformerConfig) -> int:
        """Tokens that the network's distributions are over."""
        return config.vocab_size

    @property
    def blind(self) -> int:
        """Levels that the network guesses whatever the parents are; 0 where a guess depends on the path."""
        return 0

    @property
    def confident(self) -> bool:
        """Whether the network says how probably a candidate survives verification."""
        return False

    def check(self, config):
        self.policy.check(self.outputs(config))
        self.policy.check_network(self.blind, self.confident)

    def network(self, params, target: TargetView, state: Any) -> DraftNetwork:
        """The network in the middle of the text."""
        raise AttributeError(f"{type(self).__name__} must define network")

    def cost_parts(self, config, batch):
        """`network`: what the policy asks of the network, pass by pass, with nothing chosen between the passes."""
        levels = self.policy.levels
        rng = np.random.default_rng(0)
        inputs = [jnp.asarray(rng.integers(0, config.vocab_size, (batch, rows)), jnp.int32) for rows in levels[1:]]

        def run(params, target, state, root, inputs):
            network = self.network(params, target, state)
            first, scratch = network.begin(root, sum(levels))
            scores, at = [first], levels[0]
            for level, tokens in enumerate(inputs, start=1):
                seen = jnp.zeros((*tokens.shape, sum(levels)), bool).at[:, :, 0].set(True)
                found, scratch = network.extend(scratch, level, at, tokens, jnp.zeros_like(tokens), seen)
                scores.append(found)
                at += tokens.shape[1]
            return jax.tree.leaves(scores)

        return {"network": CostPart(run, inputs)}

    def draft(self, params, target, state, root, keys):
        return self.policy.grow(self.network(params, target, state), root, keys, target.sampling).tree, None

    def uncut(self, params, target, state, root, keys):
        grown, confidence_BD = self.policy.uncut(self.network(params, target, state), root, keys, target.sampling)
        return grown.tree, confidence_BD

    @property
    def topology(self):
        return self.policy.topology

    def with_policy(self, policy):
        return dataclasses.replace(self, policy=policy)  # type: ignore[type-var]

    def probing(self):
        policy = self.policy.probing()
        return None if policy is None else self.with_policy(policy)

    def with_budget(self, candidates, acceptance=None):
        policy = self.policy.with_budget(candidates, acceptance)
        return None if policy is None else self.with_policy(policy)
