"""P-EAGLE's drafter: one pass over the pair that ends in the root, and masks behind it, scores all depths of a tree.

The network says of every depth what may stand there, whatever stands before: all candidates of a level share one
distribution. Everything else is as in EAGLE (`decoding/drafters/eagle.py`): keys and values are kept of true pairs
alone, in every layer, and masks leave nothing behind.
"""

import dataclasses
import functools
from typing import ClassVar

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from decoding.cache import init_cache
from decoding.drafters.eagle import EagleDrafter, TruePairs
from decoding.drafters.head_drafter import last_feature
from decoding.drafters.network_drafter import TrainedNetwork
from decoding.policies import Scores, Static, TreePolicy
from decoding.trees import chain
from models import transformer
from models.attention import Sources
from models.heads.p_eagle import PEagleHeads, every_rollout
from models.layout import Layout
from models.linear import in_blocks
from models.transformer import Output, Params

DEPTH = 7  # Of the chain that it drafts unless told otherwise.


@struct.dataclass
class Network(TrainedNetwork):
    """The layers as a draft network (`decoding.policies.DraftNetwork`), whose scratch is what it says of every depth.

    Attributes:
      depth: levels of the tree.
    """

    depth: int = struct.field(pytree_node=False)

    def begin(self, root, slots):
        """The one pass; see `DraftNetwork`."""
        heads, config, target, batch = self.heads, self.target.config, self.target, root.shape[0]
        feature, embedding = heads.masks(config, self.params, batch, self.depth - 1)
        root_BH = heads.lookup(self.params, target.params, root)
        feature = jnp.concatenate([self.state["feature"][:, None], feature], axis=1)
        embedding = jnp.concatenate([root_BH[:, None], embedding], axis=1)
        layout = Layout.extend(target.length - 1, self.depth)
        prefix = Sources(self.state["cache"])
        hidden, _ = heads.run_layers(config, self.params, feature, embedding, layout, prefix)
        logits_BEW = heads.logits(config, self.params, target.params, hidden)
        return self._level(logits_BEW, 0, 1), logits_BEW

    def extend(self, scratch, level, at, tokens, parents, seen):
        """What the pass said of the level; see `DraftNetwork`."""
        return self._level(scratch, level, tokens.shape[1]), scratch

    def _level(self, logits_BEW: Float[Array, "B E W"], level: int, rows: int) -> Scores:
        one = jnp.zeros((1, rows), jnp.int32)
        return Scores(logits_BEW[:, level : level + 1], one, self.heads.vocabulary(self.params))


@dataclasses.dataclass(frozen=True)
class PEagle(EagleDrafter):
    """P-EAGLE; by default it drafts a chain of its best guesses, as released."""

    heads: PEagleHeads
    policy: TreePolicy = dataclasses.field(default_factory=functools.partial(Static, chain(DEPTH), "top"))
    name: ClassVar[str] = "p_eagle"

    @property
    def blind(self) -> int:
        return self.policy.max_depth

    def for_decoding(self, params, mesh=None):
        layers = transformer.for_decoding({"layers": [params["layer"], *params["blocks"]]}, mesh)["layers"]
        rest = {name: part for name, part in params.items() if name not in ("layer", "blocks")}
        rest = rest if mesh is not None else transformer.map_kernels(in_blocks, rest)
        return {**rest, "layer": layers[0], "blocks": layers[1:]}

    def init(self, config, batch, capacity, dtype, mesh=None):
        """`feature` `[B, H]` of the last committed token, and a `cache` of the pairs before it."""
        own, layers = self.heads.layer_config(config), self.heads.num_layers
        return {
            "feature": jnp.zeros((batch, config.width), dtype),
            "cache": init_cache(own, batch, capacity, dtype, layers=layers, mesh=mesh),
        }

    def ingest(self, params, target, state, rows):
        feature_BRH = self.heads.fuse(target.config, params, rows.taps)
        pairs = TruePairs.of(state["feature"], feature_BRH, rows)
        embedding = self.heads.lookup(params, target.params, pairs.tokens)
        hidden_BRH, fresh = self.heads.run_layers(
            target.config, params, pairs.features, embedding, pairs.layout, Sources(state["cache"])
        )
        return {
            "feature": last_feature(state["feature"], feature_BRH, rows.count),
            "cache": pairs.commit(state["cache"], fresh, after=hidden_BRH[:, 0]),
        }

    def network(self, params, target, state):
        """The layers in the middle of the text."""
        return Network(self.heads, params, target, state, self.policy.max_depth)

    def teacher_forced(
        self, config, target: Params, params: Params, tokens: Int[Array, "B T"], output: Output, depth: int
    ) -> list[Float[Array, "B T H"]]:
        """What the network says, at every place of true texts, of the first `depth` tokens after the next."""
        batch, length = tokens.shape
        ahead = jnp.pad(tokens, ((0, 0), (0, 1)))[:, 1:]
        embedding, layout = self.heads.lookup(params, target, ahead), Layout.causal(batch, length)
        feature = self.heads.fuse(config, params, output.taps)
        hidden, rows = self.heads.run_layers(config, params, feature, embedding, layout)
        if depth == 1:
            return [hidden]
        rollouts = every_rollout(batch, length, depth - 1)
        return [hidden, *self.heads.roll_out(config, params, rows, layout, rollouts)]
