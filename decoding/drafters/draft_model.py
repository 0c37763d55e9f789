"""A smaller transformer as drafter: speculative decoding proper (Leviathan et al. 2023; Chen et al. 2023).

The draft model reads the same text with a cache of its own; how its scores become a tree is the policy's business
(`decoding/policies`), and the policy decides the rule.

Nothing is computed twice: rows that ran while drafting are kept if they turn out to be text. The deepest accepted
candidate may be a leaf, which never ran, and on full acceptance always is (the bonus-token case that chains get wrong
when they forget it). So the last committed token always counts as unread, and each draft begins by reading two rows, it
and the root: the cache of a text of `length` tokens is read up to `length - 1`.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Int

from decoding.cache import commit, init_cache
from decoding.drafters.network_drafter import NetworkDrafter
from decoding.place import Place
from decoding.policies import Scores, Static, TreePolicy
from decoding.policies.scratch import Scratch
from models import transformer
from models.attention import Sources
from models.config import TransformerConfig
from models.errors import UserError
from models.layout import Layout
from models.transformer import Cache, Params


@dataclasses.dataclass(frozen=True)
class DraftModel(NetworkDrafter):
    """Any transformer of the target's vocabulary, or of its beginning: models of one tokenizer are padded differently.

    Attributes:
      model: its shape.
      policy: how it grows a tree.
    """

    model: TransformerConfig
    policy: TreePolicy = dataclasses.field(default_factory=Static)
    name: ClassVar[str] = "draft_model"

    def check(self, config):
        if self.model.vocab_size > config.vocab_size:
            raise UserError(
                f"the draft model has a vocabulary of {self.model.vocab_size}, more than the target's "
                f"{config.vocab_size}: scripts.convert --from model cuts it"
            )
        self.policy.check(self.model.vocab_size)

    def init_params(self, config, target, key):
        return transformer.init(self.model, key, target["embed"]["embedding"].dtype)

    def for_decoding(self, params, mesh=None):
        return transformer.for_decoding(params, mesh)

    def init(self, config, batch, capacity, dtype, mesh=None):
        """The draft model's own cache."""
        return {"cache": init_cache(self.model, batch, capacity, dtype, mesh=mesh)}

    def ingest(self, params, target, state, rows):
        cache, start, tokens = state["cache"], rows.start, rows.tokens
        if rows.source == "target":
            # The last token of its own trees is still unread.
            unread = jnp.take_along_axis(target.text, start.length[:, None] - 1, axis=1)
            start, tokens = start.back(1), jnp.concatenate([unread, tokens], axis=1)
        length = start.length
        if rows.source != "own":
            layout = Layout.extend(length, tokens.shape[1], start.position)
            out = transformer.forward(self.model, params, _known(self.model, tokens), layout, Sources(cache))
            return {"cache": commit(cache, out.rows, None, length, after=out.hidden[:, 0])}
        # Row r of the text is the slot of node r - 1, and the first the token that was unread. What did not run lies
        # behind the accepted rows and is read next time.
        nodes = rows.nodes[:, :-1]
        slots = jnp.take_along_axis(
            jnp.broadcast_to(rows.drafted["slot_of_node"], (nodes.shape[0], self.max_nodes)), nodes, 1
        )
        unread = jnp.full((nodes.shape[0], 1), self.policy.slots, jnp.int32)
        taken = rows.drafted["scratch"].take(jnp.concatenate([unread, jnp.maximum(slots, 0)], axis=1))
        return {"cache": commit(cache, taken, None, length - 1, after=rows.nodes[:, -1:])}

    def network(self, params, target, state):
        """The draft model in the middle of the text."""
        unread = jnp.take_along_axis(target.text, target.length[:, None] - 1, axis=1)
        size = self.model.vocab_size
        vocabulary = None if size == target.config.vocab_size else jnp.arange(size, dtype=jnp.int32)
        return ModelNetwork(
            self.model,
            params,
            state["cache"],
            target.place.back(1),
            unread,
            target.config.vocab_size,
            vocabulary=vocabulary,
        )

    def draft(self, params, target, state, root, keys):
        grown = self.policy.grow(self.network(params, target, state), root, keys, target.sampling)
        return grown.tree, {"scratch": grown.scratch, "slot_of_node": grown.slot_of_node}


@struct.dataclass
class ModelNetwork:
    """A transformer, or its first layers, as a draft network (`decoding.policies.DraftNetwork`).

    Attributes:
      config: its shape.
      params: its parameters, layers as a list.
      cache: keys and values of the text; those of the first layers may be the target's own.
      place: behind the text that the cache holds; its slots are those of the target, for positions alone.
      unread: `[B, U]`, the text between cache and root; U may be 0. These rows take the scratch's last slots.
      layers: how many run; None means all.
      vocab_size: V, of the target.
      vocabulary: target tokens of its outputs; None where they are all the target has.
    """

    config: TransformerConfig = struct.field(pytree_node=False)
    params: Params
    cache: Cache
    place: Place
    unread: Int[Array, "B U"]
    vocab_size: int = struct.field(pytree_node=False)
    layers: int | None = struct.field(pytree_node=False, default=None)
    vocabulary: Int[Array, "W"] | None = None

    def begin(self, root, slots):
        """See `DraftNetwork`."""
        batch, unread = self.unread.shape
        layout = Layout.extend(self.place.length, unread + 1, self.place.position)
        out = self._forward(jnp.concatenate([self.unread, root[:, None]], axis=1), layout, None)
        dtype = self.cache[0]["k"].dtype
        scratch = Scratch.empty(self.config, batch, slots + unread, dtype, self.layers)
        # The root goes first and the text before it last.
        scratch = scratch.write(_cut(out.rows, slice(0, unread)), layout.positions[:, :unread], slots)
        scratch = scratch.write(_cut(out.rows, slice(unread, None)), layout.positions[:, unread:], 0)
        return Scores(out.logits[:, -1:], tokens=self.vocabulary), scratch

    def extend(self, scratch, level, at, tokens, parents, seen):
        """See `DraftNetwork`."""
        unread = self.unread.shape[1]
        positions = self.place.positions(jnp.full(tokens.shape, unread + level, jnp.int32))
        layout = scratch.layout(
            positions, self.place.length, jnp.pad(seen, ((0, 0), (0, 0), (0, unread)), constant_values=True)
        )
        out = self._forward(tokens, layout, scratch.rows)
        return Scores(out.logits, tokens=self.vocabulary), scratch.write(out.rows, positions, at)

    def _forward(self, tokens, layout, scratch):
        layers = None if self.layers is None else (0, self.layers)
        known = _known(self.config, tokens)
        return transformer.forward(self.config, self.params, known, layout, Sources(self.cache, scratch), layers)


def _known(config: TransformerConfig, tokens: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Tokens that the model has: what only pads a larger vocabulary is no text, but a target may write anything."""
    return jnp.minimum(tokens, config.vocab_size - 1)


def _cut(rows: Cache, part: slice) -> Cache:
    """Some of the fresh rows of every layer."""
    return [{"k": layer["k"][:, :, :, part], "v": layer["v"][:, :, part]} for layer in rows]
