"""EAGLE-2's dynamic tree: the draft network's own confidence decides where to look (Li et al. 2024, section 4).

A candidate is worth the log-probability of its path. Per level the best `top_k` run on, each offers its `top_k` best
tokens, and of all candidates ever offered the best `total - 1` are verified. Children are ranked, never drawn: rule
`point`, lossless at every temperature.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from decoding.policies.by_value import Candidates, grow_by_value
from decoding.policies.policy import TreePolicy
from decoding.sampling import best_logits
from decoding.trees import MOST_CANDIDATES, refuse_huge
from models.errors import UserError
from models.sharding import gather_rows


@dataclasses.dataclass(frozen=True)
class Confidence(TreePolicy):
    """The published defaults are 10, 6 and 60.

    Attributes:
      top_k: rows that run per level, and tokens that each offers.
      depth: levels.
      total: nodes of the tree, root included.
    """

    top_k: int = 10
    depth: int = 6
    total: int = 60
    kind: ClassVar[str] = "confidence"

    def __post_init__(self):
        if self.top_k < 1 or self.depth < 1:
            raise UserError(
                f"a tree by confidence needs top_k and depth of at least 1, got {self.top_k} and {self.depth}"
            )
        refuse_huge(max(self.total - 1, self.depth))
        if self.top_k > MOST_CANDIDATES:
            raise UserError(f"a tree by confidence needs top_k of at most {MOST_CANDIDATES}, got {self.top_k}")
        made = self.top_k + (self.depth - 1) * self.top_k**2
        if not 2 <= self.total <= 1 + made:
            raise UserError(
                f"a tree by confidence with top_k {self.top_k} and depth {self.depth} makes {made} candidates: total "
                f"must lie in 2..{1 + made}, got {self.total}"
            )

    @property
    def max_nodes(self) -> int:
        return self.total

    @property
    def max_depth(self) -> int:
        return self.depth

    @property
    def levels(self) -> tuple[int, ...]:
        return 1, *(self.top_k,) * (self.depth - 1)

    def check(self, vocab_size: int) -> None:
        if self.top_k > vocab_size:
            raise UserError(f"a tree by confidence asks for the {self.top_k} best of {vocab_size} tokens")

    def rule(self, greedy):
        return "point"

    def grow(self, network, root, keys, sampling):
        def expand(scores, value_BF, level):
            logits_BPW = gather_rows(scores.logits)
            best_BPK, outputs_BPK = best_logits(logits_BPW, self.top_k)
            # Rounding must let no path be worth more than its beginning.
            logp_BPK = jnp.minimum(best_BPK - jax.nn.logsumexp(logits_BPW, axis=2, keepdims=True), 0)
            worth_BFK = value_BF[:, :, None] + scores.of_rows(logp_BPK)
            return Candidates(scores.of_rows(scores.of_target(outputs_BPK)), worth_BFK, worth_BFK, None)

        sizes = dict(width=self.top_k, depth=self.depth, budget=self.total - 1)
        return grow_by_value(network, root, expand, start=0.0, rule=self.rule(sampling.greedy), **sizes)

    def with_budget(self, candidates, acceptance=None):
        made = self.top_k + (self.depth - 1) * self.top_k**2
        if candidates > made:
            return None
        # Of the best n no candidate is deeper than n, and none has n better ones in its level or among its siblings.
        top_k, depth = min(self.top_k, candidates), min(self.depth, candidates)
        return dataclasses.replace(self, top_k=top_k, depth=depth, total=candidates + 1)
