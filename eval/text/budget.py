"""A drafter's best tree of a given size, chosen alike for every method whose tree is static.

1. The drafter decodes calibration prompts with a probing tree that is much wider than what is asked for, and the loop's
   own counters say how often the k-th guess below an accepted node of depth d was accepted. Counting in the loop, at
   the places where steps start and with the drafts' own verification, needs no teacher-forced forward, so it serves
   heads, networks and tables, greedy and sampled.
2. The drafter, or the policy of its network, finds its best tree of each size from these counts: most grow the one with
   the largest expected acceptance, Sequoia and RSD-C search in their own ways (`decoding/tree_search.py`). One whose
   tree is dynamic (EAGLE-2's, DySpec's) chooses for itself and is only told its size.
"""

import functools
from collections.abc import Callable

from decoding.drafter import Drafter
from decoding.policies import POLICIES, parse_policy
from decoding.policies.policy import TreePolicy
from decoding.policies.published import PUBLISHED
from decoding.stats import Stats
from decoding.tree_search import Acceptance
from models.errors import UserError


def parse_any_policy(text: str) -> TreePolicy:
    """How a tree grows, whatever its size: by the name of its paper, or written out as for `--policy`.

    Raises:
      UserError: neither.
    """
    if text in PUBLISHED or text.partition(":")[0] in POLICIES:
        return PUBLISHED.get(text) or parse_policy(text)
    raise UserError(f"there is no policy {text!r}; known are {', '.join(PUBLISHED)}, and {', '.join(POLICIES)}")


def check_policy(drafter: Drafter, policy: str | None) -> None:
    """Raises UserError where there is a policy for a drafter without, or none for one with; as `Fitter` takes them."""
    if drafter.tree_policy is not None and policy == "":
        raise UserError(
            f"which policy makes the trees of {drafter.name}? Say @POLICY, {', '.join(PUBLISHED)} for instance"
        )
    if policy and drafter.tree_policy is None:
        raise UserError(f"{drafter.name} has one way to grow its tree, so @{policy} has no meaning for it")


class Fitter:
    """Fits one drafter to budgets. Calibrates once, where there is a static topology to choose."""

    def __init__(self, drafter: Drafter, policy: str | None, decode: Callable[[Drafter], Stats]):
        """Prepares the fits.

        Args:
          drafter: to be fitted.
          policy: for drafters that have a policy what `parse_any_policy` reads; "" for all others. None lets trees grow
            as they do now.
          decode: decodes the calibration prompts with a drafter.

        Raises:
          UserError: a policy for a drafter without, or none for one with.
        """
        check_policy(drafter, policy)
        self._drafter = drafter.with_policy(parse_any_policy(policy)) if policy else drafter
        self._decode = decode

    def fit(self, budget: int) -> Drafter | None:
        """The drafter with exactly `budget` candidates; None where it cannot have so many."""
        return self._drafter.with_budget(budget, self.acceptance)

    @functools.cached_property
    def acceptance(self) -> Acceptance | None:
        """How often guesses are right; None for one whose trees need no counts."""
        probing = self._drafter.probing()
        if probing is None:
            return None
        assert probing.topology is not None
        return Acceptance.counted(probing.topology, self._decode(probing))
