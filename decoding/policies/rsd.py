"""RSD-S: a tree by stochastic beam search (Jeon et al. 2024, Recursive Speculative Decoding, section 3).

The W best sequences of each length stay, by a log-probability that was perturbed once: every candidate's perturbation
is conditioned on its siblings' largest being its parent's own, which makes the beam a draw of W *sequences* without
replacement (Kool et al. 2019). All that ever stayed is the tree. Whether a candidate is cut depends on how large its
perturbed score is, never on which token it is, so verification as `swor` stays exact.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from decoding.policies.policy import (
    Grown,
    Scores,
    TreePolicy,
    draft_log_probabilities,
    gumbel_for,
    own_slot,
)
from decoding.sampling import best_logits, top_k
from decoding.trees import TokenTree, refuse_huge
from models.errors import UserError


@dataclasses.dataclass(frozen=True)
class StochasticBeam(TreePolicy):
    """RSD-S; where every row decodes greedily, ordinary beam search, which ranks.

    Attributes:
      width: W, candidates kept per level.
      depth: levels.
    """

    width: int = 4
    depth: int = 4
    kind: ClassVar[str] = "stochastic_beam"

    def __post_init__(self):
        if self.width < 1 or self.depth < 1:
            raise UserError(f"a stochastic beam needs width and depth of at least 1, got {self.width} and {self.depth}")
        refuse_huge(self.width * self.depth)

    @property
    def max_nodes(self) -> int:
        return 1 + self.width * self.depth

    @property
    def max_depth(self) -> int:
        return self.depth

    @property
    def levels(self) -> tuple[int, ...]:
        return 1, *(self.width,) * (self.depth - 1)

    def rule(self, greedy):
        return "point" if greedy else "swor"

    def grow(self, network, root, keys, sampling):
        batch, W = root.shape[0], self.width
        scores, scratch = network.begin(root, self.slots)
        phi_BF = jnp.zeros((batch, 1), scores.logits.dtype)
        score_BF, alive_BF = phi_BF, jnp.ones((batch, 1), bool)
        seen_BFS = jnp.zeros((batch, 1, self.slots), bool)
        levels = [(root[:, None], jnp.full((batch, 1), -1, jnp.int32), jnp.zeros((batch, 1), jnp.int32), alive_BF)]
        proposals, first = [], 0
        for depth in range(self.depth):
            scores = scores.each()
            logq_BFW = draft_log_probabilities(scores.logits, sampling)
            proposals.append(scores.over_target(jnp.exp(logq_BFW), network.vocab_size))
            noise = gumbel_for(keys, sampling, depth, logq_BFW.shape[1:], logq_BFW.dtype)
            phi_BFW = phi_BF[:, :, None] + logq_BFW
            # Siblings are ordered by what they drew: conditioning keeps that order, but rounds some of them to ties.
            drawn_BFK, outputs_BFK = best_logits(phi_BFW + noise, min(W, phi_BFW.shape[2]))
            conditioned_BFK = condition_maximum(drawn_BFK, score_BF)
            score_BFK = jnp.where(sampling.temperature[:, None, None] > 0, conditioned_BFK, drawn_BFK)
            score_BFK = jnp.where(alive_BF[:, :, None], score_BFK, -jnp.inf)
            score_BF, parent_BF, output_BF = _best_of_all(score_BFK, outputs_BFK, W)
            phi_BF = jnp.take_along_axis(
                jnp.take_along_axis(phi_BFW, parent_BF[:, :, None], axis=1), output_BF[:, :, None], axis=2
            )[:, :, 0]
            alive_BF = score_BF > -jnp.inf
            tokens_BF = _tokens(scores, parent_BF, output_BF)
            levels.append((tokens_BF, first + parent_BF, _rank(parent_BF), alive_BF))
            if depth + 1 < self.depth:
                # Node and slot are the same here, since all but the last level run.
                seen_BFS = own_slot(parent_BF, seen_BFS, first + parent_BF)
                first = 1 + W * depth
                scores, scratch = network.extend(scratch, depth + 1, first, tokens_BF, levels[-1][1], seen_BFS)
        tokens, parent, rank, valid = (jnp.concatenate(column, axis=1) for column in zip(*levels, strict=True))
        index_N = jnp.arange(self.max_nodes, dtype=jnp.int32)
        slot_of_node = jnp.where(index_N < self.slots, index_N, -1)[None]
        depth_N = jnp.where(index_N > 0, 1 + (index_N - 1) // W, 0)
        sampled = () if sampling.greedy else (jnp.concatenate(proposals, axis=1), slot_of_node)
        depth_BN = jnp.broadcast_to(depth_N, tokens.shape)
        return Grown(
            TokenTree.grown(tokens, parent, depth_BN, valid, rank, W, self.rule(sampling.greedy), *sampled),
            slot_of_node,
            scratch,
        )

    def with_budget(self, candidates, acceptance=None):
        width, rest = divmod(candidates, self.depth)
        return dataclasses.replace(self, width=width) if width and not rest else None


def condition_maximum(g_BFK: Float[Array, "B F K"], maximum_BF: Float[Array, "B F"]) -> Float[Array, "B F K"]:
    """Gumbel-perturbed scores, largest first, given that the largest is `maximum` (Kool et al. 2019, section 4.1).

    Order stays, but for ties, and the largest becomes `maximum` exactly.
    """
    maximum = maximum_BF[:, :, None]
    v = maximum - g_BFK + jnp.log1p(-jnp.exp(g_BFK - g_BFK[:, :, :1]))
    return maximum - jnp.maximum(v, 0) - jnp.log1p(jnp.exp(-jnp.abs(v)))


def _best_of_all(
    scores_BFK: Float[Array, "B F K"], outputs_BFK: Int[Array, "B F K"], count: int
) -> tuple[Float[Array, "B W"], Int[Array, "B W"], Int[Array, "B W"]]:
    """The `count` best of all rows of a frontier: score, row, output. Missing ones have the score -inf."""
    batch, _, each = scores_BFK.shape
    values, outputs = scores_BFK.reshape(batch, -1), outputs_BFK.reshape(batch, -1)
    short = max(0, count - values.shape[1])
    best, place = top_k(jnp.pad(values, ((0, 0), (0, short)), constant_values=-jnp.inf), count)
    place = jnp.minimum(place, values.shape[1] - 1).astype(jnp.int32)
    return best, place // each, jnp.take_along_axis(outputs, place, axis=1)


def _tokens(scores: Scores, row_BW: Int[Array, "B W"], output_BW: Int[Array, "B W"]) -> Int[Array, "B W"]:
    """Target tokens of outputs, each of a row."""
    if scores.tokens is None or scores.tokens.ndim == 1:
        return scores.of_target(output_BW[:, None])[:, 0]
    return jax.vmap(lambda tokens, row, output: tokens[row, output])(scores.tokens, row_BW, output_BW)


def _rank(parent_BF: Int[Array, "B F"]) -> Int[Array, "B F"]:
    """Place of each among those of the same parent, in the order given."""
    same: Bool[Array, "B F F"] = parent_BF[:, :, None] == parent_BF[:, None, :]
    return jnp.sum(jnp.tril(same, -1), axis=2, dtype=jnp.int32)
