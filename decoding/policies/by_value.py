"""Trees that follow a value: per level the best few candidates run on, and in the end the best of all are the tree.

Both EAGLE-2 and DySpec grow this way; they differ in what a candidate is worth. Every shape is fixed, and the topology
is data. Values never rise along a path, and equal ones go to the candidate that was made earlier, so the best n always
hold their own ancestors.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from decoding.policies.policy import DraftNetwork, Grown, Scores, own_slot
from decoding.sampling import top_k
from decoding.trees import TokenTree


class Candidates(NamedTuple):
    """K children of each of the F rows of a frontier.

    Attributes:
      tokens: of the target, distinct among siblings, in the order in which they are offered.
      worth: what decides which are in the tree; -inf for one that cannot be.
      frontier: what decides which run on; never above `worth`.
      proposals: under a sampled rule, the distribution that each row's children were drawn from.
    """

    tokens: Int[Array, "B F K"]
    worth: Float[Array, "B F K"]
    frontier: Float[Array, "B F K"]
    proposals: Float[Array, "B F V"] | None


Expand = Callable[[Scores, Float[Array, "B F"], int], Candidates]


def slots(width: int, depth: int) -> int:
    """Rows that run: the root, and `width` of every level but the last."""
    return 1 + width * (depth - 1)


def grow_by_value(
    network: DraftNetwork,
    root: Int[Array, "B"],
    expand: Expand,
    *,
    start: float,
    width: int,
    depth: int,
    budget: int,
    rule: str,
    least: float = -jnp.inf,
) -> Grown:
    """The tree of the `budget` most valuable candidates.

    Args:
      network: what scores candidates.
      root: the pending tokens.
      expand: (scores of a frontier, value of its rows, level) -> candidates.
      start: value of the root.
      width: candidates per level that run on.
      depth: levels.
      budget: candidates in the tree.
      rule: of the tree.
      least: candidates must be worth more than this.
    """
    batch, total = root.shape[0], slots(width, depth)
    scores, scratch = network.begin(root, total)
    value_BF = jnp.full((batch, 1), start, scores.logits.dtype)
    slot_BF = jnp.zeros((batch, 1), jnp.int32)
    seen_BFS = jnp.zeros((batch, 1, total), bool)
    # Candidates are numbered as they are made; the root is -1, so that a parent's number is below its children's.
    number_BF = jnp.full((batch, 1), -1, jnp.int32)
    made, proposals, ran = [], [], [number_BF]
    count = 0
    for level in range(1, depth + 1):
        found = expand(scores, value_BF, level)
        F, K = found.tokens.shape[1:]
        # Slots of a level that has fewer candidates than it might stay empty.
        empty = 0 if level == 1 else width - F
        if found.proposals is not None:
            proposals.append(jnp.pad(found.proposals, ((0, 0), (0, empty), (0, 0))))
        tokens_BC, worth_BC, onward_BC = (x.reshape(batch, F * K) for x in found[:3])
        rank_BC = jnp.broadcast_to(jnp.arange(F * K, dtype=jnp.int32) % K, (batch, F * K))
        made.append((tokens_BC, jnp.repeat(number_BF, K, axis=1), rank_BC, jnp.full_like(rank_BC, level), worth_BC))
        if level < depth:
            keep = min(width, F * K)
            value_BF, place_BF = top_k(onward_BC, keep)
            number_BF = count + place_BF
            parent_BF = place_BF // K
            parent_slot_BF = jnp.take_along_axis(slot_BF, parent_BF, axis=1)
            seen_BFS = own_slot(parent_BF, seen_BFS, parent_slot_BF)
            at = slots(width, level)
            chosen = jnp.take_along_axis(tokens_BC, place_BF, axis=1)
            scores, scratch = network.extend(scratch, level, at, chosen, parent_slot_BF, seen_BFS)
            slot_BF = jnp.broadcast_to(at + jnp.arange(keep, dtype=jnp.int32), (batch, keep))
            ran.append(jnp.pad(number_BF, ((0, 0), (0, width - keep)), constant_values=-2))
        count += F * K
    drawn_from = jnp.concatenate(proposals, axis=1) if proposals else None
    tree, slot_BN = best_of(root, made, jnp.concatenate(ran, axis=1), budget, least, K, rule, drawn_from)
    return Grown(tree, slot_BN, scratch)


def best_of(root, made, ran_BS, budget, least, width, rule, proposals) -> tuple[TokenTree, Int[Array, "B N"]]:
    """The tree of the `budget` most valuable candidates, and the slot of each node, -1 for one that did not run.

    Args:
      root: the pending tokens.
      made: per level tokens, number of the parent, rank, depth and worth of its candidates, `[B, C]` each.
      ran_BS: number of the candidate in each slot.
      budget: candidates in the tree.
      least: candidates must be worth more than this.
      width: most children of a node.
      rule: of the tree.
      proposals: per slot, what children were drawn from; None under a rule without.
    """
    batch = root.shape[0]
    tokens_BC, parent_BC, rank_BC, depth_BC, worth_BC = (jnp.concatenate(x, axis=1) for x in zip(*made, strict=True))
    count = worth_BC.shape[1]
    short = max(0, budget - count)
    values_BN, chosen_BN = top_k(jnp.pad(worth_BC, ((0, 0), (0, short)), constant_values=-jnp.inf), budget)
    # Invalid ones keep the last numbers, so that among the valid ones parents still come first.
    valid_BN = values_BN > least
    chosen_BN = jnp.sort(jnp.where(valid_BN, chosen_BN, count + chosen_BN), axis=1)
    valid_BN = chosen_BN < count
    chosen_BN = jnp.where(valid_BN, chosen_BN, 0)

    def pick(values_BC):
        return jnp.take_along_axis(values_BC, chosen_BN, axis=1)

    def with_root(values_BN, of_root):
        return jnp.concatenate([jnp.full((batch, 1), of_root, values_BN.dtype), values_BN], axis=1)

    number_BN = with_root(jnp.where(valid_BN, chosen_BN, -3), -1)
    is_parent_BNN = pick(parent_BC)[:, :, None] == number_BN[:, None, :]
    parent_BN = jnp.sum(jnp.where(is_parent_BNN, jnp.arange(budget + 1, dtype=jnp.int32), 0), axis=2, dtype=jnp.int32)
    parent_BN = with_root(jnp.where(valid_BN, parent_BN, 0), -1)
    depth_BN = with_root(jnp.where(valid_BN, pick(depth_BC), 1), 0)
    holds_BNS = number_BN[:, :, None] == ran_BS[:, None, :]
    slots_S = jnp.arange(ran_BS.shape[1], dtype=jnp.int32)
    slot_BN = jnp.sum(jnp.where(holds_BNS, slots_S + 1, 0), axis=2, dtype=jnp.int32) - 1
    tree = TokenTree.grown(
        jnp.concatenate([root[:, None], pick(tokens_BC)], axis=1),
        parent_BN,
        depth_BN,
        with_root(valid_BN, True),
        with_root(pick(rank_BC), 0),
        width,
        rule,
        *(() if proposals is None else (proposals, slot_BN)),
    )
    return tree, slot_BN
