"""The kernel for TPUs, interpreted on this device, equals the dense path; what it cannot do is left to others."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import splash
from models.attention import ALONE, attend
from models.layout import BlockCausal, Layout

T, N, K, D = 128, 2, 1, 128
SEGMENTS = jnp.asarray([[1] * 50 + [2] * 70 + [0] * 8, [1] * 128])


def test_only_whole_tiles_of_causal_texts_fit() -> None:
    layout = Layout.causal(2, T)
    fits = [
        splash.fits(jnp.zeros((2, rows, N, dim)), layout) for rows, dim in ((T, D), (T, 2 * D), (T + 1, D), (T, 64))
    ]
    assert fits == [True, True, False, False]
    assert not splash.fits(jnp.zeros((2, T, N, D)), dataclasses.replace(layout, order=BlockCausal(2)))


@pytest.mark.slow
@pytest.mark.parametrize(("cap", "window"), [(None, None), (5.0, None), (None, 30)])
def test_the_kernel_equals_dense_attention(cap: float | None, window: int | None) -> None:
    """Values and slopes, of packed documents; padding at a text's end is nobody's."""
    rng = np.random.default_rng(0)
    q, k, v, weight = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((2, T, N, D), (2, K, D, T), (2, K, T, D), (2, T, N * D))
    )
    layout = Layout.causal(2, T, SEGMENTS)
    counted = weight * (SEGMENTS > 0)[:, :, None]

    def dense(q, k, v):
        mixed = attend(q, {"k": k, "v": v}, ALONE, layout, scale=D**-0.5, cap=cap, window=window)
        return jnp.sum(mixed * counted), mixed

    def kernel(q, k, v):
        mixed = splash.attend_on_tpu(q, k, v, layout, D**-0.5, cap, window).reshape(2, T, -1)
        return jnp.sum(mixed * counted), mixed

    (_, expected), slopes = jax.jit(jax.value_and_grad(dense, (0, 1, 2), has_aux=True))(q, k, v)
    (_, found), own_slopes = jax.jit(jax.value_and_grad(kernel, (0, 1, 2), has_aux=True))(q, k, v)
    real = np.asarray(SEGMENTS > 0)
    np.testing.assert_allclose(found[real], expected[real], atol=2e-6)
    for own, slope in zip(own_slopes, slopes, strict=True):
        np.testing.assert_allclose(own, slope, atol=1e-4)
