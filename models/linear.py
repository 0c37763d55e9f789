"""Linear maps, and kernels in blocks of columns, which a processor multiplies a few rows by at the speed of its memory.

XLA multiplies one row on a CPU by a kernel as it lies, in the order of memory. Two rows and more go to a matrix product
that walks down 64 columns at a time: with the kernel as [in, out] it reads 256 bytes of a page, then of the next one.
Where the 64 columns lie together, [out / 64, in, 64], the same product reads one stream.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

BLOCK = 64  # Columns that the product takes at once, with AVX-512 and without.
LEAST_BYTES = 2**20  # A smaller kernel stays in a core's cache, where its order does not matter.
MOST_ROWS = 32  # Beyond, the rows weigh more than the kernel, and it is put together for an ordinary product.

Kernel = Float[Array | np.ndarray, "in out"] | Float[Array | np.ndarray, "N in block"]


class Linear(nn.Module):
    """`nn.Dense`, whose kernel may also be in blocks (`in_blocks`).

    Attributes:
      features: outputs.
      use_bias: whether there is a `bias` too.
    """

    features: int
    use_bias: bool = True

    @nn.compact
    def __call__(self, x):
        kernel = self.get_variable("params", "kernel")
        if kernel is None or kernel.ndim == 2:
            kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,)) if self.use_bias else None
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias)
        y = product(x, kernel)
        return y if bias is None else y + bias


def product(x: Float[Array, "*B in"], kernel: Kernel, dtype=None) -> Float[Array, "*B out"]:
    """Rows times a kernel, in blocks or not; `dtype` is that of the sums, by default the operands'."""
    if kernel.ndim == 2:
        return jnp.matmul(x, kernel, preferred_element_type=dtype)
    rows = x.reshape(-1, x.shape[-1])
    count = len(rows)
    if count > MOST_ROWS:
        return jnp.matmul(x, whole(kernel), preferred_element_type=dtype)
    if count == 1:
        # Alone it would be multiplied by one thread, in no order that suits the blocks.
        rows = jnp.pad(rows, ((0, 1), (0, 0)))
    rows = jnp.broadcast_to(rows, (kernel.shape[0], *rows.shape))
    y = jnp.einsum("NRi,Nib->NRb", rows, kernel, preferred_element_type=dtype)
    return y.swapaxes(0, 1).reshape(y.shape[1], -1)[:count].reshape(*x.shape[:-1], -1)


def product_with_rows(x: Float[Array, "*B in"], table: Float[Array, "out in"], dtype=None) -> Float[Array, "*B out"]:
    """Rows times the transpose of `table`, as scores of all tokens are of their embeddings."""
    rows = x.reshape(-1, x.shape[-1])
    if jax.default_backend() != "cpu" or not 1 < len(rows) <= MOST_ROWS or not _is_large(table):
        return jnp.einsum("...i,oi->...o", x, table, preferred_element_type=dtype)
    # With the table on the left it is read as it lies; on the right it would be transposed first, and XLA would put it
    # there but for the barrier.
    y = jax.lax.optimization_barrier(jnp.einsum("oi,Ri->oR", table, rows, preferred_element_type=dtype))
    return y.T.reshape(*x.shape[:-1], -1)


def in_blocks(kernel: Kernel) -> Kernel:
    """A kernel as `product` reads it fastest on the default backend: in blocks, or as it is."""
    if jax.default_backend() != "cpu" or kernel.ndim != 2 or kernel.shape[1] % BLOCK:
        return kernel
    return kernel.reshape(kernel.shape[0], -1, BLOCK).swapaxes(0, 1) if _is_large(kernel) else kernel


def whole(kernel: Kernel) -> Float[Array | np.ndarray, "in out"]:
    """The inverse of `in_blocks`."""
    return kernel if kernel.ndim == 2 else kernel.swapaxes(0, 1).reshape(kernel.shape[1], -1)


def _is_large(array: Array | np.ndarray) -> bool:
    return array.size * array.dtype.itemsize >= LEAST_BYTES
