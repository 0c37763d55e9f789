"""Trees on a block whose slots are guessed independently: every level has one distribution, whatever the parents are.

A candidate is worth the sum of its path's log-probabilities, of the whole vocabulary at temperature 1. As ranks decide
it, all that a policy needs is the best tokens of every slot:

* `Slots` makes the tree of the n most valuable candidates, which under independence is the one of most expected
  accepted tokens (DDTree, arXiv 2604.12989).
* `Expanding` is JetSpec's `accum_logp` (arXiv 2606.18394): the most valuable node so far gets its `width` best
  children, until the tree is full. Kept as published; where slots become less sure with depth, the other is better.

Children are ranked, never drawn: rule `point`. A network whose slots are not independent, as with DFlash2's selector or
DSpark's head, is refused: `Confidence` grows a tree of these that knows its parents.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from decoding.policies.by_value import best_of
from decoding.policies.policy import DraftNetwork, Grown, TreePolicy
from decoding.sampling import argmax, best_logits, top_k
from decoding.trees import MOST_CANDIDATES, TokenTree, refuse_huge
from models.errors import UserError
from models.sharding import gather_rows

_OF_PATHS = (
    "a tree of independent slots needs a network that guesses a block at once, every slot by itself: this one's "
    "guesses depend on the path, for which there is the policy 'confidence'"
)


class Ranked(NamedTuple):
    """The K best tokens of D slots, best first, with their log-probabilities, and the network's scratch."""

    logp: list[Float[Array, "B K"]]
    tokens: list[Int[Array, "B K"]]
    scratch: Any


def ranked_slots(network: DraftNetwork, root: Int[Array, "B"], depth: int, count: int) -> Ranked:
    """What a block network says of its first `depth` slots; of `count` tokens each, or as many as there are.

    Raises:
      UserError: a network whose slots are not independent.
    """
    logp, tokens = [], []
    scores, scratch = network.begin(root, depth)
    for level in range(1, depth + 1):
        if scores.logits.shape[1] != 1 or (level > 1 and scores.row is None):
            raise UserError(_OF_PATHS)
        logits = gather_rows(scores.logits)
        best, outputs = best_logits(logits, min(count, logits.shape[-1]))
        # Rounding must let no path be worth more than its beginning.
        logp.append(jnp.minimum(best - jax.nn.logsumexp(logits, axis=-1, keepdims=True), 0)[:, 0])
        tokens.append(scores.of_target(outputs)[:, 0])
        if level < depth:
            seen = jnp.broadcast_to(jnp.arange(depth) < level, (len(root), 1, depth))
            parents = jnp.full((len(root), 1), level - 1, jnp.int32)
            scores, scratch = network.extend(scratch, level, level, tokens[-1][:, :1], parents, seen)
    return Ranked(logp, tokens, scratch)


@dataclasses.dataclass(frozen=True)
class _OfSlots(TreePolicy):
    """What both share.

    Attributes:
      depth: levels.
      total: nodes of the tree, root included.
    """

    depth: int = 15
    total: int = 64

    def _check_total(self, width: int, least: int = 2) -> None:
        if self.depth < 1 or width < 1:
            raise UserError(f"a tree of slots needs a depth and a width of at least 1, got {self.depth} and {width}")
        refuse_huge(max(self.total - 1, self.depth))
        made, level = 0, 0
        while level < self.depth and made < MOST_CANDIDATES:  # More are refused anyway.
            level += 1
            made += width**level
        if not least <= self.total <= 1 + made:
            raise UserError(
                f"a tree of slots of depth {self.depth} and width {width} makes {made} candidates: total must lie in "
                f"{least}..{1 + made}, got {self.total}"
            )

    @property
    def max_nodes(self) -> int:
        return self.total

    @property
    def max_depth(self) -> int:
        return self.depth

    @property
    def levels(self) -> tuple[int, ...]:
        return (1,) * self.depth

    def rule(self, greedy):
        return "point"

    def check_network(self, blind: int, confident: bool) -> None:
        if not blind:
            raise UserError(_OF_PATHS)
        if self.depth > blind:
            raise UserError(
                f"a tree of independent slots is {self.depth} deep, but of this network's guesses only those of "
                f"{blind} slots do not depend on the path"
            )

    def with_budget(self, candidates, acceptance=None):
        try:
            return dataclasses.replace(self, depth=min(self.depth, self._reach(candidates)), total=candidates + 1)
        except UserError:
            return None

    def _reach(self, candidates: int) -> int:
        """Depth that no tree of so many candidates exceeds: slots behind it need not be read."""
        return candidates


@dataclasses.dataclass(frozen=True)
class Slots(_OfSlots):
    """The most valuable candidates of all."""

    kind: ClassVar[str] = "slots"

    def __post_init__(self):
        self._check_total(max(self.total - 1, 1))

    def grow(self, network, root, keys, sampling):
        budget, batch = self.total - 1, root.shape[0]
        ranked = ranked_slots(network, root, self.depth, budget)
        value_BF = jnp.zeros((batch, 1), ranked.logp[0].dtype)
        number_BF = jnp.full((batch, 1), -1, jnp.int32)
        made, ran, count = [], [number_BF], 0
        for level, (logp_BK, tokens_BK) in enumerate(zip(ranked.logp, ranked.tokens, strict=True), start=1):
            # Before the child of rank k of the f-th best parent come all of no higher rank of no worse parents, so
            # that it is among the best n of its level only if there are at most n of these with itself.
            pairs = [(f, k) for f in range(value_BF.shape[1]) for k in range(min(budget // (f + 1), logp_BK.shape[1]))]
            parent_C, rank_C = np.array(pairs, np.int32).T
            value_BC = value_BF[:, parent_C] + logp_BK[:, rank_C]
            value_BF, place_BF = top_k(value_BC, min(budget, len(pairs)))
            rank_BF = jnp.asarray(rank_C)[place_BF]
            above_BF = jnp.take_along_axis(number_BF, jnp.asarray(parent_C)[place_BF], axis=1)
            tokens_BF = jnp.take_along_axis(tokens_BK, rank_BF, axis=1)
            made.append((tokens_BF, above_BF, rank_BF, jnp.full_like(rank_BF, level), value_BF))
            number_BF = jnp.broadcast_to(count + jnp.arange(value_BF.shape[1], dtype=jnp.int32), value_BF.shape)
            count += value_BF.shape[1]
            if level < self.depth:
                ran.append(number_BF[:, :1])
        width = min(budget, ranked.logp[0].shape[1])
        tree, slot_BN = best_of(root, made, jnp.concatenate(ran, axis=1), budget, -jnp.inf, width, "point", None)
        return Grown(tree, slot_BN, ranked.scratch)


@dataclasses.dataclass(frozen=True)
class Expanding(_OfSlots):
    """JetSpec's order of expansion.

    Attributes:
      width: children of a node.
    """

    width: int = 7
    kind: ClassVar[str] = "accum_logp"

    def __post_init__(self):
        self._check_total(self.width)

    def check(self, vocab_size: int) -> None:
        if self.width > vocab_size:
            raise UserError(f"a tree of slots asks for the {self.width} best of {vocab_size} tokens")

    def _reach(self, candidates: int) -> int:
        """As many levels as nodes get children."""
        return -(-candidates // self.width)

    def grow(self, network, root, keys, sampling):
        batch, width = root.shape[0], self.width
        ranked = ranked_slots(network, root, self.depth, width)
        logp_BDW, best_BDW = jnp.stack(ranked.logp, axis=1), jnp.stack(ranked.tokens, axis=1)
        expansions = -(-(self.total - 1) // width)
        size = 1 + expansions * width
        start = {
            "tokens": jnp.zeros((batch, size), jnp.int32).at[:, 0].set(root),
            "parent": jnp.full((batch, size), -1, jnp.int32),
            "depth": jnp.zeros((batch, size), jnp.int32),
            # Of nodes that may get children; the smallest index is the oldest.
            "open": jnp.full((batch, size), -jnp.inf, logp_BDW.dtype).at[:, 0].set(0),
        }

        def expand(i, state):
            chosen_B1 = argmax(state["open"])[:, None]
            value_B1, depth_B1 = (jnp.take_along_axis(state[name], chosen_B1, axis=1) for name in ("open", "depth"))
            logp_BW, tokens_BW = (
                jnp.take_along_axis(x, depth_B1[:, :, None], axis=1)[:, 0] for x in (logp_BDW, best_BDW)
            )
            closed = jnp.arange(size, dtype=jnp.int32) == chosen_B1
            state = {**state, "open": jnp.where(closed, -jnp.inf, state["open"])}
            children = {
                "tokens": tokens_BW,
                "parent": jnp.broadcast_to(chosen_B1, tokens_BW.shape),
                "depth": jnp.broadcast_to(depth_B1 + 1, tokens_BW.shape),
                "open": jnp.where(depth_B1 + 1 < self.depth, value_B1 + logp_BW, -jnp.inf),
            }
            at = 1 + i * width
            return {
                name: jax.lax.dynamic_update_slice_in_dim(values, children[name].astype(values.dtype), at, axis=1)
                for name, values in state.items()
            }

        made = jax.lax.fori_loop(0, expansions, expand, start)
        tokens, parent, depth = (made[name][:, : self.total] for name in ("tokens", "parent", "depth"))
        rank_N = jnp.asarray((np.arange(self.total) - 1) % width, jnp.int32).at[0].set(0)
        rank, valid = (jnp.broadcast_to(x, tokens.shape) for x in (rank_N, jnp.ones(self.total, bool)))
        tree = TokenTree.grown(tokens, parent, depth, valid, rank, width, "point")
        # What ran is the path of best tokens.
        ran_BN = ~jnp.any(tree.ancestors & (rank > 0)[:, None, :], axis=2) & (depth < self.depth)
        return Grown(tree, jnp.where(ran_BN, depth, -1), ranked.scratch)
