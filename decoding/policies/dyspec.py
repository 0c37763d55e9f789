"""DySpec: sampled trees that spend a budget where acceptance is likely (Xiong et al. 2024).

Every place for a candidate has a value before the candidate is drawn: the probability, if the draft distribution q were
the target's, that verification arrives there. The first child of x has q(path to x); each younger sibling has that
times one minus the probability of its elder siblings. The greedy form takes the most valuable place, draws a token for
it, and goes on until the budget is spent; since values only fall, these are simply the `budget` most valuable places of
all, and they are found level by level, in as many passes of the network as there are levels. The threshold form takes
every place worth more than `threshold`.

Whether a place is filled depends on its value, which no draw of its own token enters: `swor` verification stays exact.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from decoding.policies.by_value import Candidates, grow_by_value
from decoding.policies.policy import TreePolicy, draft_log_probabilities, gumbel_for
from decoding.sampling import best_tokens
from decoding.trees import MOST_CANDIDATES, refuse_huge
from models.errors import UserError


@dataclasses.dataclass(frozen=True)
class DySpec(TreePolicy):
    """The two forms in one: at most `budget` places, and only those worth more than `threshold`.

    Attributes:
      budget: candidates at most.
      depth: levels.
      width: candidates per level that run on; the greedy form is exact while no level wants more.
      branch: children per candidate at most.
      threshold: least value of a place, excluded; 0 leaves it to the budget.
    """

    budget: int = 16
    depth: int = 6
    width: int = 8
    branch: int = 8
    threshold: float = 0.0
    kind: ClassVar[str] = "dyspec"

    def __post_init__(self):
        for name in ("budget", "depth", "width", "branch"):
            if getattr(self, name) < 1:
                raise UserError(f"DySpec needs {name} of at least 1, got {getattr(self, name)}")
        refuse_huge(max(self.budget, self.depth))
        for name in ("width", "branch"):
            if getattr(self, name) > MOST_CANDIDATES:
                raise UserError(f"DySpec needs {name} of at most {MOST_CANDIDATES}, got {getattr(self, name)}")
        if not 0 <= self.threshold < 1:
            raise UserError(f"DySpec's threshold must lie in [0, 1), got {self.threshold}")

    @property
    def max_nodes(self) -> int:
        return 1 + self.budget

    @property
    def max_depth(self) -> int:
        return self.depth

    @property
    def levels(self) -> tuple[int, ...]:
        return 1, *(self.width,) * (self.depth - 1)

    def check(self, vocab_size: int) -> None:
        if self.branch > vocab_size:
            raise UserError(f"DySpec with branch {self.branch} asks for more children than {vocab_size} tokens")

    def rule(self, greedy):
        return "point" if greedy else "swor"

    def grow(self, network, root, keys, sampling):
        def expand(scores, value_BF, level):
            # How many candidates of one row are kept decides about those of another: each row draws its own.
            scores = scores.each()
            logq_BFW = draft_log_probabilities(scores.logits, sampling)
            noise = gumbel_for(keys, sampling, level, logq_BFW.shape[1:], logq_BFW.dtype)
            outputs_BFK = best_tokens(logq_BFW + noise, self.branch)
            q_BFK = jnp.exp(jnp.take_along_axis(logq_BFW, outputs_BFK, axis=2))
            # Shifted instead of subtracted: rounding must let no place rise above the one before it.
            elders_BFK = jnp.pad(jnp.cumsum(q_BFK, axis=2)[:, :, :-1], ((0, 0), (0, 0), (1, 0)))
            value_BF1 = jnp.maximum(value_BF, 0)[:, :, None]
            worth_BFK = value_BF1 * jnp.clip(1 - elders_BFK, 0, 1)
            onward_BFK = jnp.minimum(value_BF1 * q_BFK, worth_BFK)
            drawn_from = None if sampling.greedy else scores.over_target(jnp.exp(logq_BFW), network.vocab_size)
            return Candidates(scores.of_target(outputs_BFK), worth_BFK, onward_BFK, drawn_from)

        sizes = dict(width=self.width, depth=self.depth, budget=self.budget)
        return grow_by_value(
            network, root, expand, start=1.0, rule=self.rule(sampling.greedy), least=self.threshold, **sizes
        )

    def with_budget(self, candidates, acceptance=None):
        sizes = {name: min(candidates, getattr(self, name)) for name in ("depth", "width", "branch")}
        return dataclasses.replace(self, budget=candidates, **sizes)
