"""Products of rows with parameters: as wide as scores need them, and in the order that suits a processor's memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

LEAST_BYTES = 2**20  # A smaller table stays in a core's cache, where its order does not matter.
MOST_ROWS = 32  # Beyond, the rows weigh more than the table.


def product(
    x: Float[Array, "*B in"], kernel: Float[Array | np.ndarray, "in out"], dtype=None
) -> Float[Array, "*B out"]:
    """Rows times a kernel; `dtype` is that of the sums: the operands', or None, or what is `wide`."""
    return _plain("...i,io->...o", x, jnp.asarray(kernel), dtype)


def product_with_rows(x: Float[Array, "*B in"], table: Float[Array, "out in"], dtype=None) -> Float[Array, "*B out"]:
    """Rows times the transpose of `table`, as scores of all tokens are of their embeddings."""
    rows = x.reshape(-1, x.shape[-1])
    if jax.default_backend() != "cpu" or not 1 < len(rows) <= MOST_ROWS or not _is_large(table):
        return _plain("...i,oi->...o", x, table, dtype)
    # With the table on the left it is read as it lies; on the right it would be transposed first, and XLA would put it
    # there but for the barrier.
    y = jax.lax.optimization_barrier(jnp.einsum("oi,Ri->oR", table, rows, preferred_element_type=dtype))
    return y.T.reshape(*x.shape[:-1], -1)


def _plain(equation: str, x: Array, y: Array, dtype) -> Array:
    return jnp.einsum(equation, x, y) if dtype is None else wide_einsum(equation, x, y)


def wide_einsum(equation: str, x: Array, y: Array) -> Array:
    """A product whose result is float32 or wider, and whose slopes are products in the dtype of its factors."""
    if x.dtype == y.dtype == _wide(x.dtype):
        return jnp.einsum(equation, x, y)
    return _wide_einsum(equation, x, y)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _wide_einsum(equation, x, y):
    return jnp.einsum(equation, x, y, preferred_element_type=_wide(x.dtype))


def _wide_einsum_forward(equation, x, y):
    return _wide_einsum(equation, x, y), (x, y)


def _wide_einsum_backward(equation, factors, slope):
    # Left alone, the wide slope would make both products wide, at a fraction of the speed.
    _, pull = jax.vjp(functools.partial(jnp.einsum, equation), *factors)
    return pull(slope.astype(jnp.result_type(*factors)))


_wide_einsum.defvjp(_wide_einsum_forward, _wide_einsum_backward)


def _wide(dtype) -> jnp.dtype:
    return jnp.promote_types(dtype, jnp.float32)


def _is_large(array: Array | np.ndarray) -> bool:
    return array.size * array.dtype.itemsize >= LEAST_BYTES
