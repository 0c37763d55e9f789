"""What the machine could do at best: how fast memory is read, and how many bytes a token needs."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from eval.measure.timing import Part
from models.config import TransformerConfig
from models.transformer import Params


def bandwidth_block(size: int) -> Float[Array, "R C"]:
    """A square matrix of at most `size` bytes, to be read."""
    return jnp.ones((block_side(size),) * 2, jnp.float32)


def block_side(size: int) -> int:
    """Side of a square of `size` bytes of float32."""
    return math.isqrt(size // 4)


def reduction(block: Float[Array, "R C"]) -> Part:
    """Reads a matrix once, for the maximum of each row, whose terms may come in any order and so are vectorised."""

    def rows(block, least_R):
        return jnp.max(jnp.maximum(block, least_R[:, None]), axis=1)

    return Part.of(rows, block, jnp.zeros(block.shape[0]))


def matrix_vector(block: Float[Array, "R C"]) -> Part:
    """Reads a matrix once, for its product with a vector."""
    return Part.of(lambda block, vector_C: block @ vector_C, block, jnp.ones(block.shape[1]))


def bytes_per_token(config: TransformerConfig, params: Params) -> int:
    """Bytes of weights that decoding one token reads: all but an embedding table of which it needs a single row."""
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    return total if config.tied_embeddings else total - params["embed"]["embedding"].nbytes
