"""The two halves of autoregressive drafting: a *network* scores what may follow a path, a *policy* decides the tree.

Any network (a smaller transformer, the target's first layers, an EAGLE head) serves any policy (a static tree, sampled
siblings, a beam, a tree that follows confidence). Between them stands the *scratch*: what the network keeps of the rows
it ran in this step, any pytree with the slots in an axis. Rows are named by *slot*, in the order in which they ran;
slot 0 is the root. Leaves never run, so a tree has fewer slots than nodes.

A network may guess several tokens in a pass (semi-autoregressive and block drafters). Then it answers a level inside a
block from what it has at hand, and all rows of a block share one distribution, which is ranked or drawn from once
(`Scores.row`).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Shaped

from decoding.sampling import SamplingParameters
from decoding.tree_search import Acceptance
from decoding.trees import TokenTree, Topology
from models import schema
from models.errors import UserError
from models.sharding import gather_rows


@struct.dataclass
class Scores:
    """What a draft network says of the tokens that may follow M rows.

    Attributes:
      logits: P distributions over W outputs.
      row: which of the P speaks of each row; None says that row i's is the i-th, and P = M.
      tokens: target tokens of the outputs, the same for all distributions or of each its own; None when W is the
        target's vocabulary.
      confidence: probability that a candidate behind the row is accepted if the row was; None where a network does not
        say.
    """

    logits: Float[Array, "B P W"]
    row: Int[Array, "#B M"] | None = None
    tokens: Int[Array, "W"] | Int[Array, "B P W"] | None = None
    confidence: Float[Array, "B M"] | None = None

    def of_rows(self, values: Shaped[Array, "B P *K"]) -> Shaped[Array, "B M *K"]:
        """For every row, what is known of its distribution."""
        if self.row is None:
            return values
        row = jnp.broadcast_to(self.row, (values.shape[0], self.row.shape[1]))
        return jax.vmap(lambda value, index: value[index])(values, row)

    def each(self) -> "Scores":
        """With a distribution for every row, to be drawn from one by one."""
        own = self.tokens if self.tokens is None or self.tokens.ndim == 1 else self.of_rows(self.tokens)
        return Scores(self.of_rows(self.logits), None, own, self.confidence)

    def of_target(self, outputs: Int[Array, "B P K"]) -> Int[Array, "B P K"]:
        """Target tokens of outputs."""
        if self.tokens is None:
            return outputs
        return self.tokens[outputs] if self.tokens.ndim == 1 else jnp.take_along_axis(self.tokens, outputs, axis=2)

    def over_target(self, q: Float[Array, "B P W"], vocab_size: int) -> Float[Array, "B P V"]:
        """Distributions over outputs as distributions over the target's vocabulary."""
        if self.tokens is None:
            return q
        zeros = jnp.zeros((*q.shape[:2], vocab_size), q.dtype)
        if self.tokens.ndim == 1:
            return zeros.at[:, :, self.tokens].set(q)
        return jnp.put_along_axis(zeros, self.tokens, q, axis=2, inplace=False)


@runtime_checkable
class DraftNetwork(Protocol):
    """A draft network in the middle of a text."""

    @property
    def vocab_size(self) -> int:
        """V, of the target."""

    def begin(self, root: Int[Array, "B"], slots: int) -> tuple[Scores, Any]:
        """What may follow the root, and a scratch of `slots` slots with the root in the first."""

    def extend(
        self,
        scratch: Any,
        level: int,
        at: int,
        tokens: Int[Array, "B M"],
        parents: Int[Array, "B M"],
        seen: Bool[Array, "B M S"],
    ) -> tuple[Scores, Any]:
        """Reads the M candidates of a level, as slots `at` to `at + M - 1`.

        Args:
          scratch: of the rows so far.
          level: their depth in the tree, 1 for children of the root.
          at: first slot.
          tokens: what they read.
          parents: slots of their parents.
          seen: the earlier slots that each sees: its ancestors, root included.

        Returns:
          What may follow each, and the scratch with them in it.
        """


class Grown(NamedTuple):
    """What a policy made: the tree, the slot of each of its nodes (-1 for one that did not run), the scratch."""

    tree: TokenTree
    slot_of_node: Int[Array, "#B N"]
    scratch: Any


@dataclasses.dataclass(frozen=True)
class TreePolicy:
    """Base of all policies: frozen and hashable, so that they can be jit constants.

    Class attributes:
      kind: its name in `decoding.policies.POLICIES`.

    Properties:
      max_nodes: nodes of its trees, root included.
      max_depth: of the deepest candidate.
      levels: rows of each pass of the network, the root's first.
    """

    kind: ClassVar[str]

    @property
    def max_nodes(self) -> int:
        raise AttributeError(f"{type(self).__name__} must say max_nodes")

    @property
    def max_depth(self) -> int:
        raise AttributeError(f"{type(self).__name__} must say max_depth")

    @property
    def levels(self) -> tuple[int, ...]:
        raise AttributeError(f"{type(self).__name__} must say levels")

    @property
    def slots(self) -> int:
        """Rows that the network runs in all, root included."""
        return sum(self.levels)

    def rule(self, greedy: bool) -> str:
        """The acceptance rule of its trees; `greedy` says that every row of the batch has temperature 0."""
        raise AttributeError(f"{type(self).__name__} must define rule")

    def grow(self, network: DraftNetwork, root: Int[Array, "B"], keys: Array, sampling: SamplingParameters) -> Grown:
        """A tree under `root`.

        Args:
          network: what scores candidates.
          root: the pending tokens.
          keys: typed PRNG keys `[B]` for policies that draw.
          sampling: sampling settings; the networks' distributions are taken at the same temperature.
        """
        raise AttributeError(f"{type(self).__name__} must define grow")

    def uncut(
        self, network: DraftNetwork, root: Int[Array, "B"], keys: Array, sampling: SamplingParameters
    ) -> tuple[Grown, Float[Array, "B D"]]:
        """As `grow`, but a whole chain, and how sure the network says that it is of every slot.

        Raises:
          UserError: a policy that does not cut chains by that.
        """
        raise UserError(f"the policy {self.kind} cuts no chain by how sure a network is of it")

    def check(self, vocab_size: int) -> None:
        """Raises UserError when a network of `vocab_size` outputs cannot grow this."""

    def check_network(self, blind: int, confident: bool) -> None:
        """Raises UserError when a network cannot grow this that guesses `blind` levels whatever the parents are, and
        that says how sure it is of a candidate or does not.
        """

    def to_record(self) -> dict:
        """As `drafter.json` has it."""
        fields = {field.name: schema.resolved(getattr(self, field.name)) for field in dataclasses.fields(self)}
        return {"kind": self.kind, **fields}

    @property
    def ranked_tree(self) -> Topology | None:
        """The topology, where it is static and holds the best guesses in their order."""
        return None

    @property
    def topology(self) -> Topology | None:
        """Of its trees, where it is always the same; None where it depends on what the network says."""
        return None

    def probing(self) -> "TreePolicy | None":
        """A policy of wide static trees, with which to count the acceptance that `with_budget` asks for.

        None for one that needs no counts.
        """
        return None

    def calibrated(self, temperatures: Sequence[float], speed: Sequence[float] = ()) -> "TreePolicy | None":
        """The same policy, dividing the logits of a chain's confidences by these, slot by slot; by nothing where there
        are none. None for one that does not go by them (`decoding/calibration.py`).

        Args:
          temperatures: by slot.
          speed: steps per second of target forwards over 1, 2, .. rows; empty keeps those that the policy has.
        """
        return None

    def with_budget(self, candidates: int, acceptance: Acceptance | None = None) -> "TreePolicy | None":
        """The same way of growing with exactly `candidates` candidates; None where it cannot have so many.

        Args:
          candidates: nodes of a tree, root not included.
          acceptance: counted with `probing`; where it is None, a static tree is cut down to its best part.
        """
        raise AttributeError(f"{type(self).__name__} must define with_budget")


def draft_log_probabilities(logits: Float[Array, "B *M W"], sampling: SamplingParameters) -> Float[Array, "B *M W"]:
    """log q at the target's temperature; rows of temperature 0 stay at 1, and are not drawn from but ranked.

    On a mesh every device of a row holds all of it: what follows, from ranking to the residual, takes the whole of q.
    """
    logits = gather_rows(logits)
    temperature = jnp.where(sampling.temperature > 0, sampling.temperature, 1.0).astype(logits.dtype)
    return jax.nn.log_softmax(logits / temperature.reshape(-1, *[1] * (logits.ndim - 1)), axis=-1)


def gumbel_for(
    keys: Array, sampling: SamplingParameters, level: int, shape: tuple[int, ...], dtype
) -> Float[Array, "B *shape"]:
    """Gumbel noise `[B, *shape]` for a level of a tree; none in rows of temperature 0, whose candidates are ranked."""
    noise = jax.vmap(lambda key: jax.random.gumbel(jax.random.fold_in(key, level), shape, dtype))(keys)
    return jnp.where(sampling.temperature.reshape(-1, *[1] * len(shape)) > 0, noise, 0)


def own_slot(parents: Int[Array, "B M"], seen: Bool[Array, "B F S"], slots: Int[Array, "B M"]) -> Bool[Array, "B M S"]:
    """What the children of frontier rows see: all that the parent saw, and the parent.

    Args:
      parents: which row of the frontier, per child.
      seen: of the frontier.
      slots: of the parents.
    """
    inherited = jnp.take_along_axis(seen, parents[:, :, None], axis=1)
    return inherited | (slots[:, :, None] == jnp.arange(seen.shape[2], dtype=jnp.int32))
