"""Winograd's convolution is the convolution: against sums written out in NumPy, in value, slope and parameters."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.images import convolution
from models.images.convolution import Conv3x3, convolve, direct, winograd


def case(shape: tuple[int, int, int, int], channels: int, dtype) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return (
        rng.standard_normal(shape).astype(dtype),
        (rng.standard_normal((3, 3, shape[-1], channels)) / np.sqrt(9 * shape[-1])).astype(dtype),
    )


def correlate(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    B, H, W, _ = x.shape
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    out = np.zeros((B, H, W, kernel.shape[-1]), x.dtype)
    for row in range(3):
        for column in range(3):
            out += padded[:, row : row + H, column : column + W] @ kernel[row, column]
    return out


@pytest.mark.parametrize("shape", [(2, 4, 6, 5), (1, 2, 2, 1), (3, 8, 2, 4)])
def test_it_is_the_sum_over_nine_neighbours(shape: tuple[int, int, int, int]) -> None:
    x, kernel = case(shape, 7, np.float64)
    with jax.enable_x64(True):
        every = jax.jit(lambda x, kernel: [function(x, kernel) for function in (winograd, direct, convolve)])
        for found in every(jnp.asarray(x), jnp.asarray(kernel)):
            np.testing.assert_allclose(found, correlate(x, kernel), atol=1e-13)


def test_float32_loses_little() -> None:
    x, kernel = case((2, 32, 32, 64), 64, np.float32)
    exact = correlate(x.astype(np.float64), kernel.astype(np.float64))
    assert np.abs(jax.jit(winograd)(jnp.asarray(x), jnp.asarray(kernel)) - exact).max() < 1e-5


def test_slopes_are_those_of_the_convolution() -> None:
    x, kernel = case((2, 4, 6, 3), 5, np.float64)

    def loss(function):
        return lambda x, kernel: jnp.sum(jnp.sin(function(x, kernel)))

    with jax.enable_x64(True):
        given = jnp.asarray(x), jnp.asarray(kernel)
        ours, theirs = (jax.jit(jax.grad(loss(function), argnums=(0, 1)))(*given) for function in (winograd, direct))
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-12)


@pytest.mark.parametrize(
    ("shape", "dtype"), [((1, 33, 32, 4), np.float32), ((1, 8, 8, 4), np.float32), ((1, 32, 32, 4), jnp.bfloat16)]
)
def test_odd_sides_few_places_and_narrow_numbers_go_the_direct_way(shape, dtype) -> None:
    x, kernel = map(jnp.asarray, case(shape, 4, dtype))
    assert "dot_general" not in str(jax.make_jaxpr(convolve)(x, kernel))
    np.testing.assert_array_equal(convolve(x, kernel), direct(x, kernel))


def test_one_platform_compiles_one_way() -> None:
    x, kernel = case((1, 32, 32, 4), 4, np.float32)
    assert 4 * convolution._FEWEST_PATCHES <= 32 * 32
    text = jax.jit(convolve).lower(x, kernel).as_text()
    assert text.count("stablehlo.dot_general") == 16 and "stablehlo.convolution" not in text
    elsewhere = jax.jit(convolve).trace(x, kernel).lower(lowering_platforms=("tpu",)).as_text()
    assert "stablehlo.dot_general" not in elsewhere and elsewhere.count("stablehlo.convolution") == 1


def test_parameters_are_those_of_flax() -> None:
    @jax.jit
    def both(key, x):
        modules = Conv3x3(5), nn.Conv(5, (3, 3))
        params = [module.init(key, x) for module in modules]
        return params, [module.apply(params[0], x) for module in modules]

    params, outputs = both(jax.random.key(3), jnp.ones((1, 4, 4, 3)))
    jax.tree.map(np.testing.assert_array_equal, *params)
    np.testing.assert_allclose(*outputs, atol=1e-6)
