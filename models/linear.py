"""Linear maps, and kernels in blocks of columns, which a processor multiplies a few rows by at the speed of its memory.

XLA multiplies one row on a CPU by a kernel as it lies, in the order of memory. Two rows and more go to a matrix product
that walks down 64 columns at a time: with the kernel as [in, out] it reads 256 bytes of a page, then of the next one.
Where the 64 columns lie together, [out / 64, in, 64], the same product reads one stream. That wins where weights lie
in huge pages, and loses where they do not (docs/decisions.md, "Cache and layout").
"""

import functools
import os
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from models import pages

BLOCK = 64  # Columns that the product takes at once, with AVX-512 and without.
LEAST_BYTES = 2**20  # A smaller kernel stays in a core's cache, where its order does not matter.
MOST_ROWS = 128  # Beyond, the rows weigh more than the kernel, and it is put together for an ordinary product.
SHARE = 2**17  # Bytes of results that a product of a batch of matrices gives to one core before it asks another.
LEAST_INPUTS = 16  # Of a chunk: shorter ones cost more than another core gains.
ROWS_AT_ONCE = 5  # That a block is multiplied by while it is read once.
WORTH_WAKING = 6e6  # Bytes read, over and over too, for which a second core gains more than it takes to wake it.

Kernel = Float[Array | np.ndarray, "in out"] | Float[Array | np.ndarray, "N in block"]
Table = Float[Array | np.ndarray, "out in"] | Float[Array | np.ndarray, "N in block"]


class Linear(nn.Module):
    """`nn.Dense`, whose kernel may also be in blocks (`in_blocks`), and have a low-rank map beside it: `lora`, {a, b}.

    Attributes:
      features: outputs.
      use_bias: whether there is a `bias` too.
    """

    features: int
    use_bias: bool = True

    @nn.compact
    def __call__(self, x):
        kernel: Any = self.get_variable("params", "kernel")
        if kernel is None or kernel.ndim == 2:
            kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,)) if self.use_bias else None
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias)
        y = product(x, kernel)
        lora: Any = self.get_variable("params", "lora")
        if lora is not None:
            y = y + product(product(x, lora["a"].astype(x.dtype)), lora["b"].astype(x.dtype))
        return y if bias is None else y + bias


def product(x: Float[Array, "*B in"], kernel: Kernel, dtype=None) -> Float[Array, "*B out"]:
    """Rows times a kernel, in blocks or not; `dtype` is that of the sums: the operands', or None, or what is `wide`."""
    if kernel.ndim == 2:
        return _plain("...i,io->...o", x, kernel, dtype)
    rows = x.reshape(-1, x.shape[-1])
    count = len(rows)
    if count > MOST_ROWS:
        return _plain("...i,io->...o", x, whole(kernel), dtype)
    if count == 1:
        # Alone it would be multiplied by one thread, in no order that suits the blocks.
        rows = jnp.pad(rows, ((0, 1), (0, 0)))
    y = _sum_of_chunks(rows, jnp.asarray(kernel), dtype)
    return y.swapaxes(0, 1).reshape(y.shape[1], -1)[:count].reshape(*x.shape[:-1], -1)


def _sum_of_chunks(rows: Float[Array, "R in"], kernel: Float[Array, "N in block"], dtype) -> Float[Array, "N R block"]:
    blocks, width, _ = kernel.shape
    chunks = _chunks(kernel, len(rows))
    rows = rows.reshape(len(rows), chunks, -1).swapaxes(0, 1)
    rows = jnp.broadcast_to(rows, (blocks, *rows.shape))
    kernel = kernel.reshape(blocks, chunks, width // chunks, -1)
    return jnp.einsum("NKRi,NKib->NKRb", rows, kernel, preferred_element_type=dtype).sum(1)


def _chunks(kernel: Float[Array, "N in block"], rows: int) -> int:
    """Into how many chunks of inputs to cut a product; 1 leaves it whole.

    A matrix product in a batch is one core's whole, and so are as many of the batch as have `SHARE` bytes of results:
    with few rows all of them. As a sum over chunks of its inputs a product is a batch of more and smaller ones, in
    which every core takes part. And with any sum in it the program does not write the rows down once for each block,
    which two rows are not worth.
    """
    blocks, width, columns = kernel.shape
    least = 1 if rows <= 2 or width % 2 else 2
    cores = _cores()
    # The first reading is bound by memory, which one core alone nearly exhausts.
    readings = -(-rows // ROWS_AT_ONCE) - 0.25
    if cores == 1 or kernel.size * kernel.dtype.itemsize * readings < WORTH_WAKING:
        return least
    share = SHARE // (rows * columns * max(kernel.dtype.itemsize, 4))
    for chunks in range(2, width // LEAST_INPUTS + 1):
        if width % chunks == 0 and max(1, share // chunks) <= -(-blocks // cores):
            return chunks
    return least


@functools.cache
def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def product_with_rows(x: Float[Array, "*B in"], table: Table, dtype=None) -> Float[Array, "*B out"]:
    """Rows times the transpose of `table`, as scores of all tokens are of their embeddings."""
    if table.ndim == 3:
        return product(x, table, dtype)
    rows = x.reshape(-1, x.shape[-1])
    if jax.default_backend() != "cpu" or not 1 < len(rows) <= MOST_ROWS or not _is_large(table):
        return _plain("...i,oi->...o", x, table, dtype)
    # With the table on the left it is read as it lies; on the right it would be transposed first, and XLA would put it
    # there but for the barrier.
    y = jax.lax.optimization_barrier(jnp.einsum("oi,Ri->oR", table, rows, preferred_element_type=dtype))
    return y.T.reshape(*x.shape[:-1], -1)


def _plain(equation: str, x: Array, y: Any, dtype) -> Array:
    return jnp.einsum(equation, x, y) if dtype is None else wide_einsum(equation, x, y)


def wide_einsum(equation: str, x: Array, y: Array) -> Array:
    """A product whose result is float32 or wider, and whose gradients are products in the dtype of its factors."""
    if x.dtype == y.dtype == _wide(x.dtype):
        return jnp.einsum(equation, x, y)
    return _wide_einsum(equation, x, y)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _wide_einsum(equation, x, y):
    return jnp.einsum(equation, x, y, preferred_element_type=_wide(x.dtype))


def _wide_einsum_forward(equation, x, y):
    return _wide_einsum(equation, x, y), (x, y)


def _wide_einsum_backward(equation, factors, gradient):
    # Left alone, the wide gradient would make both products wide, at a fraction of the speed.
    _, pull = jax.vjp(functools.partial(jnp.einsum, equation), *factors)
    return pull(gradient.astype(jnp.result_type(*factors)))


_wide_einsum.defvjp(_wide_einsum_forward, _wide_einsum_backward)


def _wide(dtype) -> jnp.dtype:
    return jnp.promote_types(dtype, jnp.float32)


def in_blocks(kernel: Kernel) -> Kernel:
    """A kernel as `product` reads it fastest on the default backend: in blocks, or as it is."""
    return kernel.reshape(len(kernel), -1, BLOCK).swapaxes(0, 1) if _wins_by_blocks(kernel, axis=1) else kernel


def table_in_blocks(table: Table) -> Table:
    """A table of embeddings that is the transpose of a kernel too, as that kernel in blocks, or as it is."""
    return table.reshape(-1, BLOCK, table.shape[1]).swapaxes(1, 2) if _wins_by_blocks(table, axis=0) else table


def rows_of_table(table: Table, indices: Int[Array, "*B"]) -> Float[Array, "*B in"]:
    """Rows of a table, in blocks or not."""
    rows = table[indices] if table.ndim == 2 else table[indices // BLOCK, :, indices % BLOCK]
    return jnp.asarray(rows)


def whole_table(table: Table) -> Float[Array | np.ndarray, "out in"]:
    """The inverse of `table_in_blocks`."""
    return table if table.ndim == 2 else whole(table).T


def whole(kernel: Kernel) -> Float[Array | np.ndarray, "in out"]:
    """The inverse of `in_blocks`."""
    return kernel if kernel.ndim == 2 else kernel.swapaxes(0, 1).reshape(kernel.shape[1], -1)


def _wins_by_blocks(array: Array | np.ndarray, axis: int) -> bool:
    if jax.default_backend() != "cpu" or array.ndim != 2 or array.shape[axis] % BLOCK:
        return False
    return _is_large(array) and pages.are_huge()


def _is_large(array: Array | np.ndarray) -> bool:
    return array.size * array.dtype.itemsize >= LEAST_BYTES
