"""Parameters of which nothing has the value that it starts with, which may hide a mistake; drawn by NumPy, for which no
program is compiled."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def noisy(tree: Any, std: float, seed: int = 0) -> Any:
    """`tree` with normal noise added to every floating leaf."""
    rng = np.random.default_rng(seed)

    def moved(leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        # Cast here: by JAX it would be a program for each shape.
        return jax.device_put(np.asarray(np.asarray(leaf) + std * rng.normal(size=leaf.shape), leaf.dtype))

    return jax.tree.map(moved, tree)


def drawn(shapes: Any, std: float, seed: int = 0) -> Any:
    """A tree of those shapes: norms' scales around one, everything else around zero."""
    start = jax.tree.map_with_path(
        lambda path, leaf: np.full(leaf.shape, float(path[-1].key == "scale"), leaf.dtype), shapes
    )
    return noisy(start, std, seed)
