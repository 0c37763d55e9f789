"""Kernels in blocks multiply as they do whole."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import linear, pages

WIDTH, OUT = 96, 320


@pytest.fixture(autouse=True)
def _small_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "LEAST_BYTES", 1024)
    monkeypatch.setattr(pages, "are_huge", lambda: True)
    monkeypatch.setattr(linear, "MOST_ROWS", 8)
    # Two rows or more are too little for two cores, unless in chunks.
    monkeypatch.setattr(linear, "SHARE", 2**11)
    monkeypatch.setattr(linear, "WORTH_WAKING", 0)
    monkeypatch.setattr(linear, "_cores", lambda: 2)


def _normal(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(len(shape)).standard_normal(shape), jnp.float32)


def test_blocks_multiply_as_the_whole_kernel_does() -> None:
    kernel, bias = _normal(WIDTH, OUT), _normal(OUT)
    blocks = linear.in_blocks(kernel)
    assert blocks.shape == (5, WIDTH, 64)
    np.testing.assert_array_equal(linear.whole(blocks), kernel)
    assert linear.in_blocks(blocks) is blocks
    assert linear._chunks(blocks, 6) == 2
    inputs = [_normal(*shape) for shape in ((WIDTH,), (1, 1, WIDTH), (2, 3, WIDTH), (linear.MOST_ROWS + 1, WIDTH))]

    @jax.jit
    def both(inputs):
        layers = nn.Dense(OUT), linear.Linear(OUT)
        params = ({"kernel": kernel, "bias": bias}, {"kernel": blocks, "bias": bias})
        return [[layer.apply({"params": p}, x) for layer, p in zip(layers, params, strict=True)] for x in inputs]

    for expected, got in both(inputs):
        np.testing.assert_allclose(got, expected, atol=1e-4)


def test_products_are_cut_where_another_core_gains_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    wide, narrow = jnp.zeros((48, 576, 64)), jnp.zeros((9, 576, 64))

    def chunks(kernel):
        return [linear._chunks(kernel, rows) for rows in (2, 8, 16, 32)]

    monkeypatch.setattr(linear, "_cores", lambda: 2)
    assert chunks(wide) == [1, 3, 2, 2]
    assert chunks(narrow) == [1, 2, 2, 3]
    monkeypatch.setattr(linear, "_cores", lambda: 8)
    assert chunks(wide) == [1, 12, 6, 3]
    monkeypatch.setattr(linear, "_cores", lambda: 1)
    assert chunks(wide) == [1, 2, 2, 2]


def test_products_of_a_row_are_bitwise_independent_of_its_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(linear, "_cores", lambda: 2)
    kernel, x, others = _normal(48, 576, 64), _normal(8, 576), _normal(1, 8, 576)[0]
    product = jax.jit(linear.product)
    mixed, order = jnp.where(jnp.arange(8)[:, None] % 3 == 0, x, others), np.arange(8)[::-1]
    np.testing.assert_array_equal(product(mixed, kernel)[::3], product(x, kernel)[::3])
    np.testing.assert_array_equal(product(x[order], kernel)[order], product(x, kernel))


def test_scores_by_a_table_are_products_with_its_transpose() -> None:
    table, x = _normal(OUT, WIDTH), _normal(2, 3, WIDTH)
    blocks = linear.table_in_blocks(table)
    assert blocks.shape == (5, WIDTH, 64) and linear.table_in_blocks(blocks) is blocks
    np.testing.assert_array_equal(linear.whole_table(blocks), table)
    tokens = jnp.array([[0, 63], [64, OUT - 1]])
    np.testing.assert_array_equal(linear.rows_of_table(blocks, tokens), linear.rows_of_table(table, tokens))
    scores = jax.jit(lambda tables, x: [linear.product_with_rows(x, table, jnp.float32) for table in tables])
    for ours in scores([table, blocks], x):
        np.testing.assert_allclose(ours, np.asarray(x) @ np.asarray(table).T, atol=1e-4)


def test_kernels_stay_whole_where_blocks_win_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for kernel in (_normal(2, 64), _normal(WIDTH, 100)):
        assert linear.in_blocks(kernel) is kernel
    with monkeypatch.context() as small:
        small.setattr(pages, "are_huge", lambda: False)
        assert linear.in_blocks(_normal(WIDTH, OUT)).shape == (WIDTH, OUT)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert linear.in_blocks(_normal(WIDTH, OUT)).shape == (WIDTH, OUT)
