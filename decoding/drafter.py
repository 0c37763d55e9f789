"""What a drafter is: a few pure functions over a state pytree, and some static facts.

A drafter is a frozen, hashable dataclass, so that it can be a jit constant; its parameters and its state are pytrees.
The loop calls, in this order, `draft` before each target forward, `ingest` with the rows that became text (and, before
that, with the prompt), and `observe` with everything the forward said. Plain decoding is the drafter that proposes
nothing.
"""

from typing import ClassVar

from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from decoding.sampling import Warps
from decoding.trees import TokenTree
from decoding.verify import Verdict
from models import transformer
from models.config import TransformerConfig
from models.transformer import Cache, Output, Params


@struct.dataclass
class TargetView:
    """What a drafter may read of the target: parameters, committed cache, sampling settings.

    Attributes:
      config: shape of the target.
      params: its parameters, layers as a list.
      cache: keys and values of the committed tokens.
      length: how many tokens those are; the root stands at this position.
      warps: sampling settings, for drafters that sample.
    """

    config: TransformerConfig = struct.field(pytree_node=False)
    params: Params
    cache: Cache
    length: Int[Array, "B"]
    warps: Warps

    def lookup(self, tokens: Int[Array, "*B"]) -> Float[Array, "*B H"]:
        """Raw rows of the target's embedding table, without the scale that some families put on their inputs."""
        return transformer.lookup(self.params, tokens)

    def head(self, hidden: Float[Array, "*B H"]) -> Float[Array, "*B V"]:
        """The target's logits of post-norm features."""
        return transformer.head(self.config, self.params, hidden)


@struct.dataclass
class TrueRows:
    """Rows of text that the target has read, with its features: the only way in for true features.

    Attributes:
      tokens: the tokens read; only the first `count[b]` of a row are text, the rest is padding.
      start: position of `tokens[:, 0]`.
      count: how many are text; 0 leaves the row's state unchanged.
      taps: the features named in `Drafter.taps`, `[B, R, H]` each.
    """

    tokens: Int[Array, "B R"]
    start: Int[Array, "B"]
    count: Int[Array, "B"]
    taps: dict[str, Float[Array, "B R H"]]


class Drafter:
    """Base of all drafters; the defaults are those of one without parameters, state or candidates.

    Class attributes:
      name: what `drafter.json` and command lines call it.
      taps: target features that `ingest` wants (see `models.transformer.forward`).

    Properties:
      max_nodes: rows of the verify forward, root included (a *budget* of n candidates means n + 1 nodes).
      max_depth: depth of the deepest candidate.
    """

    name: ClassVar[str]
    taps: ClassVar[tuple[str, ...]] = ()

    @property
    def max_nodes(self) -> int:
        raise AttributeError(f"{type(self).__name__} must say max_nodes")

    @property
    def max_depth(self) -> int:
        raise AttributeError(f"{type(self).__name__} must say max_depth")

    def check(self, config: TransformerConfig) -> None:
        """Raises UserError when this drafter cannot serve a target of that shape."""

    def init_params(self, config: TransformerConfig, target: Params, key: Array):
        """Fresh parameters for a target; None for a drafter without."""
        return None

    def prepare(self, params):
        """Parameters in the layout that `draft` reads.

        Runs in every compiled call of the loop (when streaming, once per block of steps), before its `while_loop`.
        """
        return params

    def init(self, config: TransformerConfig, batch: int, capacity: int, dtype, mesh: Mesh | None = None):
        """The state before any text: a pytree of arrays with the batch leading; a cache of its own goes on `mesh`."""
        return ()

    def ingest(self, params, target: TargetView, state, rows: TrueRows):
        """The state after `rows` became text; `target.cache` and `target.length` already include them."""
        return state

    def draft(self, params, target: TargetView, state, root: Int[Array, "B"], keys: Array) -> TokenTree:
        """Candidates that may follow `root`, the pending token at position `target.length`."""
        raise AttributeError(f"{type(self).__name__} must define draft")

    def observe(self, state, tree: TokenTree, output: Output, verdict: Verdict):
        """The state after looking at every node's output, rejected ones included."""
        return state
