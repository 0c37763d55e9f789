"""The oracle: replays a text that is known beforehand, and is wrong as often as it is told to be.

It costs nothing and is right as often as one likes, so what a decode with it takes beyond the target's forwards is the
loop's own: `eval.speed` measures loop efficiency with it. For measurements and tests; nobody has a text beforehand.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from decoding.drafter import Drafter
from decoding.trees import chain
from models.errors import UserError


@dataclasses.dataclass(frozen=True)
class Oracle(Drafter):
    """A chain of what stands next in the known text; invalid behind its end.

    The parameters are `text`, int32 `[known]`, token i of which is what it takes for token i of every row's text,
    prompt included; and `rate`, float32 `[]`: how often a candidate is that token, and not the one after it in the
    vocabulary. Where the text is the target's own greedy one, candidates behind accepted ones are accepted at that
    rate.

    Attributes:
      depth: candidates.
      known: tokens of the text.
    """

    depth: int = 4
    known: int = 1024
    name: ClassVar[str] = "oracle"

    @property
    def max_nodes(self) -> int:
        return self.depth + 1

    @property
    def max_depth(self) -> int:
        return self.depth

    def check(self, config):
        for field in ("depth", "known"):
            if getattr(self, field) < 1:
                raise UserError(f"{self.name} needs {field} of at least 1, got {getattr(self, field)}")

    def init_params(self, config, target, key):
        """A text of random tokens, always replayed."""
        return {"text": jax.random.randint(key, (self.known,), 0, config.vocab_size), "rate": jnp.float32(1)}

    def draft(self, params, target, state, root, keys):
        place_BN = target.length[:, None] + jnp.arange(self.max_nodes, dtype=jnp.int32)
        told_BN = params["text"][jnp.minimum(place_BN, self.known - 1)]
        luck_BN = jax.vmap(lambda key: jax.random.uniform(key, (self.max_nodes,)))(keys)
        told_BN = jnp.where(luck_BN < params["rate"], told_BN, (told_BN + 1) % target.config.vocab_size)
        tree = chain(self.depth).fill(told_BN.at[:, 0].set(root), self.rule(target.sampling.greedy))
        return dataclasses.replace(tree, valid=(place_BN < self.known).at[:, 0].set(True)), None

    def with_budget(self, candidates, acceptance=None):
        return dataclasses.replace(self, depth=candidates)
