"""Products with parameters, whichever way they are computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import linear


def test_scores_by_a_table_are_products_with_its_transpose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "LEAST_BYTES", 1024)
    rng = np.random.default_rng(0)
    table, x = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((320, 96), (2, 3, 96)))
    scores = jax.jit(lambda table, x: linear.product_with_rows(x, table, jnp.float32))(table, x)
    np.testing.assert_allclose(scores, np.asarray(x) @ np.asarray(table).T, atol=1e-4)
