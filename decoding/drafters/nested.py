"""One draft model for several targets: a transformer with exits after some of its layers (`train/objectives/exits.py`).

An *exit* is a number of layers, behind which the final norm and the head read what there is. With one exit the model is
the network cut off there, and nothing behind it is kept or runs: how one directory's weights serve a small target by
few layers and a large one by many. With several, every candidate takes the first exit that is sure: whose largest
probability reaches its threshold, else the next, and the last whatever it says (Sorted Speculative Decoding, Kavehzadeh
et al. 2024). The policy `scheduled` also stops drafting where the exit that was taken is below a threshold of its own.

Which exit speaks of a row depends on the tokens before its candidates alone, never on what is drawn from it, and the
tree carries the distribution of the exit that was taken: so verification is as exact as of any draft model.

Keys and values that sure rows skipped are computed where they are missed, and are those of the whole network: deeper
layers, when a row of the batch asks for them, run on all rows of the draft at once, from the residual stream that left
the first exit, and once more on what became text, so that the cache is a function of the text. Passing an early exit's
stream through the key and value maps of the layers that it skipped, as is sometimes done, would make it something else.
"""

import dataclasses
import itertools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float

from decoding.drafters.draft_model import DraftModel, ModelNetwork
from decoding.policies import Scores
from decoding.policies.admission import of_going
from decoding.policies.scratch import Scratch
from models import transformer
from models.attention import Sources
from models.errors import UserError
from models.layout import Layout, Tree


@dataclasses.dataclass(frozen=True)
class Nested(DraftModel):
    """A transformer that ends early, where it is sure or at a layer chosen for its target.

    Attributes:
      model: the shape of all of it; what lies behind the last exit is stored and never runs.
      policy: how it grows a tree.
      exits: layers after which it may end, rising; empty is its last.
      thresholds: of each exit but the last, the largest probability from which on it is taken.
    """

    exits: tuple[int, ...] = ()
    thresholds: tuple[float, ...] = ()
    name: ClassVar[str] = "nested"

    def __post_init__(self):
        exits, layers = self.layers, self.model.num_layers
        if not all(lo < hi for lo, hi in itertools.pairwise((0, *exits))) or exits[-1] > layers:
            raise UserError(f"{self.name} needs exits that rise from 1 to at most {layers} layers, got {list(exits)}")
        if len(self.thresholds) != len(exits) - 1 or not all(0 <= limit <= 1 for limit in self.thresholds):
            raise UserError(
                f"{self.name} of {len(exits)} exits needs {len(exits) - 1} thresholds in 0..1, one of each exit but "
                f"the last, got {list(self.thresholds)}"
            )

    @property
    def confident(self) -> bool:
        return True

    def check(self, config):
        if self.model.encoder_layers:
            raise UserError(f"{self.name} has exits of a decoder, and this model is an encoder-decoder")
        super().check(config)

    @property
    def layers(self) -> tuple[int, ...]:
        """The exits."""
        return self.exits or (self.model.num_layers,)

    @property
    def running(self):
        last = self.layers[-1]
        return dataclasses.replace(self.model, num_layers=last, windows=self.model.windows[:last])

    def for_decoding(self, params, mesh=None):
        params = super().for_decoding(params, mesh)
        return {**params, "layers": params["layers"][: self.layers[-1]]}

    def rows_in(self, slots, scratch, params, cache, begins):
        first = scratch.first.take(slots)
        if len(self.layers) == 1:
            return first, None
        stream = jnp.take_along_axis(scratch.stream, slots[:, :, None], axis=1)
        layout = Layout.extend(begins.length, slots.shape[1], begins.position)
        between = self.layers[0], self.layers[-1]
        out = transformer.forward(self.running, params, stream, layout, Sources(cache), between)
        return [*first, *out.rows], out.hidden[:, 0]

    def network(self, params, target, state):
        """The draft model in the middle of the text."""
        place = self.place_of_network(params, target, state)
        first, *deeper = self.layers
        return NestedNetwork(**place, layers=first, deeper=tuple(deeper), thresholds=self.thresholds, done=target.done)


@struct.dataclass
class NestedScratch:
    """What is kept of the S slots of a draft, those of unread text included.

    Attributes:
      first: keys and values of the layers up to the first exit.
      stream: the residual stream that left it.
      seen: `[b, i, j]`: slot i sees slot j.
    """

    first: Scratch
    stream: Float[Array, "B S H"]
    seen: Bool[Array, "B S S"]

    def write(
        self, first: Scratch, stream: Float[Array, "B M H"], seen: Bool[Array, "B M S"], at: int
    ) -> "NestedScratch":
        """With M rows in the slots from `at` on."""
        put = jax.lax.dynamic_update_slice_in_dim
        stream = put(self.stream, stream.astype(self.stream.dtype), at, axis=1)
        own = jnp.arange(seen.shape[2]) == at + jnp.arange(seen.shape[1])[:, None]
        return NestedScratch(first, stream, put(self.seen, seen | own, at, axis=1))


@struct.dataclass
class NestedNetwork(ModelNetwork):
    """A transformer with exits as a draft network; the fields of `ModelNetwork` are those of its first exit.

    Attributes:
      deeper: the exits behind the first.
      thresholds: of each exit but the last.
      done: which texts have ended; None is none.
    """

    deeper: tuple[int, ...] = struct.field(pytree_node=False, default=())
    thresholds: tuple[float, ...] = struct.field(pytree_node=False, default=())
    done: Bool[Array, "B"] | None = None

    def begin(self, root, slots):
        """See `DraftNetwork`."""
        batch, unread = self.unread.shape
        out, first = self.read_root(root, slots)
        stream, size = out.taps["pre_norm"], slots + unread
        empty = NestedScratch(
            first, jnp.zeros((batch, size, stream.shape[2]), stream.dtype), jnp.zeros((batch, size, size), bool)
        )
        text = jnp.arange(size) >= slots  # Slots of unread text.
        before = jnp.tril(jnp.broadcast_to(text, (unread, size)), slots - 1)
        scratch = empty.write(first, stream[:, :unread], jnp.broadcast_to(before, (batch, unread, size)), slots)
        scratch = scratch.write(first, stream[:, unread:], jnp.broadcast_to(text, (batch, 1, size)), 0)
        return self._scores(out.logits[:, -1:], scratch, 0, slots), scratch

    def extend(self, scratch, level, at, tokens, parents, seen):
        """See `DraftNetwork`."""
        slots, unread = seen.shape[2], self.unread.shape[1]
        out, first = self.read_level(scratch.first, level, at, tokens, seen)
        whole = jnp.pad(seen, ((0, 0), (0, 0), (0, unread)), constant_values=True)
        scratch = scratch.write(first, out.taps["pre_norm"], whole, at)
        return self._scores(out.logits, scratch, at, slots), scratch

    def _scores(self, logits_BMV: Float[Array, "B M V"], scratch: NestedScratch, at: int, slots: int) -> Scores:
        """Of the rows from slot `at` on, each by the exit that it takes, with that exit's largest probability."""
        rows = logits_BMV.shape[1]
        ran = np.concatenate([slots + np.arange(self.unread.shape[1]), np.arange(at + rows)])
        tree = Tree(scratch.seen[:, ran[:, None], ran])
        layout = Layout(scratch.first.positions[:, ran], self.place.length[:, None], tree)

        def taken(stage, stream, logits, unsure):
            """What the exits from `stage` on leave of the logits of the one before."""
            if stage == len(self.deeper):
                return logits
            unsure = unsure & (largest_probability(logits) < self.thresholds[stage])

            def deeper():
                between = (self.layers, *self.deeper)[stage], self.deeper[stage]
                sources = Sources(self.cache)
                out = transformer.forward(self.config, self.params, stream, layout, sources, between, ("pre_norm",))
                found = transformer.head(self.config, self.params, out.hidden[:, -rows:])
                return taken(stage + 1, out.taps["pre_norm"], jnp.where(unsure[:, :, None], found, logits), unsure)

            return jax.lax.cond(jnp.any(unsure), deeper, lambda: logits)

        going_BM = jnp.ones(logits_BMV.shape[:2], bool)
        going_BM = going_BM if self.done is None else going_BM & ~self.done[:, None]
        logits_BMV = taken(0, scratch.stream[:, ran], logits_BMV, going_BM)
        sure_BM = of_going(largest_probability(logits_BMV), self.done)
        return Scores(logits_BMV, tokens=self.vocabulary, confidence=sure_BM)


def largest_probability(logits: Float[Array, "B M V"]) -> Float[Array, "B M"]:
    """Of each row, at temperature 1."""
    return jnp.exp(jnp.max(logits, axis=-1) - jax.nn.logsumexp(logits, axis=-1))
