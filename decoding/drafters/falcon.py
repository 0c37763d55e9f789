"""Falcon's drafter: a pass of the network guesses the k tokens behind a block, for all paths inside the block at once.

Depth d of a tree belongs to pass ceil(d / k), at block position (d - 1) mod k. The first pass reads the block of the
last k true pairs, the root's among them. All candidates at one of its positions are offered by one distribution,
whatever stands before them in the block; only the next pass tells paths apart: for each candidate of depth p k that
goes on it reads a block of its last k tokens, paired with the k outputs of the block above it.

The keys and values kept from step to step are of *true* pairs alone, at slot k - 1 + p the target's feature at p with
the token at p + 1; the slots before them stay empty. The pairs of a block see each other both ways, so behind the first
layer what is kept of a pair depends on where blocks begin, and decoding lines them up with the end of the text, which
may be anywhere. So every way to cut a text into blocks has a copy of the cache, side by side in the slots; a step reads
the one whose blocks end where the text does. Pairs of the last k - 1 places are read again when more become text, until
their blocks are whole in every copy; what the LSTM made of them is kept for that. A single layer needs but one copy.
"""

import dataclasses
import functools
from typing import ClassVar

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from decoding.cache import commit, init_cache
from decoding.drafters.head_drafter import last_feature
from decoding.drafters.network_drafter import NetworkDrafter, TrainedNetwork
from decoding.policies import Scores, Static, TreePolicy
from decoding.sampling import best_tokens
from decoding.trees import FALCON_165
from models import transformer
from models.attention import Rows, Sources
from models.heads import vocabulary
from models.heads.falcon import FalconHeads, guesses_everywhere
from models.layout import Blocks, Layout, Tree
from models.linear import in_blocks
from models.transformer import Output, Params


@struct.dataclass
class Pass:
    """M blocks that one pass read.

    Attributes:
      rows: per layer keys and values of their pairs, block after block.
      hidden: outputs of their pairs; zeros where there is no pair.
      logits: of these.
      above: the block of each earlier pass that each goes back to.
      states: of a recurrent network, the state behind the last pair of each.
    """

    rows: list[Rows]
    hidden: Float[Array, "B M k H"]
    logits: Float[Array, "B M k W"]
    above: Int[Array, "B M p"]
    states: Float[Array, "B M 4 H"] | None


@struct.dataclass
class Drafted:
    """Scratch of `Network`: passes; of every slot its token, its parent, and the block that says what follows it."""

    passes: tuple[Pass, ...]
    tokens: Int[Array, "B S"]
    parents: Int[Array, "B S"]
    blocks: Int[Array, "B S"]


@struct.dataclass
class Network(TrainedNetwork):
    """Falcon's network in the middle of a text (`decoding.policies.DraftNetwork`)."""

    def begin(self, root, slots):
        """The block of the last k true pairs; see `DraftNetwork`."""
        batch, k = root.shape[0], self.heads.block
        joined_B1H, states = self.heads.join(
            self.params, self.state["feature"][:, None], self.target.lookup(root)[:, None], self.state.get("lstm")
        )
        joined_BkH = jnp.concatenate([self.state["read"], joined_B1H], axis=1)
        layout = self._layout(jnp.arange(-k, 0, dtype=jnp.int32)[None], 1)
        above = jnp.zeros((batch, 1, 0), jnp.int32)
        first = self._pass(joined_BkH, layout, None, above, states)
        empty = jnp.zeros((batch, slots), jnp.int32)
        return self._scores(first.logits[:, :, 0]), Drafted((first,), empty.at[:, 0].set(root), empty, empty)

    def extend(self, scratch, level, at, tokens, parents, seen):
        """A pass where a level ends its blocks, and what the last pass said elsewhere; see `DraftNetwork`."""
        k, (batch, rows) = self.heads.block, tokens.shape
        passes, position = scratch.passes, level % self.heads.block
        above_BM = jnp.take_along_axis(scratch.blocks, parents, axis=1)
        own_BM = above_BM if position else jnp.broadcast_to(jnp.arange(rows, dtype=jnp.int32), (batch, rows))
        scratch = Drafted(
            passes,
            *(
                buffer.at[:, at : at + rows].set(values)
                for buffer, values in zip(
                    (scratch.tokens, scratch.parents, scratch.blocks), (tokens, parents, own_BM), strict=True
                )
            ),
        )
        if position:
            return self._scores(passes[-1].logits[:, :, position], own_BM), scratch
        path = [tokens]
        for _ in range(k - 1):
            path.insert(0, jnp.take_along_axis(scratch.tokens, parents, axis=1))
            parents = jnp.take_along_axis(scratch.parents, parents, axis=1)
        block = self._block(passes, jnp.stack(path, axis=2), above_BM, level)
        return self._scores(block.logits[:, :, 0]), dataclasses.replace(scratch, passes=(*passes, block))

    def _scores(self, logits: Float[Array, "B P W"], row: Int[Array, "#B M"] | None = None) -> Scores:
        return Scores(logits, row, self.heads.vocabulary(self.params))

    def _block(self, passes, tokens_BMk, above_BM, level) -> Pass:
        """M blocks of drafted pairs, of depths `level` - k + 1 to `level`, each below one block of the last pass."""
        last, k = passes[-1], self.heads.block
        batch, count, _ = tokens_BMk.shape

        def of_parent(values):
            return jnp.take_along_axis(values, above_BM.reshape(batch, count, *(1,) * (values.ndim - 2)), axis=1)

        exists_B1k1 = self._exists()[:, None, :, None]
        embedding = jnp.where(exists_B1k1, self.target.lookup(tokens_BMk), 0)
        feature, embedding = (x.reshape(batch * count, k, -1) for x in (of_parent(last.hidden), embedding))
        before = None if last.states is None else of_parent(last.states).reshape(batch * count, 4, -1)
        joined, states = self.heads.join(self.params, feature, embedding, before)
        above_BMp = jnp.concatenate([of_parent(last.above), above_BM[:, :, None]], axis=2)

        seen = []
        for p, earlier in enumerate(passes):
            is_above = above_BMp[:, :, p, None] == jnp.arange(earlier.above.shape[1], dtype=jnp.int32)
            of_pairs = jnp.repeat(is_above, k, axis=2) & jnp.tile(self._exists(), (1, earlier.above.shape[1]))[:, None]
            seen.append(jnp.repeat(of_pairs, k, axis=1))
        seen_BTR = jnp.concatenate(seen, axis=2)
        layout = dataclasses.replace(
            self._layout(jnp.arange(level - k, level, dtype=jnp.int32)[None], count),
            scratch_seen=seen_BTR,
            scratch_positions=jnp.zeros((batch, seen_BTR.shape[2]), jnp.int32),
        )
        scratch = [
            {name: jnp.concatenate([x[name] for x in layer], axis=axis) for name, axis in (("k", 3), ("v", 2))}
            for layer in zip(*(earlier.rows for earlier in passes), strict=True)
        ]
        states = None if states is None else states.reshape(batch, count, k, 4, -1)[:, :, -1]
        return self._pass(joined.reshape(batch, count * k, -1), layout, scratch, above_BMp, states)

    def _pass(self, joined_BTH, layout, scratch, above_BMp, states) -> Pass:
        config, params = self.target.config, self.target.params
        hidden, rows = self.heads.run(config, self.params, joined_BTH, layout, Sources(self.state["cache"], scratch))
        hidden = hidden.reshape(len(hidden), -1, self.heads.block, hidden.shape[2])
        hidden = jnp.where(self._exists()[:, None, :, None], hidden, 0)
        logits = self.heads.logits(config, self.params, params, hidden)
        return Pass(rows, hidden, logits, above_BMp, states)

    def _layout(self, ahead_1k, count: int) -> Layout:
        """For `count` blocks whose pairs stand `ahead` of the root; they see the true blocks before the last."""
        positions_BT = jnp.tile(self.target.length[:, None] + ahead_1k, (1, count))
        since_B, length_B = _copy_of(self.heads, self.state["cache"], self.target.length), self.target.length
        return Layout(
            positions_BT,
            (since_B - (self.heads.block - 1) + length_B - 1)[:, None],
            Blocks(self.heads.block),
            segments=jnp.tile(self._exists().astype(jnp.int32), (1, count)),
            since=since_B[:, None],
        )

    def _exists(self) -> Bool[Array, "B k"]:
        """Which pairs of a block there are: a text of fewer than k tokens has no whole block."""
        k = self.heads.block
        return self.target.length[:, None] - k + jnp.arange(k, dtype=jnp.int32) >= 0


def _copies(heads: FalconHeads) -> int:
    """Copies of the cache."""
    return heads.block if heads.layers > 1 else 1


def _copy_of(heads: FalconHeads, cache, length: Int[Array, "B"]) -> Int[Array, "B"]:
    """The first slot for pairs in the copy whose blocks end with pair `length` - 1."""
    slots = cache[0]["v"].shape[2] // _copies(heads)
    return -length % _copies(heads) * slots + heads.block - 1


@dataclasses.dataclass(frozen=True)
class Falcon(NetworkDrafter):
    """Falcon, by default with the tree of 165 candidates in four passes that was published for k = 2.

    Attributes:
      heads: shape of the network.
      policy: how its guesses make a tree.
    """

    heads: FalconHeads = dataclasses.field(default_factory=FalconHeads)
    policy: TreePolicy = dataclasses.field(default_factory=functools.partial(Static, FALCON_165, "without"))
    name: ClassVar[str] = "falcon"
    taps: ClassVar[tuple[str, ...]] = ("post_norm",)

    def outputs(self, config):
        return self.heads.outputs(config)

    @property
    def blind(self) -> int:
        return self.heads.block

    def check(self, config):
        self.heads.check(config)
        super().check(config)

    def init_params(self, config, target, key):
        return self.heads.init(config, target, key)

    def for_decoding(self, params, mesh=None):
        layers = transformer.for_decoding({"layers": params["layers"]}, mesh)["layers"]
        rest = {name: part for name, part in params.items() if name != "layers"}
        return {**(rest if mesh is not None else transformer.map_kernels(in_blocks, rest)), "layers": layers}

    def init(self, config, batch, capacity, dtype, mesh=None):
        """`feature` `[B, H]` of the last committed token; `read` `[B, k - 1, H]`, what the LSTM made of the last pairs
        before it; `lstm` `[B, 4, H]` its state behind them, if it is recurrent; the `cache` of all of them."""
        k, own = self.heads.block, self.heads.layer_config(config)
        state = {
            "feature": jnp.zeros((batch, config.width), dtype),
            "read": jnp.zeros((batch, k - 1, config.width), dtype),
            "cache": init_cache(own, batch, _copies(self.heads) * (capacity + k - 1), dtype, mesh=mesh),
        }
        return state | ({"lstm": jnp.zeros((batch, 4, config.width), dtype)} if self.heads.recurrent else {})

    def ingest(self, params, target, state, rows):
        heads, feature_BRH = self.heads, rows.taps["post_norm"]
        R, k, copies = feature_BRH.shape[1], heads.block, _copies(heads)
        # Row i holds the feature at start - 1 + i and the token after it. A text's first token follows no feature:
        # where it is among the rows, they begin one pair further on.
        begins_B1 = (rows.start.length == 0)[:, None]
        before_BRH = jnp.concatenate([state["feature"][:, None], feature_BRH[:, :-1]], axis=1)
        paired_BRH = jnp.where(begins_B1[:, :, None], feature_BRH, before_BRH)
        tokens_BR = jnp.where(begins_B1, jnp.roll(rows.tokens, -1, axis=1), rows.tokens)
        first_B = jnp.maximum(rows.start.length - 1, 0)
        new_B1 = jnp.maximum(jnp.where(begins_B1, rows.count[:, None] - 1, rows.count[:, None]), 0)
        joined_BRH, states = heads.join(params, paired_BRH, target.lookup(tokens_BR), state.get("lstm"))
        joined_BTH = jnp.concatenate([state["read"], joined_BRH.astype(state["read"].dtype)], axis=1)

        # In every copy the pairs of the last k - 1 places, then the new ones.
        row_T = jnp.arange(k - 1 + R, dtype=jnp.int32)
        pair_BT = first_B[:, None] - (k - 1) + row_T
        exists_BT = (pair_BT >= 0) & (row_T < k - 1 + new_B1)
        slots = state["cache"][0]["v"].shape[2] // copies
        copy_T = jnp.repeat(jnp.arange(copies, dtype=jnp.int32), len(row_T))
        block_BT = (jnp.tile(pair_BT, (1, copies)) + copy_T) // k
        ordered_BTT = (block_BT[:, None, :] <= block_BT[:, :, None]) & (copy_T == copy_T[:, None])
        layout = Layout(
            jnp.tile(pair_BT, (1, copies)),
            copy_T * slots + first_B[:, None],
            Tree(ordered_BTT),
            segments=jnp.tile(exists_BT.astype(jnp.int32), (1, copies)),
            since=jnp.broadcast_to(copy_T * slots + k - 1, block_BT.shape),
        )
        joined_BTH_all = jnp.tile(joined_BTH, (1, copies, 1))
        hidden, fresh = heads.run(target.config, params, joined_BTH_all, layout, Sources(state["cache"]))
        cache = state["cache"]
        for copy in range(copies):
            part = slice(copy * len(row_T), (copy + 1) * len(row_T))
            # A single layer reads no cache for the keys and values it makes, and its outputs are for nothing.
            after = hidden[:, 0] if copies > 1 else None
            cache = commit(cache, _true_rows(fresh, part, exists_BT), None, copy * slots + first_B, after)
        kept_BR = new_B1 + jnp.arange(k - 1, dtype=jnp.int32)
        kept = {
            "feature": last_feature(state["feature"], feature_BRH, rows.count),
            "read": jnp.take_along_axis(joined_BTH, kept_BR[:, :, None], axis=1),
            "cache": cache,
        }
        if states is None:
            return kept
        behind = jnp.concatenate([state["lstm"][:, None], states.astype(state["lstm"].dtype)], axis=1)
        return {**kept, "lstm": jnp.take_along_axis(behind, new_B1[:, :, None, None], axis=1)[:, 0]}

    def network(self, params, target, state):
        """The network in the middle of the text."""
        return Network(self.heads, params, target, state)

    def teacher_forced(
        self, config, target: Params, params: Params, tokens: Int[Array, "B T"], output: Output, depth: int
    ) -> list[Float[Array, "B T H"]]:
        """What is drafted from everywhere in true texts (see `decoding/replay.py`)."""
        batch, length = tokens.shape
        padded = jnp.pad(tokens, ((0, 0), (0, depth)))
        embeddings = [transformer.lookup(target, padded[:, 1 + i : 1 + i + length]) for i in range(depth)]
        layout = Layout.causal(batch, length)
        return guesses_everywhere(self.heads, config, params, output.hidden, embeddings, layout, depth)

    def ranked(
        self, config, target: Params, params: Params, i: int, hidden: Float[Array, "*B H"], count: int
    ) -> Int[Array, "*B K"]:
        """The `count` best guesses that such an output stands for, best first."""
        best = best_tokens(self.heads.logits(config, params, target, hidden), count)
        return vocabulary.tokens_of(self.heads.vocabulary(params), best)


def _true_rows(fresh: list[Rows], part: slice, exists_BT: Bool[Array, "B T"]) -> list[Rows]:
    """Rows of one copy; zeros where they are no text, so that the state is a function of the text alone."""
    return [
        {
            "k": jnp.where(exists_BT[:, None, None, :], layer["k"][:, :, :, part], 0),
            "v": jnp.where(exists_BT[:, None, :, None], layer["v"][:, :, part], 0),
        }
        for layer in fresh
    ]
