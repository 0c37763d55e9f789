"""EAGLE's drafters: one layer continues the target's features token by token, and a policy makes a tree of that.

The keys and values kept from step to step are of *true* pairs alone: at slot p the target's feature at p with the token
at p + 1. The feature of the last committed token waits for its token, the root, with which drafting begins. Everything
drafted lies in scratch rows and is dropped: `ingest` runs the layer again over what became text, with the target's
features in place of the layer's own (EAGLE-1, section 3.1).
"""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from decoding.cache import commit, init_cache
from decoding.drafter import TrueRows
from decoding.drafters.head_drafter import last_feature
from decoding.drafters.network_drafter import NetworkDrafter, TrainedNetwork
from decoding.policies import Confidence, Scores, Static, TreePolicy
from decoding.policies.scratch import Scratch
from decoding.sampling import best_tokens
from decoding.trees import EAGLE_25
from models import transformer
from models.attention import Rows, Sources
from models.heads import vocabulary
from models.heads.eagle import Eagle3Heads, EagleHeads, unroll
from models.layout import Layout
from models.linear import in_blocks
from models.transformer import Cache, Output, Params


@struct.dataclass
class Drafted:
    """Scratch of `Network`: keys and values of the slots, and their outputs."""

    scratch: Scratch
    hidden: Float[Array, "B S H"]

    def write(self, rows, hidden, positions, at: int) -> "Drafted":
        """With the rows of M pairs in the slots from `at` on."""
        buffer = jax.lax.dynamic_update_slice_in_dim(self.hidden, hidden.astype(self.hidden.dtype), at, axis=1)
        return Drafted(self.scratch.write([rows], positions, at), buffer)


@struct.dataclass
class Network(TrainedNetwork):
    """EAGLE's layer as a draft network; a slot is the pair that ends in its token."""

    def begin(self, root, slots):
        """The true pair of the last committed feature and the root; see `DraftNetwork`."""
        pairs = self.target.length - 1
        feature_BH = self.state["feature"]
        layout = Layout.extend(pairs, 1)
        scores, hidden, rows = self._run(root[:, None], feature_BH[:, None], layout, None)
        batch, width = feature_BH.shape
        scratch = Scratch.empty(self.heads.layer_config(self.target.config), batch, slots, feature_BH.dtype, layers=1)
        drafted = Drafted(scratch, jnp.zeros((batch, slots, width), feature_BH.dtype))
        return scores, drafted.write(rows, hidden, layout.positions, 0)

    def extend(self, scratch, level, at, tokens, parents, seen):
        """Every candidate with its parent's output in the place of a feature; see `DraftNetwork`."""
        pairs = self.target.length - 1
        positions_BM = jnp.broadcast_to((pairs + level)[:, None], tokens.shape)
        feature_BMH = jnp.take_along_axis(scratch.hidden, parents[:, :, None], axis=1)
        layout = scratch.scratch.layout(positions_BM, pairs, seen)
        scores, hidden, rows = self._run(tokens, feature_BMH, layout, scratch.scratch.rows[0])
        return scores, scratch.write(rows, hidden, positions_BM, at)

    def _run(self, tokens, feature, layout, scratch):
        config, target = self.target.config, self.target
        embedding, prefix = target.lookup(tokens), self.state["cache"][0]
        hidden, rows = self.heads.run(config, self.params, feature, embedding, layout, Sources(prefix, scratch))
        logits = self.heads.logits(config, self.params, target.params, hidden)
        return Scores(logits, tokens=self.heads.vocabulary(self.params)), hidden, rows


@struct.dataclass
class TruePairs:
    """Rows of text as a network reads them, each token with the feature before it.

    Attributes:
      features: of the tokens before.
      tokens: those of the pairs.
      slots: pairs that are in the cache already.
      layout: of the pairs.
      true: which of them are text.
    """

    features: Float[Array, "B R H"]
    tokens: Int[Array, "B R"]
    slots: Int[Array, "B"]
    layout: Layout
    true: Bool[Array, "B R"]

    @classmethod
    def of(cls, waiting: Float[Array, "B H"], features: Float[Array, "B R H"], rows: TrueRows) -> "TruePairs":
        """Row i holds the feature at start - 1 + i, the first of which has been `waiting`, and the token after it."""
        # A text's first token follows no feature: where it is among the rows, they begin one pair further on.
        begins_B1 = (rows.start.length == 0)[:, None]
        before_BRH = jnp.concatenate([waiting[:, None], features[:, :-1]], axis=1)
        paired_BRH = jnp.where(begins_B1[:, :, None], features, before_BRH)
        tokens_BR = jnp.where(begins_B1, jnp.roll(rows.tokens, -1, axis=1), rows.tokens)
        first = jnp.maximum(rows.start.length - 1, 0)
        R = features.shape[1]
        true_BR = jnp.arange(R) < jnp.where(begins_B1[:, 0], rows.count - 1, rows.count)[:, None]
        return cls(paired_BRH, tokens_BR, first, Layout.extend(first, R), true_BR)

    def commit(self, cache: Cache, fresh: list[Rows], after: Float[Array, "B H"]) -> Cache:
        """The cache with the pairs' keys and values in it; `after` as in `decoding.cache.commit`."""
        # Rows that are not text leave zeros, so that the state is a function of the text alone, unused slots included.
        masks = {"k": self.true[:, None, None, :], "v": self.true[:, None, :, None]}
        cleared = [{name: jnp.where(masks[name], row, 0) for name, row in layer.items()} for layer in fresh]
        return commit(cache, cleared, None, self.slots, after=after)


@dataclasses.dataclass(frozen=True)
class EagleDrafter(NetworkDrafter):
    """What `Eagle` and `Eagle3` share: a network and a policy.

    Attributes:
      heads: shape of the network.
      policy: how its guesses make a tree.
    """

    heads: EagleHeads | Eagle3Heads
    policy: TreePolicy

    @property
    def taps(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.heads.taps

    def outputs(self, config):
        return self.heads.outputs(config)

    def check(self, config):
        self.heads.check(config)
        super().check(config)

    def init_params(self, config, target, key):
        return self.heads.init(config, target, key)

    def for_decoding(self, params, mesh=None):
        layer = transformer.for_decoding({"layers": [params["layer"]]}, mesh)["layers"][0]
        rest = {name: part for name, part in params.items() if name != "layer"}
        return {**(rest if mesh is not None else transformer.map_kernels(in_blocks, rest)), "layer": layer}

    def init(self, config, batch, capacity, dtype, mesh=None):
        """`feature` `[B, H]` of the last committed token, and a one-layer `cache` of the pairs before it."""
        return {
            "feature": jnp.zeros((batch, config.width), dtype),
            "cache": init_cache(self.heads.layer_config(config), batch, capacity, dtype, layers=1, mesh=mesh),
        }

    def ingest(self, params, target, state, rows):
        feature_BRH = self.heads.fuse(target.config, params, rows.taps)
        pairs = TruePairs.of(state["feature"], feature_BRH, rows)
        _, fresh = self.heads.run(
            target.config,
            params,
            pairs.features,
            target.lookup(pairs.tokens),
            pairs.layout,
            Sources(state["cache"][0]),
        )
        return {
            "feature": last_feature(state["feature"], feature_BRH, rows.count),
            "cache": pairs.commit(state["cache"], [fresh], after=feature_BRH[:, 0]),
        }

    def network(self, params, target, state):
        """The layer in the middle of the text."""
        return Network(self.heads, params, target, state)

    def teacher_forced(
        self, config, target: Params, params: Params, tokens: Int[Array, "B T"], output: Output, depth: int
    ) -> list[Float[Array, "B T H"]]:
        """The network's outputs at the first `depth` steps of drafts that begin everywhere in true texts."""
        batch, length = tokens.shape
        padded = jnp.pad(tokens, ((0, 0), (0, depth)))
        embeddings = [transformer.lookup(target, padded[:, 1 + k : 1 + k + length]) for k in range(depth)]
        feature = self.heads.fuse(config, params, output.taps)
        return unroll(self.heads, config, params, feature, embeddings, Layout.causal(batch, length))

    def ranked(
        self, config, target: Params, params: Params, i: int, hidden: Float[Array, "*B H"], count: int
    ) -> Int[Array, "*B K"]:
        """The `count` best guesses that an output of step i stands for, best first."""
        best = best_tokens(self.heads.logits(config, params, target, hidden), count)
        return vocabulary.tokens_of(self.heads.vocabulary(params), best)


@dataclasses.dataclass(frozen=True)
class Eagle(EagleDrafter):
    """EAGLE-1 with its static tree; EAGLE-2 is the same network grown by `Confidence`."""

    heads: EagleHeads = dataclasses.field(default_factory=EagleHeads)
    policy: TreePolicy = dataclasses.field(default_factory=functools.partial(Static, EAGLE_25, "top"))
    name: ClassVar[str] = "eagle"


@dataclasses.dataclass(frozen=True)
class Eagle3(EagleDrafter):
    """EAGLE-3, grown by `Confidence` as released."""

    heads: Eagle3Heads
    policy: TreePolicy = dataclasses.field(default_factory=Confidence)
    name: ClassVar[str] = "eagle3"
