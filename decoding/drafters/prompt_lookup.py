"""Prompt lookup: what followed the last few tokens when they stood in the text before is likely to follow again.

The longest suffix of at most `ngram` tokens, the pending one included, that occurs earlier is found by comparing the
text with itself, shifted, and one maximum; what stood behind it is the draft, a chain. No parameters, no state, and a
text that never repeats costs one token per forward, as plain decoding does (Saxena 2023, "Prompt Lookup Decoding").
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Int

from decoding.drafter import Drafter
from decoding.trees import MOST_CANDIDATES, chain, refuse_huge
from models.errors import UserError


@dataclasses.dataclass(frozen=True)
class PromptLookup(Drafter):
    """A chain copied from earlier in the text; all of it invalid where no token of the suffix occurs earlier.

    Attributes:
      depth: tokens to copy.
      ngram: longest suffix to look for; shorter ones where it does not occur.
      shortest: where to stop; 1 is the pending token alone. In a combination a higher bar leaves more to the other
        drafter: one token almost always stood in the text before, and says little about what follows.
    """

    depth: int = 10
    ngram: int = 3
    shortest: int = 1
    name: ClassVar[str] = "prompt_lookup"
    bare_names: ClassVar[tuple[str, ...]] = (
        "prompt_lookup",
        "prompt_lookup:SHORTEST",
        "prompt_lookup:SHORTEST:CANDIDATES",
    )

    # On chats of SmolLM2-135M (docs/results/smollm2/decode.json).
    known_sizes: ClassVar[tuple[tuple[int, float], ...]] = ((1, 1.17), (2, 1.27), (4, 1.40), (10, 1.57))

    @classmethod
    def from_name(cls, argument):
        if not argument:
            return cls()
        numbers = argument.split(":")
        if len(numbers) > 2 or not all(number.isdecimal() for number in numbers):
            return None
        names = ("shortest", "depth")
        return cls(**dict(zip(names, map(int, numbers), strict=False)))

    @property
    def max_nodes(self) -> int:
        return self.depth + 1

    @property
    def max_depth(self) -> int:
        return self.depth

    def check(self, config):
        for field in ("depth", "shortest"):
            if getattr(self, field) < 1:
                raise UserError(f"{self.name} needs {field} of at least 1, got {getattr(self, field)}")
        refuse_huge(self.depth)
        if self.ngram > MOST_CANDIDATES:
            raise UserError(f"{self.name} needs ngram of at most {MOST_CANDIDATES}, got {self.ngram}")
        if self.ngram < self.shortest:
            raise UserError(f"{self.name} needs ngram of at least shortest ({self.shortest}), got {self.ngram}")

    def draft(self, params, target, state, root, keys):
        text_BC, length_B = target.all_text()
        match_B = find_match(text_BC, length_B, self.ngram, self.depth, self.shortest)
        place_BN = match_B[:, None] + jnp.arange(self.max_nodes, dtype=jnp.int32)
        known_BN = (match_B[:, None] >= 0) & (place_BN <= length_B[:, None])
        copied_BN = jnp.take_along_axis(text_BC, jnp.where(known_BN, place_BN, 0), axis=1)
        # The match ends with a copy of the root, so node 0 needs no care but for rows without a match.
        tree = chain(self.depth).fill(copied_BN.at[:, 0].set(root), self.rule(target.sampling.greedy))
        return dataclasses.replace(tree, valid=known_BN.at[:, 0].set(True)), None

    def with_budget(self, candidates, acceptance=None):
        return dataclasses.replace(self, depth=candidates)


def find_match(
    text: Int[Array, "B C"], length: Int[Array, "B"], ngram: int, depth: int, shortest: int = 1
) -> Int[Array, "B"]:
    """Where the text's suffix occurred before.

    Of all earlier places the one with the longest common suffix (counted up to `ngram`) is taken; among those the last
    that `depth` tokens follow, or the first where none has so many behind it, which is the one that most follow. The
    published code takes the first with a full continuation and skips the others; the last is the better guess because
    texts drift.

    Args:
      text: the suffix ends at `text[b, length[b]]`; what lies behind is not looked at.
      length: index of the last known token.
      ngram: tokens to compare at most.
      depth: tokens that should follow.
      shortest: a common suffix of fewer tokens is none.

    Returns:
      Index of the last token of the match, less than `length`; -1 where there is none.
    """
    size = text.shape[1]
    place_C = jnp.arange(size, dtype=jnp.int32)
    same_BC = place_C < length[:, None]
    common_BC = jnp.zeros(text.shape, jnp.int32)
    for back in range(ngram):
        wanted_B1 = jnp.take_along_axis(text, jnp.maximum(length - back, 0)[:, None], axis=1)
        earlier_BC = jnp.pad(text, ((0, 0), (back, 0)))[:, :size]
        same_BC &= (place_C >= back) & (earlier_BC == wanted_B1)
        common_BC += same_BC
    is_full_BC = place_C + depth <= length[:, None]
    # One number orders the candidates: common suffix first, then full before cut short, then late or early.
    order_BC = jnp.where(is_full_BC, size + place_C, size - 1 - place_C)
    best_B = jnp.max(jnp.where(common_BC >= shortest, 2 * size * common_BC + order_BC, -1), axis=1)
    order_B = best_B % (2 * size)
    return jnp.where(best_B < 0, -1, jnp.where(order_B >= size, order_B - size, size - 1 - order_B))
