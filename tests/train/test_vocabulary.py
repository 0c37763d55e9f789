"""Tables of two sizes are compared over what both have."""

import jax.numpy as jnp
import numpy as np

from models.config import TransformerConfig
from tests.train.conftest import SHAPE
from train.objectives import vocabulary


def test_two_models_are_compared_over_the_tokens_that_both_have() -> None:
    small, large = (TransformerConfig(**{**SHAPE, "vocab_size": size, "tied_embeddings": True}) for size in (5, 8))
    size = vocabulary.shared(large, small)
    rng = np.random.default_rng(0)
    table, hidden = (jnp.asarray(rng.normal(size=(rows, SHAPE["width"])), jnp.float32) for rows in (8, 2))
    read = vocabulary.reader(large, {"embed": {"embedding": table}}, size)
    whole = np.asarray(hidden) @ np.asarray(table).T
    np.testing.assert_allclose(read(hidden), whole[:, :5], rtol=1e-5)
    np.testing.assert_array_equal(vocabulary.first_tokens(lambda rows: rows, 3)(hidden), hidden[:, :3])
