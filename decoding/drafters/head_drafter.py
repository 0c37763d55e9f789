"""What drafters made of draft heads share: heads, a static tree, and the feature at the last committed position."""

import dataclasses
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from decoding.drafter import CostPart
from decoding.drafters.static_tree import StaticTreeDrafter
from decoding.sampling import best_tokens
from decoding.tree_search import probing_tree
from decoding.trees import MC_SIM_7B_63, Topology
from models import transformer
from models.config import TransformerConfig
from models.layout import Layout
from models.transformer import Output, Params


@runtime_checkable
class Heads(Protocol):
    """What a drafter of heads asks of their shape, a frozen dataclass; `models/heads/medusa.py` is the plainest."""

    @property
    def num_heads(self) -> int:
        """How many tokens ahead the last one looks, counted after the root."""

    @property
    def num_layers(self) -> int:
        """Blocks per head."""

    @property
    def prefix(self) -> bool:
        """Whether they read features of their own making, which noise in training leaves alone."""

    def init(self, config: TransformerConfig, target: Params, key: Array) -> Params:
        """Fresh parameters."""

    def features(self, config: TransformerConfig, params: Params, post_norm: Array, layout: Layout) -> Array:
        """What heads read, `[B, T, H]`, of whole texts."""

    def hidden(self, params: Params, i: int, feature: Array, path: Array, dropout_key: Array | None = None) -> Array:
        """What head i's vocabulary map reads, of features `[..., H]` and embedded paths `[..., i + 1, H]`."""

    def vocab(self, params: Params, i: int, hidden: Array) -> Array:
        """Head i's logits."""


@dataclasses.dataclass(frozen=True)
class HeadDrafter(StaticTreeDrafter):
    """Heads with a tree.

    Attributes:
      heads: shape of the heads.
      tree: the candidates; at most as deep as there are heads.
    """

    heads: Heads
    tree: Topology = MC_SIM_7B_63

    def rule(self, greedy):
        return "point"

    def init_params(self, config, target, key):
        return self.heads.init(config, target, key)

    def rows_of_level(self, depth: int) -> int:
        """Rows of a batch row that the head of guesses at `depth` + 1 is evaluated on."""
        return 1

    def cost_parts(self, config, batch):
        """`choice`: for every row of every level, the best candidates among the vocabulary."""
        tree, depths = self.tree, range(self.tree.max_depth)
        counts = [int(tree.rank[tree.level(depth + 1)].max()) + 1 for depth in depths]
        shapes = [(batch, self.rows_of_level(depth), config.vocab_size) for depth in depths]
        logits = [jax.random.normal(jax.random.key(0), shape, jnp.float32) for shape in shapes]

        def choose(params, target, state, root, logits):
            return [best_tokens(scores, count) for scores, count in zip(logits, counts, strict=True)]

        return {"choice": CostPart(choose, logits)}

    def teacher_forced(
        self, config, target: Params, params: Params, tokens: Int[Array, "B T"], output: Output, depth: int
    ) -> list[Float[Array, "B T H"]]:
        """What the first `depth` heads' vocabulary maps read everywhere in true texts (see `decoding/replay.py`)."""
        batch, length = tokens.shape
        feature_BTH = self.heads.features(config, params, output.hidden, Layout.causal(batch, length))
        padded = jnp.pad(tokens, ((0, 0), (0, depth)))
        embeddings = [transformer.lookup(target, padded[:, 1 + i : 1 + i + length]) for i in range(depth)]
        return [self.heads.hidden(params, i, feature_BTH, jnp.stack(embeddings[: i + 1], axis=2)) for i in range(depth)]

    def ranked(
        self, config, target: Params, params: Params, i: int, hidden: Float[Array, "*B H"], count: int
    ) -> Int[Array, "*B K"]:
        """The `count` best guesses of head i, best first."""
        return best_tokens(self.heads.vocab(params, i, hidden), count)

    @property
    def num_heads(self) -> int:
        return self.heads.num_heads

    def probing(self):
        return self.with_tree(probing_tree(self.heads.num_heads))


def last_feature(
    state: Float[Array, "B H"], features: Float[Array, "B R H"], count: Int[Array, "B"]
) -> Float[Array, "B H"]:
    """Feature of the last of `count` true rows; the old state where there are none."""
    last = jnp.maximum(count - 1, 0)[:, None, None]
    newest = jnp.take_along_axis(features, last, axis=1)[:, 0]
    return jnp.where((count > 0)[:, None], newest.astype(state.dtype), state)
