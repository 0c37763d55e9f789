"""Who sees whom, against masks written out by hand."""

import jax.numpy as jnp
import numpy as np

from models.layout import Layout


def test_causal_positions_restart_with_documents() -> None:
    layout = Layout.causal(2, 6, jnp.array([[1, 1, 2, 2, 2, 0], [1, 2, 3, 3, 0, 0]]))
    assert layout.positions.tolist() == [[0, 1, 0, 1, 2, 0], [0, 0, 0, 1, 0, 1]]
    assert Layout.causal(2, 3).positions.tolist() == [[0, 1, 2]] * 2 and Layout.causal(2, 3).length.tolist() == [0, 0]


def test_causal_rows_see_their_document_so_far() -> None:
    seen = Layout.causal(1, 4, jnp.array([[1, 1, 2, 2]])).sees_rows(None)[0]
    assert np.asarray(seen, int).tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]


def test_extension_goes_on_where_the_cache_ends() -> None:
    layout = Layout.extend(jnp.array([3, 0]), 2)
    assert layout.positions.tolist() == [[3, 4], [0, 1]]
    seen = np.asarray(layout.sees_prefix(5, None), int)
    assert seen[:, 0].tolist() == [[1, 1, 1, 0, 0], [0] * 5]


def test_tree_rows_see_their_ancestors_alone() -> None:
    ancestors = jnp.array([[[1, 0, 0], [1, 1, 0], [1, 0, 1]]], bool)
    layout = Layout(jnp.array([[7, 8, 8]]), jnp.array([7]), ancestors)
    assert np.array_equal(layout.sees_rows(None), ancestors)


def test_windows_compare_positions_not_slots() -> None:
    # Node 3 hangs from node 1: row 3 would lie in slot 13 but stands at position 12.
    ancestors = jnp.array([[[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]]], bool)
    layout = Layout(jnp.array([[10, 11, 11, 12]]), jnp.array([10]), ancestors)
    prefix = np.asarray(layout.sees_prefix(12, 4), int)[0]
    assert [np.flatnonzero(row).tolist() for row in prefix] == [[7, 8, 9], [8, 9], [8, 9], [9]]
    rows = np.asarray(layout.sees_rows(2), int)[0]
    assert rows.tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 1]]
