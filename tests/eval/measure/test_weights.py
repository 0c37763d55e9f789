"""Random weights have the shapes that were asked for, and no program draws more than one of them."""

import jax
import jax.numpy as jnp
import numpy as np

from eval.measure import weights
from eval.measure.weights import random_weights


def test_weights_are_drawn_by_shape() -> None:
    shapes = {
        "kernel": jax.ShapeDtypeStruct((300, 40), jnp.bfloat16),
        "layers": [{"kernel": jax.ShapeDtypeStruct((300, 40), jnp.bfloat16)}],
        "norm": {"scale": jax.ShapeDtypeStruct((7,), jnp.float32)},
        "tokens": jax.ShapeDtypeStruct((2, 3), jnp.int32),
    }
    weights._normal.cache_clear()
    found = random_weights(shapes, jax.random.key(0))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), found) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), shapes
    )
    assert weights._normal.cache_info().currsize == 1, "two leaves of one shape share a program"
    first, second = (np.asarray(x, np.float32) for x in (found["kernel"], found["layers"][0]["kernel"]))
    assert (first != second).any() and abs(first.std() - 0.02) < 0.001
    assert (found["norm"]["scale"] == 1).all()
    np.testing.assert_array_equal(found["tokens"], [[0, 1, 2], [3, 4, 5]])
