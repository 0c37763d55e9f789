"""Sums over a text, a piece of it at a time, so that scores over the vocabulary exist of one piece alone.

Rows are arrays [B, S, ...] that are cut along S. The scores of all of them would be [B, S, V], gigabytes at real sizes,
and are needed only to be reduced. What is trained through them is a sum of terms, each with parameters and features of
its own, and its gradients are known up to a factor as soon as a piece's scores are: they are taken on the way forward,
so that nothing is computed twice.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from models.attention import wide

# Scores over a vocabulary that exist at once on a device, per array of them: half a GiB in float32.
SCORES = 2**27

T = TypeVar("T")


def pieces_of(heads: Sequence[tuple[Callable[[Any], Array], Any]], devices: int = 1) -> int:
    """Into how many pieces rows are cut so that of each (head, what it reads) no more than `SCORES` exist."""
    sizes = [jax.eval_shape(read, hidden).size for read, hidden in heads]
    return min(max(-(-max(sizes) // (SCORES * devices)), 1), _length(heads[0][1]))


def summed(score: Callable[[Any], T], rows: Any, pieces: int) -> T:
    """`score(rows)`, a tree of sums over rows, piece by piece. Not meant to be differentiated."""
    if pieces == 1:
        return score(rows)
    rows, size, numbers = _filled(rows, pieces)

    def add(total, piece):
        return jax.tree.map(jnp.add, total, score(_cut(rows, size, piece))), None

    shapes = jax.eval_shape(lambda: score(_cut(rows, size, 0)))
    none = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.lax.scan(add, none, numbers)[0]


def mapped(function: Callable[[Any], Array], rows: Any, pieces: int) -> Array:
    """`function(rows)`, one result for every row `[B, S]`, piece by piece."""
    if pieces == 1:
        return function(rows)
    length = _length(rows)
    rows, size, numbers = _filled(rows, pieces)
    return _joined(jax.lax.map(lambda piece: function(_cut(rows, size, piece)), numbers), length)


def separable_sums(
    share: Callable[[Any], Any],
    score: Callable[[int, Any, Array, Any, Any], Float[Array, ""]],
    reads: Sequence[Any],
    hiddens: Sequence[Float[Array, "B S H"]],
    rows: Any,
    pieces: int,
) -> Float[Array, "N"]:
    """N sums over rows, piece by piece, differentiable in `reads` and `hiddens`.

    Args:
      share: from a piece of `rows` to what all sums need of it.
      score: from (k, `reads[k]`, a piece of `hiddens[k]`, of `rows`, and what is shared) to the k-th sum over it, which
        is 0 where all `rows` are.
      reads: N trees of parameters. What the functions close over is taken as constant.
      hiddens: N features.
      rows: what is known besides: a tree of arrays [B, S, ...], taken as constant too.
      pieces: how many.
    """
    numbers = range(len(reads))

    def plain(reads, piece):
        hiddens, rows = piece
        shared = share(rows)
        return [score(k, reads[k], hiddens[k], rows, shared) for k in numbers]

    def with_gradients(reads, hiddens, rows, cut):
        """Sums and their gradients in reads and hiddens, one after the other: the scores of all would be too many."""
        rows = cut(rows, ())
        found: list[tuple] = []
        shared = share(rows)
        for k in numbers:
            hidden = cut(hiddens[k], found[-1:])
            value, pull = jax.vjp(lambda read, x, k=k: score(k, read, x, rows, shared), reads[k], hidden)
            found.append((value, *pull(jnp.ones_like(value))))
        return [list(part) for part in zip(*found, strict=True)]

    @jax.custom_vjp
    def total(reads, hiddens):
        return jnp.stack(summed(functools.partial(plain, reads), (hiddens, rows), pieces))

    def forward(reads, hiddens):
        if pieces == 1:
            sums, *gradients = with_gradients(reads, hiddens, rows, lambda whole, _: whole)
            return jnp.stack(sums), gradients
        (filled, more), size, each = _filled((hiddens, rows), pieces)

        def add(carry, piece):
            def cut(whole, after):
                return _cut(whole, size, piece + _nothing(after))

            *found, of_hiddens = with_gradients(reads, filled, more, cut)
            return jax.tree.map(lambda total, x: total + x.astype(total.dtype), carry, found), of_hiddens

        # Slopes of many pieces are added up wide, whatever the parameters are.
        sums = jax.eval_shape(lambda: plain(reads, _cut((filled, more), size, 0)))
        none = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, wide(leaf.dtype)), [sums, list(reads)])
        (sums, of_reads), of_hiddens = jax.lax.scan(add, none, each)
        of_reads = jax.tree.map(lambda x, leaf: x.astype(leaf.dtype), of_reads, list(reads))
        return jnp.stack(sums), [of_reads, [_joined(x, _length(rows)) for x in of_hiddens]]

    def backward(gradients, factors):
        def scaled(of_one, factor):
            return jax.tree.map(lambda gradient: (gradient * factor).astype(gradient.dtype), of_one)

        return tuple([scaled(of_one, factors[k]) for k, of_one in enumerate(part)] for part in gradients)

    total.defvjp(forward, backward)
    return total(list(reads), list(hiddens))


def _length(rows: Any) -> int:
    return jax.tree.leaves(rows)[0].shape[1]


def _filled(rows: Any, pieces: int) -> tuple[Any, int, Int[Array, "n"]]:
    """Rows with zeros behind them that fill up the last piece, the size of a piece, and the numbers of all."""
    length = _length(rows)
    size = -(-length // pieces)
    count = -(-length // size)

    def filled(leaf):
        return jnp.pad(leaf, [(0, 0), (0, size * count - length)] + [(0, 0)] * (leaf.ndim - 2))

    return jax.tree.map(filled, rows) if size * count > length else rows, size, jnp.arange(count, dtype=jnp.int32)


def _cut(rows: Any, size: int, piece: int | Int[Array, ""]) -> Any:
    return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, piece * size, size, axis=1), rows)


def _nothing(after: Any) -> Int[Array, ""]:
    """0, known once all arrays of `after` are. A barrier is removed from programs before their order is decided."""
    first = [jnp.ravel(leaf)[0] for leaf in jax.tree.leaves(after)]
    return sum((jnp.minimum((x == x).astype(jnp.int32), 0) for x in first), jnp.int32(0))


def _joined(pieces: Array, length: int) -> Array:
    """[n, B, s, ...] -> [B, length, ...]."""
    whole = jnp.moveaxis(pieces, 0, 1)
    return whole.reshape(whole.shape[0], -1, *whole.shape[3:])[:, :length]
