"""What a drafter is: a few pure functions over a state pytree, and some static facts.

A drafter is a frozen, hashable dataclass, so that it can be a jit constant; its parameters and its state are pytrees.
The loop calls, in this order, `draft` and `riders` before each target forward, `ingest` with the rows that became text
(and, before that, with the prompt), and `observe` with everything the forward said. Plain decoding is the drafter that
proposes nothing.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, cast

from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from decoding.policies.policy import TreePolicy
from decoding.sampling import SamplingParameters
from decoding.tree_search import Acceptance, best_tree
from decoding.trees import TokenTree, Topology
from decoding.verify import Verdict
from models import schema, transformer
from models.config import TransformerConfig
from models.errors import UserError
from models.transformer import Cache, Output, Params


@struct.dataclass
class TargetView:
    """What a drafter may read of the target: parameters, committed cache, sampling settings.

    Attributes:
      config: shape of the target.
      params: its parameters, layers as a list.
      cache: keys and values of the committed tokens.
      length: how many tokens those are; the root stands at this position.
      text: the tokens themselves, in the first `length` places, then the root; what follows is padding.
      sampling: sampling settings, for drafters that sample.
    """

    config: TransformerConfig = struct.field(pytree_node=False)
    params: Params
    cache: Cache
    length: Int[Array, "B"]
    text: Int[Array, "B C"]
    sampling: SamplingParameters

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
      nodes: the tree node that each row was, the root first; None for text that is not from the drafter's own tree,
        such as the prompt.
      drafted: what `draft` kept beside that tree; None with `nodes`, or where it kept nothing.
    """

    tokens: Int[Array, "B R"]
    start: Int[Array, "B"]
    count: Int[Array, "B"]
    taps: dict[str, Float[Array, "B R H"]]
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


# Entries of records by the names that they had in Tandem 0.1, which are still read.
RENAMED = {"growth": "policy"}


class Drafter:
    """Base of all drafters; the defaults are those of one without parameters, state or candidates.

    Class attributes:
      known: every drafter by its name (`decoding.drafters.DRAFTERS`).
      name: what `drafter.json` and command lines call it.
      taps: target features that `ingest` wants (see `models.transformer.forward`).

    Properties:
      max_nodes: rows of the verify forward, root included (a *budget* of n candidates means n + 1 nodes).
      max_depth: depth of the deepest candidate.
      num_riders: rows that `riders` adds.
    """

    known: ClassVar[Mapping[str, type]] = {}
    name: ClassVar[str]
    taps: ClassVar[tuple[str, ...]] = ()

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
    def from_record(cls, raw: Any, where: str, place: str) -> "Drafter":
        """The inverse of `to_record`, for any method; `where` is the dotted place of the record in `place`.

        Raises:
          UserError: an unknown method, or an entry that is unknown, missing or of the wrong type.
        """
        known = Drafter.known
        method = raw.get("method") if isinstance(raw, dict) else None
        if not isinstance(method, str) or method not in known:
            raise UserError(f"{place} names the method {method!r}; known are {', '.join(known)}")
        entries = {RENAMED.get(key, key): _immutable(value) for key, value in raw.items() if key != "method"}
        for field in dataclasses.fields(known[method]):
            if field.name not in entries:
                raise UserError(f"{place} has no entry {field.name!r}")
        return schema.parse(known[method], entries, where, place)

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

    def fuse(self, params):
        """Parameters as one device multiplies them fastest; `load_drafter` calls it where there is no mesh."""
        return params

    def prepare(self, params):
        """Parameters in the layout that `draft` reads; called once per request, before anything is decoded."""
        return params

    def init(self, config: TransformerConfig, batch: int, capacity: int, dtype, mesh: Mesh | None = None):
        """The state before any text: a pytree of arrays with the batch leading; a cache of its own goes on `mesh`."""
        return ()

    def ingest(self, params, target: TargetView, state, rows: TrueRows):
        """The state after `rows` became text; `target.cache` and `target.length` already include them."""
        return state

    def draft(self, params, target: TargetView, state, root: Int[Array, "B"], keys: Array) -> tuple[TokenTree, Any]:
        """Candidates that may follow `root`, the pending token at position `target.length`.

        Args:
          params: as `prepare` left them.
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
          params: as `prepare` left them.
          target: the target after this step.
          state: as `ingest` left it.
          tree: what was drafted.
          output: of the N nodes, then of the riders.
          verdict: what became text.
          live: bool `[B]`; a finished row keeps its state.
        """
        return state

    def memory(self, state):
        """What outlives the request, to be given to `recall` in the next; None for a drafter that keeps nothing."""
        return None

    def recall(self, state, memory):
        """A fresh state with an earlier request's memory. Raises UserError for memory that is not this drafter's."""
        raise UserError(f"the drafter {self.name} keeps nothing between requests, so it cannot be given memory")

    # What commands and benchmarks ask. The policy of those that have one is a field of theirs.
    policy: TreePolicy | None = None

    @property
    def num_heads(self) -> int:
        """Draft heads, one per depth, whose guesses are known for whole texts (`decoding/replay.py`); 0 without."""
        return 0

    @property
    def tree(self) -> Topology | None:
        """The topology, where it is static and holds the best guesses in their order."""
        return None

    @property
    def topology(self) -> Topology | None:
        """The topology, where it is static, however candidates are chosen."""
        return self.tree

    def with_tree(self, tree: Topology) -> "Drafter":
        """The same drafter with a static tree of its best guesses. Raises UserError for one that takes none."""
        raise UserError(f"the drafter {self.name} takes no tree")

    def with_policy(self, policy: TreePolicy) -> "Drafter":
        """The same drafter with another policy. Raises UserError for one without."""
        raise UserError(f"the drafter {self.name} has no policy")

    def probing(self) -> "Drafter | None":
        """The drafter with wide static trees, with which to count the acceptance that `with_budget` asks for.

        None for one that needs no counts.
        """
        return None

    def with_budget(self, candidates: int, acceptance: Acceptance | None = None) -> "Drafter | None":
        """The drafter with its best tree of exactly `candidates` candidates; None where it cannot have so many.

        Args:
          candidates: nodes of a tree, root not included.
          acceptance: counted with `probing`; None where that is None.

        Raises:
          UserError: a drafter whose trees have no size to choose.
        """
        if self.tree is None or acceptance is None:
            raise UserError(f"{self.name} cannot be fitted to a budget")
        tree = best_tree(acceptance.accuracy, candidates)
        return None if tree is None else self.with_tree(tree)


def _immutable(value: Any) -> Any:
    """JSON with tuples for its lists, which is what frozen dataclasses hold."""
    if isinstance(value, dict):
        return {key: _immutable(item) for key, item in value.items()}
    return tuple(map(_immutable, value)) if isinstance(value, list) else value
