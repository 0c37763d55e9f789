"""A smaller transformer as drafter: speculative decoding proper (Leviathan et al. 2023; Chen et al. 2023).

The draft model reads the same text with a cache of its own; how its scores become a tree is the policy's business
(`decoding/policies`), and the policy decides the rule.

Nothing is computed twice: rows that ran while drafting are kept if they turn out to be text. The deepest accepted
candidate may be a leaf, which never ran, and on full acceptance always is (the bonus-token case that chains get wrong
when they forget it). So the last committed token always counts as unread, and each draft begins by reading two rows, it
and the root: the cache of a text of `length` tokens is read up to `length - 1`.
"""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from decoding.cache import commit, init_cache
from decoding.drafter import TargetView
from decoding.drafters.network_drafter import NetworkDrafter
from decoding.place import Place
from decoding.policies import Scores, Static, TreePolicy
from decoding.policies.scratch import Scratch
from models import transformer
from models.config import TransformerConfig
from models.encoder_decoder import Memory, beside, encode
from models.errors import UserError
from models.layout import Layout
from models.transformer import Cache, Output, Params


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

    @property
    def running(self) -> TransformerConfig:
        """The shape of what runs."""
        return self.model

    def outputs(self, config):
        return self.model.vocab_size

    def check(self, config):
        if self.model.vocab_size > config.vocab_size:
            raise UserError(
                f"the draft model has a vocabulary of {self.model.vocab_size}, more than the target's "
                f"{config.vocab_size}: scripts.convert --from model cuts it"
            )
        if self.model.encoder_layers and not config.encoder_layers:
            raise UserError("an encoder-decoder drafts for encoder-decoders alone, and the target is a decoder")
        super().check(config)

    def init_params(self, config, target, key):
        return transformer.init(self.model, key, target["embed"]["embedding"].dtype)

    def for_decoding(self, params, mesh=None):
        return transformer.for_decoding(params, mesh)

    def init(self, config, batch, capacity, dtype, mesh=None):
        """The draft model's own cache; an encoder's part comes once the prompt is complete."""
        return {"cache": init_cache(self.running, batch, capacity, dtype, mesh=mesh), "memory": None}

    @property
    def begins(self) -> bool:
        return self.model.encoder_layers > 0

    def begin(self, params, target, state):
        """The prompt of an encoder-decoder, as the draft model's own encoder reads it."""
        tokens = _known(self.model, target.memory.tokens)
        return {**state, "memory": encode(self.model, params, tokens, target.memory.lengths)}

    def ingest(self, params, target, state, rows):
        cache, memory, tokens = state["cache"], state["memory"], rows.tokens
        start = Place.of_text(rows.start.length)
        if self.begins and rows.source == "prompt":
            return state  # It is one token long, and the last one is read with the first draft.
        if rows.source == "target" or (self.begins and rows.source == "other"):
            # The last token of its own trees is still unread, and so may be an encoder-decoder's first.
            unread = jnp.take_along_axis(target.text, start.length[:, None] - 1, axis=1)
            start, tokens = start.back(1), jnp.concatenate([unread, tokens], axis=1)
        length = start.length
        if rows.source != "own":
            layout = Layout.extend(length, tokens.shape[1])
            seen = beside(memory, layout, cache)
            out = transformer.forward(self.running, params, _known(self.model, tokens), *seen)
            return {**state, "cache": commit(cache, out.rows, None, length, after=out.hidden[:, 0])}
        # Row r of the text is the slot of node r - 1, and the first the token that was unread. What did not run lies
        # behind the accepted rows and is read next time.
        nodes = rows.nodes[:, :-1]
        slots = jnp.take_along_axis(
            jnp.broadcast_to(rows.drafted["slot_of_node"], (nodes.shape[0], self.max_nodes)), nodes, 1
        )
        unread = jnp.full((nodes.shape[0], 1), self.policy.slots, jnp.int32)
        slots = jnp.concatenate([unread, jnp.maximum(slots, 0)], axis=1)
        taken, after = self.rows_in(slots, rows.drafted["scratch"], params, cache, start.back(1))
        after = rows.nodes[:, -1:] if after is None else after
        return {**state, "cache": commit(cache, taken, None, length - 1, after)}

    def rows_in(
        self, slots: Int[Array, "B R"], scratch: Any, params: Params, cache: Cache, begins: Place
    ) -> tuple[Cache, Array | None]:
        """Keys and values of what ran in the named slots of a draft's scratch, which is text from `begins` on.

        Returns:
          The rows of every layer, and what could only be computed after the cache was read, where it was.
        """
        return scratch.take(slots), None

    def network(self, params, target, state):
        """The draft model in the middle of the text."""
        return ModelNetwork(**self.place_of_network(params, target, state))

    def place_of_network(self, params: Params, target: TargetView, state: Any) -> dict[str, Any]:
        """What any network of this model is given: fields of `ModelNetwork`."""
        size = self.model.vocab_size
        return dict(
            config=self.running,
            params=params,
            cache=state["cache"],
            place=Place.of_text(target.length - 1),
            unread=jnp.take_along_axis(target.text, target.length[:, None] - 1, axis=1),
            vocab_size=target.config.vocab_size,
            vocabulary=None if size == target.config.vocab_size else jnp.arange(size, dtype=jnp.int32),
            memory=state["memory"],
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
      place: behind the text that the cache holds.
      unread: `[B, U]`, the text between cache and root; U may be 0. These rows take the scratch's last slots.
      layers: how many run; None means all.
      vocab_size: V, of the target.
      vocabulary: target tokens of its outputs; None where they are all the target has.
      memory: what an encoder of its own, or the target's, made of the prompt.
    """

    config: TransformerConfig = struct.field(pytree_node=False)
    params: Params
    cache: Cache
    place: Place
    unread: Int[Array, "B U"]
    vocab_size: int = struct.field(pytree_node=False)
    layers: int | None = struct.field(pytree_node=False, default=None)
    vocabulary: Int[Array, "W"] | None = None
    memory: Memory | None = None

    def begin(self, root, slots):
        """See `DraftNetwork`."""
        out, scratch = self.read_root(root, slots)
        return Scores(self.logits(out)[:, -1:], tokens=self.vocabulary), scratch

    def read_root(self, root: Int[Array, "B"], slots: int) -> tuple[Output, Scratch]:
        """What the forward says of the unread rows and, behind them, the root; they are in the scratch."""
        batch, unread = self.unread.shape
        layout = Layout.extend(self.place.length, unread + 1, self.place.position)
        out = self._forward(jnp.concatenate([self.unread, root[:, None]], axis=1), layout, None)
        dtype = self.cache[0]["k"].dtype
        scratch = Scratch.empty(self.config, batch, slots + unread, dtype, self.layers)
        # The root goes first and the text before it last.
        scratch = scratch.write(_cut(out.rows, slice(0, unread)), layout.positions[:, :unread], slots)
        scratch = scratch.write(_cut(out.rows, slice(unread, None)), layout.positions[:, unread:], 0)
        return out, scratch

    def extend(self, scratch, level, at, tokens, parents, seen):
        """See `DraftNetwork`."""
        out, scratch = self.read_level(scratch, level, at, tokens, seen)
        return Scores(self.logits(out), tokens=self.vocabulary), scratch

    def logits(self, out: Output) -> Float[Array, "B T V"]:
        """What the forward's rows say."""
        return out.logits

    def read_level(
        self, scratch: Scratch, level: int, at: int, tokens: Int[Array, "B M"], seen: Bool[Array, "B M S"]
    ) -> tuple[Output, Scratch]:
        """What the forward says of a level's rows, which are in the scratch then."""
        unread = self.unread.shape[1]
        positions = self.place.positions(jnp.full(tokens.shape, unread + level, jnp.int32))
        layout = scratch.layout(
            positions, self.place.length, jnp.pad(seen, ((0, 0), (0, 0), (0, unread)), constant_values=True)
        )
        out = self._forward(tokens, layout, scratch.rows)
        return out, scratch.write(out.rows, positions, at)

    def _forward(self, tokens, layout, scratch):
        layers = None if self.layers is None else (0, self.layers)
        known = _known(self.config, tokens)
        seen = beside(self.memory, layout, self.cache, scratch)
        return transformer.forward(self.config, self.params, known, *seen, layers, ("pre_norm",))


def _known(config: TransformerConfig, tokens: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Tokens that the model has: what only pads a larger vocabulary is no text, but a target may write anything."""
    return jnp.minimum(tokens, config.vocab_size - 1)


def _cut(rows: Cache, part: slice) -> Cache:
    """Some of the fresh rows of every layer."""
    return [{"k": layer["k"][:, :, :, part], "v": layer["v"][:, :, part]} for layer in rows]
