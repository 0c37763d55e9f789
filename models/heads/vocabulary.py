"""A draft vocabulary: the W of the target's V tokens that a drafter scores, by a head of its own.

The tokens outside are never proposed: the drafter's distribution is zero there, which every acceptance rule takes as it
is. A network with outputs over W tokens calls them by their places, 0 to W - 1; tokens that it reads, roots among them,
are the target's, and any of V. The head begins as the target's on these tokens.

    {'vocab': {'kernel' [H, W]}, 'draft_vocab' int32 [W], target ids, ascending; absent where W = V}
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from models import transformer
from models.attention import softcap, wide
from models.config import TransformerConfig
from models.errors import UserError
from models.heads.medusa import vocab_kernel
from models.linear import product
from models.sharding import split_vocabulary
from models.transformer import Params


class DraftVocabulary:
    """Base of networks that score all tokens by the target's head or, where `vocab_size` is not 0, W by their own."""

    vocab_size: int

    def outputs(self, config: TransformerConfig) -> int:
        """W, the tokens that `logits` scores."""
        return self.vocab_size or config.vocab_size

    def logits(
        self, config: TransformerConfig, params: Params, target: Params, hidden: Float[Array, "*B H"]
    ) -> Float[Array, "*B W"]:
        """Scores of what the network guesses, float32 or wider."""
        if not self.vocab_size:
            return transformer.head(config, target, hidden)
        return scores(params, hidden, config.logit_softcap)

    def head_params(self, params: Params) -> Params:
        """Of the network's parameters, those that `logits` reads."""
        return {"vocab": params["vocab"]} if self.vocab_size else {}

    def vocabulary(self, params: Params) -> Int[Array, "W"] | None:
        """Target ids of the tokens that `logits` scores; None means all, in order."""
        return params.get("draft_vocab")


def check(size: int, config: TransformerConfig) -> None:
    """Raises UserError where the target has fewer tokens; 0 stands for all of them."""
    if not 0 <= size <= config.vocab_size:
        raise UserError(
            f"the draft vocabulary must have 0 (all) to {config.vocab_size} tokens, as many as the target's, got {size}"
        )


def init(size: int, target: Params) -> Params:
    """A head for the target's first tokens, in its dtype, and these; 0 is all, which need no list."""
    kernel = jnp.array(vocab_kernel(target)[:, : size or None])
    listed = {"draft_vocab": jnp.arange(size, dtype=jnp.int32)} if size else {}
    return {"vocab": {"kernel": kernel}, **listed}


def scores(params: Params, hidden: Float[Array, "*B H"], cap: float | None = None) -> Float[Array, "*B W"]:
    """The head's, float32 or wider, soft-capped as the target's are where `cap` is theirs."""
    return softcap(split_vocabulary(product(hidden, params["vocab"]["kernel"], wide(hidden.dtype))), cap)


def tokens_of(known: Int[Array, "W"] | None, outputs: Int[Array, "*B"]) -> Int[Array, "*B"]:
    """Target tokens of outputs; None says that these are all tokens, in order."""
    return outputs if known is None else known[outputs]


def outputs_of(known: Int[Array, "W"] | None, tokens: Int[Array, "*B"]) -> Int[Array, "*B"]:
    """Outputs of target tokens; -1 for tokens that have none."""
    if known is None:
        return tokens
    places = jnp.minimum(jnp.searchsorted(known, tokens), len(known) - 1).astype(jnp.int32)
    return jnp.where(known[places] == tokens, places, -1)
