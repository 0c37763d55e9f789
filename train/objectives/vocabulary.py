"""Which tokens two models are compared over.

Models of one tokenizer may have tables of different sizes, padded for the hardware. All that is compared or mixed is so
over the first tokens, those that both tables have, before anything is normalised; what lies beyond them is no text.
"""

import functools
from collections.abc import Callable
from typing import Any

from jax.tree_util import Partial
from jaxtyping import Array, Float

from models import transformer
from models.config import TransformerConfig
from models.transformer import Params


def shared(*models: TransformerConfig) -> int:
    """How many tokens all of them have."""
    return min(model.vocab_size for model in models)


def reader(model: TransformerConfig, params: Params, size: int) -> Partial:
    """From what a model's vocabulary map reads to its scores of the first `size` tokens; bound is what is trained."""
    return Partial(functools.partial(_scores, model, size), transformer.head_params(params))


def first_tokens(read: Callable[..., Array], size: int) -> Callable[..., Array]:
    """The same scores of the first `size` tokens alone."""
    return lambda rows: read(rows)[..., :size]


def _scores(model: TransformerConfig, size: int, params: Any, hidden: Array) -> Float[Array, "*R W"]:
    return transformer.head(model, params, hidden)[..., :size]
