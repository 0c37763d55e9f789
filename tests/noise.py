"""Noise on parameters, so that nothing keeps the value that it starts with, which may hide a mistake."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def noisy(tree: Any, std: float, seed: int = 0) -> Any:
    """`tree` with normal noise added to every floating leaf; drawn by NumPy, for which no program is compiled."""
    rng = np.random.default_rng(seed)

    def moved(leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        return jnp.asarray(np.asarray(leaf) + std * rng.normal(size=leaf.shape), leaf.dtype)

    return jax.tree.map(moved, tree)
