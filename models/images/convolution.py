"""The 3x3 convolution of the image models, with fewer multiplications where the processor is their limit.

Two by two neighbouring outputs of a 3x3 convolution share a 4x4 patch of the input. Winograd's F(2x2, 3x3) (Lavin &
Gray 2016, section 4.1) makes them out of 16 products instead of 36: patches and kernel are brought to another basis by
additions, are multiplied there place by place (over channels: 16 matrix products), and what comes out is brought back.
XLA's convolutions on CPU already run at the rate of matrix products, so that only fewer products make them faster. On
GPU and TPU the libraries and units for convolution are better judges; they get XLA's own.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_FEWEST_PATCHES = 256  # Below, changing the kernel's basis costs what the saved products would have.


class Conv3x3(nn.Module):
    """A 3x3 convolution with bias that keeps the sides; parameters as `nn.Conv` names, shapes and draws them."""

    channels: int

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W D"]:
        shape = (3, 3, x.shape[-1], self.channels)
        kernel = self.param("kernel", nn.linear.default_kernel_init, shape)
        bias = self.param("bias", nn.initializers.zeros_init(), shape[-1:])
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias)
        return convolve(x, kernel) + bias


def convolve(x: Float[Array, "B H W C"], kernel: Float[Array, "3 3 C D"]) -> Float[Array, "B H W D"]:
    """Cross-correlation with zeros around the input; on CPU within a few units of the last place of `direct`.

    Which way it goes hangs on how many places there are, batch included, so on CPU the last digits of a small map may
    differ between batch sizes, as those of any sum may.

    Args:
      x: input.
      kernel: weights by row, column, channel of the input, channel of the output.
    """
    B, H, W, _ = x.shape
    if H % 2 or W % 2 or B * H * W < 4 * _FEWEST_PATCHES or x.dtype.itemsize < 4:
        return direct(x, kernel)
    return jax.lax.platform_dependent(x, kernel, cpu=winograd, default=direct)


def direct(x: Float[Array, "B H W C"], kernel: Float[Array, "3 3 C D"]) -> Float[Array, "B H W D"]:
    """XLA's convolution."""
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def winograd(x: Float[Array, "B H W C"], kernel: Float[Array, "3 3 C D"]) -> Float[Array, "B H W D"]:
    """F(2x2, 3x3): the transforms along one side are B^T, G and A^T of equation 7 of the paper; H and W are even."""
    B, H, W, C = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))

    def place(row: int, column: int) -> Array:
        """The pixel at one place of every 4x4 patch, patches lying two apart."""
        return padded[:, row : row + H : 2, column : column + W : 2].reshape(-1, C)

    patches = _both_sides(_patch_basis, [[place(row, column) for column in range(4)] for row in range(4)])
    kernels = _both_sides(_kernel_basis, [list(row) for row in kernel])
    products = [[x @ k for x, k in zip(*rows, strict=True)] for rows in zip(patches, kernels, strict=True)]
    outputs = _both_sides(_output_basis, products)
    shape = (B, H // 2, W // 2, kernel.shape[-1])
    rows = [jnp.stack([one.reshape(shape) for one in row], axis=3) for row in outputs]
    return jnp.stack(rows, axis=2).reshape(B, H, W, -1)


def _both_sides(transform: Callable[..., list[Array]], grid: list[list[Array]]) -> list[list[Array]]:
    """Applies a transform of one side to the rows of a grid, then to its columns."""
    across = [transform(*row) for row in grid]
    down = [transform(*column) for column in zip(*across, strict=True)]
    return [list(row) for row in zip(*down, strict=True)]


def _patch_basis(a: Array, b: Array, c: Array, d: Array) -> list[Array]:
    return [a - c, b + c, c - b, b - d]


def _kernel_basis(a: Array, b: Array, c: Array) -> list[Array]:
    return [a, (a + b + c) / 2, (a - b + c) / 2, c]


def _output_basis(a: Array, b: Array, c: Array, d: Array) -> list[Array]:
    return [a + b + c, b - c - d]
