"""Resampling of latent maps: the matrices against loops over taps and against torch, and the table of convolutions."""

import jax.numpy as jnp
import numpy as np
import pytest

from models.images.config import SCHEDULES
from models.images.resample import down_matrix, phi_table, resample, up_matrix
from tests import image_reference as reference

SIDES = [(p, scales[-1]) for scales in (*SCHEDULES.values(), (1, 2, 3, 4, 5)) for p in scales]


@pytest.mark.parametrize(("side", "size"), SIDES)
def test_matrices_match_loops_over_taps(side: int, size: int) -> None:
    row = np.eye(side)[None, :, :]  # one column of pixels per channel, so that only rows change
    np.testing.assert_allclose(up_matrix(side, size), reference.up(_square(row), size)[0, :, 0], atol=1e-14)
    row = np.eye(size)[None, :, :]
    np.testing.assert_allclose(down_matrix(size, side), reference.down(_square(row), side)[0, :, 0], atol=1e-14)


def _square(x_BHC: np.ndarray) -> np.ndarray:
    return np.repeat(x_BHC[:, :, None], x_BHC.shape[1], axis=2)


@pytest.mark.usefixtures("x64")
def test_rows_and_columns_are_resampled() -> None:
    x = np.random.default_rng(0).normal(size=(2, 5, 5, 3))
    np.testing.assert_allclose(resample(up_matrix(5, 16), jnp.asarray(x)), reference.up(x, 16), atol=1e-13)
    np.testing.assert_allclose(resample(down_matrix(5, 3), jnp.asarray(x)), reference.down(x, 3), atol=1e-13)
    assert resample(up_matrix(5, 16), jnp.asarray(x, jnp.bfloat16)).dtype == jnp.float32


@pytest.mark.parity
@pytest.mark.parametrize(("side", "size"), SIDES)
def test_torch_resamples_alike(side: int, size: int) -> None:
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    rng = np.random.default_rng(side)
    small, large = rng.normal(size=(1, 2, side, side)), rng.normal(size=(1, 2, size, size))
    up = functional.interpolate(torch.from_numpy(small), size=(size, size), mode="bicubic").numpy()
    down = functional.interpolate(torch.from_numpy(large), size=(side, side), mode="area").numpy()
    np.testing.assert_allclose(up_matrix(side, size) @ small @ up_matrix(side, size).T, up, atol=1e-12)
    np.testing.assert_allclose(down_matrix(size, side) @ large @ down_matrix(size, side).T, down, atol=1e-12)


def test_every_scale_gets_the_convolution_it_was_trained_with() -> None:
    for K, table in reference.PHIS.items():
        assert list(phi_table(K, 4)) == table
    for K in range(2, 25):
        assert list(phi_table(K, 4)) == reference.phis(K, 4)
    assert phi_table(7, 1) == (0,) * 7
    # The trap: in float32 one of the two ties at 10 scales falls the other way.
    ticks, places = np.linspace(1 / 12, 11 / 12, 4, dtype=np.float32), np.arange(10, dtype=np.float32) / np.float32(9)
    narrow = np.abs(ticks - places[:, None]).argmin(-1)
    assert narrow.tolist() != reference.PHIS[10]
