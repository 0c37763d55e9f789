"""What a drafter is: a few pure functions over a state pytree, and some static facts.

A drafter is a frozen, hashable dataclass, so that it can be a jit constant; its parameters and its state are pytrees.
While the prompt is read the loop calls `ingest` with each part of it, then `begin` once. Every step calls `draft` and
`riders` before the target's forward, then `ingest` with the rows that became text and `observe` with everything that
the forward said. Plain decoding is the drafter that proposes nothing.

A drafter answers for itself: what commands and benchmarks want to know of a method are methods here, with defaults, so
that nothing outside a drafter's own files asks which one it is.
"""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple, cast

import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from decoding.place import Place
from decoding.policies.policy import TreePolicy
from decoding.sampling import SamplingParameters
from decoding.tree_search import Acceptance, best_part, best_tree
from decoding.trees import TokenTree, Topology
from decoding.verify import Verdict
from models import schema, transformer
from models.config import TransformerConfig
from models.encoder_decoder import Memory
from models.errors import UserError
from models.transformer import Cache, Output, Params


@struct.dataclass
class TargetView:
    """What a drafter may read of the target: parameters, committed cache, sampling settings.

    Attributes:
      config: shape of the target.
      params: its parameters, layers as a list.
      cache: keys and values of what is committed.
      place: how much that is.
      text: its tokens, in the first `length` places, then the root; what follows is padding.
      sampling: sampling parameters, for drafters that sample.
      memory: the prompt of an encoder-decoder, whose `text` begins behind it.
      done: which texts have ended; None is none.
    """

    config: TransformerConfig = struct.field(pytree_node=False)
    params: Params
    cache: Cache
    place: Place
    text: Int[Array, "B C"]
    sampling: SamplingParameters
    memory: Memory | None = None
    done: Bool[Array, "B"] | None = None

    @property
    def length(self) -> Int[Array, "B"]:
        """Committed tokens of text; the root has this index."""
        return self.place.length

    def all_text(self) -> tuple[Int[Array, "B _"], Int[Array, "B"]]:
        """All that the target has read and the root behind it, and the index of the root: of an encoder-decoder its
        prompt, then its text."""
        if self.memory is None:
            return self.text, self.length
        before, own = self.memory.tokens, self.text
        place = jnp.arange(before.shape[1] + own.shape[1], dtype=jnp.int32) - self.memory.lengths[:, None]
        behind = jnp.take_along_axis(own, jnp.clip(place, 0, own.shape[1] - 1), axis=1)
        padded = jnp.pad(before, ((0, 0), (0, own.shape[1])))
        return jnp.where(place < 0, padded, behind), self.memory.lengths + self.length

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
      start: where `tokens[:, 0]` stands.
      count: how many are text; 0 leaves the row's state unchanged.
      taps: the features named in `Drafter.taps`, `[B, R, H]` each.
      source: where the text is from: the `prompt`, the drafter's `own` tree, the tree of an `other` drafter, or the
        `target` alone, while this drafter was not asked.
      nodes: of its own tree, the node that each row was, the root first.
      drafted: what `draft` kept beside that tree; None where it kept nothing.
    """

    tokens: Int[Array, "B R"]
    start: Place
    count: Int[Array, "B"]
    taps: dict[str, Float[Array, "B R H"]]
    source: Literal["prompt", "own", "other", "target"] = struct.field(pytree_node=False)
    nodes: Int[Array, "B R"] | None = None
    drafted: Any = None


@struct.dataclass
class Riders:
    """R rows that join the verify forward without being candidates; they see the committed text, tree rows never them.

    Attributes:
      tokens: what they read.
      positions: where they stand.
      sees_tree: `[b, i, n]`: rider i sees node n.
      sees_riders: `[b, i, j]`: rider i sees rider j, itself included.
    """

    tokens: Int[Array, "B R"]
    positions: Int[Array, "B R"]
    sees_tree: Bool[Array, "#B R N"]
    sees_riders: Bool[Array, "#B R R"]


class CostPart(NamedTuple):
    """Something that `draft` does, to be run and timed alone.

    Attributes:
      run: (params, target, state, root, inputs) -> arrays; the first four as for `draft`.
      inputs: what else it reads, made once.
    """

    run: Callable[..., Any]
    inputs: Any


class Drafter:
    """Base of all drafters; the defaults are those of one without parameters, state or candidates.

    Class attributes:
      name: what `drafter.json` and command lines call it.
      bare_names: forms that `from_name` takes, for messages; none for a drafter with parameters.
      taps: target features that `ingest` wants (see `models.transformer.forward`).
      known_sizes: candidates and the acceptance length that trees of so many had where they were measured, which is
        what one that was named without a number begins with.

    Attributes:
      open_sizes: the same of an open drafter (`opened`); none of any other.

    Properties:
      max_nodes: rows of the verify forward, root included (a *budget* of n candidates means n + 1 nodes).
      max_depth: depth of the deepest candidate.
      num_riders: rows that `riders` adds.
    """

    name: ClassVar[str]
    bare_names: ClassVar[tuple[str, ...]] = ()
    taps: ClassVar[tuple[str, ...]] = ()
    known_sizes: ClassVar[tuple[tuple[int, float], ...]] = ()
    open_sizes: ClassVar[tuple[tuple[int, float], ...]] = ()

    @property
    def max_nodes(self) -> int:
        raise AttributeError(f"{type(self).__name__} must say max_nodes")

    @property
    def max_depth(self) -> int:
        raise AttributeError(f"{type(self).__name__} must say max_depth")

    @property
    def num_riders(self) -> int:
        return 0

    def to_record(self) -> dict:
        """The static part as JSON has it."""
        fields = dataclasses.fields(cast(Any, self))
        return {"method": self.name, **{field.name: schema.resolved(getattr(self, field.name)) for field in fields}}

    @classmethod
    def from_name(cls, argument: str) -> "Drafter | None":
        """The drafter that a command line means by its bare name, or by `NAME:ARGUMENT`; None where it means none.

        A drafter with parameters has none: it is named by its directory.

        Args:
          argument: what stands behind the colon; empty without one.
        """
        return None

    def opened(self, sizes: tuple[tuple[int, float], ...] | None = None) -> "Drafter":
        """The same drafter, whose number of candidates `generate` chooses by what they cost (`decoding/sizing.py`).

        No field says so: it is equal to this one, and compiles to the same programs. What is made of it with another
        tree, policy or budget is not open.

        Args:
          sizes: among which to choose, none of them deeper than this one, with their acceptance lengths. None is every
            size that is one less than a power of two and at most its own, each with 0.3 tokens more than the one
            before, about what trained heads gain (docs/results.md).

        Raises:
          UserError: a drafter that has no size to choose.
        """
        if sizes is None:
            count = self.max_nodes.bit_length()
            guesses = ((2**power - 1, 1 + 0.3 * power) for power in range(1, count))
            sizes = tuple((size, length) for size, length in guesses if self.with_budget(size) is not None)
            if not sizes:
                raise UserError(f"{self.name} has no number of candidates to choose")
        free = copy.copy(self)
        object.__setattr__(free, "open_sizes", sizes)
        return free

    def rule(self, greedy: bool) -> str:
        """The acceptance rule of its trees, one of `decoding.trees.ACCEPTANCE_RULES`.

        Args:
          greedy: every row of the batch has temperature 0.

        Raises:
          UserError: a combination of drafters that no rule covers.
        """
        return "match"

    def check(self, config: TransformerConfig) -> None:
        """Raises UserError when this drafter cannot serve a target of that shape."""

    def init_params(self, config: TransformerConfig, target: Params, key: Array):
        """Fresh parameters for a target; None for a drafter without."""
        return None

    def for_decoding(self, params, mesh: Mesh | None = None):
        """Parameters as `draft` and `ingest` read them fastest, on one device or a mesh.

        Those that are in that form already come back as they are: `load_drafter` makes it, and so does `generate` of
        parameters that come from elsewhere.
        """
        return params

    def init(self, config: TransformerConfig, batch: int, capacity: int, dtype, mesh: Mesh | None = None):
        """The state before any text: a pytree of arrays with the batch leading; a cache of its own goes on `mesh`."""
        return ()

    @property
    def ingests(self) -> bool:
        """Whether `ingest` does anything; where it does not, no program is compiled for it."""
        return type(self).ingest is not Drafter.ingest

    def ingest(self, params, target: TargetView, state, rows: TrueRows):
        """The state after `rows` became text; `target.cache` and `target.place` already include them."""
        return state

    @property
    def begins(self) -> bool:
        """Whether `begin` does anything."""
        return type(self).begin is not Drafter.begin

    def begin(self, params, target: TargetView, state):
        """The state once the whole prompt was ingested, before the first step."""
        return state

    def draft(self, params, target: TargetView, state, root: Int[Array, "B"], keys: Array) -> tuple[TokenTree, Any]:
        """Candidates that may follow `root`, the pending token, which has the index `target.length`.

        Args:
          params: as `for_decoding` left them.
          target: the target before this step.
          state: as `ingest` and `observe` left it.
          root: the pending tokens.
          keys: typed PRNG keys `[B]` for drafters that draw; new in every step, and independent of the verifier's.

        Returns:
          The tree, and what `ingest` finds in `TrueRows.drafted` after this step, such as the rows of a draft network
          that may turn out to be text; None where nothing is kept.
        """
        raise AttributeError(f"{type(self).__name__} must define draft")

    def riders(self, params, target: TargetView, state, tree: TokenTree) -> Riders | None:
        """Extra rows for the verify forward; their outputs come to `observe` behind those of the tree."""
        return None

    def observe(self, params, target: TargetView, state, tree: TokenTree, output: Output, verdict: Verdict, live):
        """The state after looking at every node's output, rejected ones included.

        Args:
          params: as `for_decoding` left them.
          target: the target after this step.
          state: as `ingest` left it.
          tree: what was drafted.
          output: of the N nodes, then of the riders.
          verdict: what became text.
          live: bool `[B]`; a finished row keeps its state.
        """
        return state

    def cost_parts(self, config: TransformerConfig, batch: int) -> dict[str, CostPart]:
        """What tells the networks from the rest of `draft`, for batches of a target of that shape.

        `network` is the networks alone, with nothing chosen between their passes; `choice` is the choice of candidates
        alone. One of them is enough; a drafter without networks has neither.
        """
        return {}

    def memory(self, state):
        """What outlives the request, to be given to `recall` in the next; None for a drafter that keeps nothing."""
        return None

    def recall(self, state, memory):
        """A fresh state with an earlier request's memory. Raises UserError for memory that is not this drafter's."""
        raise UserError(f"the drafter {self.name} keeps nothing between requests, so it cannot be given memory")

    # What commands and benchmarks ask. No name here is one that a drafter would give a field: dataclasses would take
    # what stands here for the field's default.

    @property
    def tree_policy(self) -> TreePolicy | None:
        """What makes its trees, for drafters that have one to choose."""
        return None

    @property
    def num_heads(self) -> int:
        """Draft heads, one per depth, whose guesses are known for whole texts (`decoding/replay.py`); 0 without."""
        return 0

    @property
    def ranked_tree(self) -> Topology | None:
        """The topology, where it is static and holds the best guesses in their order."""
        return None

    @property
    def topology(self) -> Topology | None:
        """The topology, where it is static, however candidates are chosen."""
        return self.ranked_tree

    def with_tree(self, tree: Topology) -> "Drafter":
        """The same drafter with a static tree of its best guesses. Raises UserError for one that takes none."""
        raise UserError(f"the drafter {self.name} takes no tree")

    def with_policy(self, policy: TreePolicy) -> "Drafter":
        """The same drafter with another policy. Raises UserError for one without."""
        raise UserError(f"the drafter {self.name} has no policy")

    def uncut(
        self, params, target: TargetView, state, root: Int[Array, "B"], keys: Array
    ) -> tuple[TokenTree, Float[Array, "B D"]]:
        """As `draft`, but a whole chain, and how sure it is of every slot, for one whose policy cuts chains by that.

        Raises:
          UserError: any other.
        """
        raise UserError(f"the drafter {self.name} does not say how sure it is of a draft")

    def probing(self) -> "Drafter | None":
        """The drafter with wide static trees, with which to count the acceptance that `with_budget` asks for.

        None for one that needs no counts.
        """
        return None

    def with_budget(self, candidates: int, acceptance: Acceptance | None = None) -> "Drafter | None":
        """The drafter with its best tree of exactly `candidates` candidates; None where it cannot have so many.

        The state that a drafter makes (`init`) serves every smaller one that comes from here.

        Args:
          candidates: nodes of a tree, root not included.
          acceptance: counted with `probing`; where it is None, a ranked tree is cut down to its best part.

        Raises:
          UserError: a drafter whose trees have no size to choose.
        """
        if self.ranked_tree is None:
            raise UserError(f"{self.name} cannot be fitted to a budget")
        if acceptance is None:
            tree = best_part(self.ranked_tree, candidates)
        else:
            tree = best_tree(acceptance.accuracy, candidates)
        return None if tree is None else self.with_tree(tree)
