"""Random weights for what is timed: one small program for every shape that there is.

A single program that draws all of a large network's leaves takes an accelerator a minute to compile.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from models.formats.storage import leaves_by_path


def random_weights(shapes: PyTree, key: Array) -> PyTree:
    """Numbers of a standard deviation of 0.02, ones for the scales of norms, and 0, 1, 2, ... for tables of integers,
    such as the tokens of a draft vocabulary.

    Args:
      shapes: shapes and dtypes, with shardings where the leaves are to lie somewhere.
      key: of the draws.
    """
    found = [_drawn(jax.random.fold_in(key, i), *pair) for i, pair in enumerate(leaves_by_path(shapes).items())]
    return jax.tree.unflatten(jax.tree.structure(shapes), found)


def _drawn(key: Array, path: str, leaf: Any) -> Array:
    if jnp.issubdtype(leaf.dtype, jnp.integer):
        values = np.arange(leaf.size, dtype=leaf.dtype).reshape(leaf.shape)
    elif path.endswith("scale"):
        values = np.ones(leaf.shape, leaf.dtype)
    else:
        return _normal(leaf.shape, leaf.dtype, leaf.sharding)(key)
    return jax.device_put(values, leaf.sharding)


@functools.cache
def _normal(shape, dtype, sharding):
    return jax.jit(lambda key: 0.02 * jax.random.normal(key, shape, dtype), out_shardings=sharding)
