"""Changing the side of latent maps by static matrices: y = M x M^T (VAR; the tokenizer's code is their definition).

Codes of a small map are spread over the full one by bicubic interpolation as torch does it (a = -0.75, half-pixel
centres, taps beyond the edge read the edge), and the full map is averaged down to a small one over windows that
overlap where the sides do not divide. `jax.image.resize` does neither: its cubic has a = -0.5 and renormalises at
edges, which moves unit-normal features by 0.1 to 0.24, and codes with them.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from models.attention import wide


@functools.cache
def up_matrix(side: int, size: int) -> np.ndarray:
    """Bicubic interpolation from `side` to `size` samples: float64 [size, side], rows sum to 1."""
    a = -0.75
    centre = (np.arange(size) + 0.5) * side / size - 0.5
    below = np.floor(centre).astype(int)
    matrix = np.zeros((size, side))
    for tap in range(-1, 3):
        x = np.abs(centre - (below + tap))
        near = ((a + 2) * x - (a + 3)) * x * x + 1
        far = a * (((x - 5) * x + 8) * x - 4)
        np.add.at(matrix, (np.arange(size), np.clip(below + tap, 0, side - 1)), np.where(x <= 1, near, far))
    return matrix


@functools.cache
def down_matrix(size: int, side: int) -> np.ndarray:
    """Means of `size` samples over `side` windows, from floor(o size / side) up to ceil((o + 1) size / side)
    exclusively: float64 [side, size]."""
    matrix = np.zeros((side, size))
    for o in range(side):
        start, stop = o * size // side, -(-(o + 1) * size // side)
        matrix[o, start:stop] = 1 / (stop - start)
    return matrix


def resample(matrix: np.ndarray, x_BHWC: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 C"]:
    """Applies `matrix` [new, old] to rows and columns, in float32 or wider and at full precision: less flips codes."""
    dtype = wide(x_BHWC.dtype)
    M = jnp.asarray(matrix, dtype)
    rows = jnp.einsum("Oh,BhwC->BOwC", M, x_BHWC.astype(dtype), precision=jax.lax.Precision.HIGHEST)
    return jnp.einsum("Ow,BhwC->BhOC", M, rows, precision=jax.lax.Precision.HIGHEST)


@functools.cache
def phi_table(num_scales: int, phis: int) -> tuple[int, ...]:
    """Which of the residual convolutions serves each scale: the one whose tick is nearest to k / (K - 1).

    With 10 scales and 4 convolutions, scales 2 and 7 lie halfway between two ticks, and rounding decides: the published
    tokenizer was trained with what float64 gives, (0, 0, 1, 1, 1, 2, 2, 3, 3, 3). In float32 scale 7 gets another one.
    """
    ticks = np.linspace(1 / (3 * phis), 1 - 1 / (3 * phis), phis, dtype=np.float64)
    return tuple(int(np.argmin(np.abs(ticks - k / (num_scales - 1)))) for k in range(num_scales))
