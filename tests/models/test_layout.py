"""Who sees whom, against masks written out by hand."""

import dataclasses
import functools
import math

import jax.numpy as jnp
import numpy as np
import pytest

from models.layout import BlockCausal, Blocks, Causal, Layout, Tree


def test_causal_positions_restart_with_documents() -> None:
    layout = Layout.causal(2, 6, jnp.array([[1, 1, 2, 2, 2, 0], [1, 2, 3, 3, 0, 0]]))
    assert layout.positions.tolist() == [[0, 1, 0, 1, 2, 0], [0, 0, 0, 1, 0, 1]]
    assert Layout.causal(2, 3).positions.tolist() == [[0, 1, 2]] * 2 and Layout.causal(2, 3).horizon.tolist() == [
        [0],
        [0],
    ]


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
    layout = Layout(jnp.array([[7, 8, 8]]), jnp.array([[7]]), Tree(ancestors))
    assert np.array_equal(layout.sees_rows(None), ancestors)


def test_windows_compare_positions_not_slots() -> None:
    # Node 3 hangs from node 1: row 3 would lie in slot 13 but stands at position 12.
    ancestors = jnp.array([[[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]]], bool)
    layout = Layout(jnp.array([[10, 11, 11, 12]]), jnp.array([[10]]), Tree(ancestors))
    prefix = np.asarray(layout.sees_prefix(12, 4), int)[0]
    assert [np.flatnonzero(row).tolist() for row in prefix] == [[7, 8, 9], [8, 9], [8, 9], [9]]
    rows = np.asarray(layout.sees_rows(2), int)[0]
    assert rows.tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 1]]


def brute(rows: int, sees) -> list[list[int]]:
    """`sees(i, j)`, written out."""
    return [[int(sees(i, j)) for j in range(rows)] for i in range(rows)]


@pytest.mark.parametrize("rows", [1, 2, 7, 8])
def test_orders_against_brute_force(rows: int) -> None:
    table: list = [(Causal(), lambda i, j: j <= i)]
    for size in (1, 2, 3, 4):
        for phase in range(size):

            def block(i, size=size, phase=phase):
                return math.floor((i + phase) / size)

            table.append((BlockCausal(size, phase), lambda i, j, block=block: block(j) <= block(i)))
            table.append((Blocks(size, phase), lambda i, j, block=block: block(j) == block(i)))
            own = functools.partial(lambda i, j, block: block(j) == block(i) and j <= i, block=block)
            table.append((Blocks(size, phase, causal=True), own))
    for order, sees in table:
        assert np.asarray(order.sees(rows)[0], int).tolist() == brute(rows, sees), order


def test_blocks_of_one_are_causal_order_and_each_row_alone() -> None:
    assert np.array_equal(BlockCausal(1).sees(5), Causal().sees(5))
    assert np.array_equal(Blocks(1).sees(5)[0], np.eye(5, dtype=bool))


def test_the_first_rows_of_a_block_may_see_each_other() -> None:
    """Latents, two of a block of three, and a token behind them."""
    order = Blocks(3, causal=True, together=2)
    block = [[1, 1, 0], [1, 1, 0], [1, 1, 1]]
    assert np.asarray(order.inside, int).tolist() == block
    assert np.array_equal(order.sees(6)[0], np.kron(np.eye(2), block))


def test_slots_may_be_hidden_from_all() -> None:
    hidden = jnp.array([[True, False, True, True]])
    layout = Layout(jnp.array([[9, 9]]), jnp.array([[2, 3]]), prefix_seen=hidden, since=jnp.array([[0, 1]]))
    assert np.asarray(layout.sees_prefix(4, None), int).tolist() == [[[1, 0, 0, 0], [0, 0, 1, 0]]]


def test_a_relaxed_causal_mask_by_hand() -> None:
    """Two rows to a block; with a phase of 1 the first block has one row."""
    assert np.asarray(BlockCausal(2).sees(5)[0], int).tolist() == [
        [1, 1, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1],
    ]
    assert np.asarray(BlockCausal(2, 1).sees(4)[0], int).tolist() == [
        [1, 0, 0, 0],
        [1, 1, 1, 0],
        [1, 1, 1, 0],
        [1, 1, 1, 1],
    ]


def test_every_batch_row_may_have_a_phase_of_its_own() -> None:
    phases = jnp.array([0, 2, 1])
    for kind in (BlockCausal, Blocks):
        together = kind(3, phases).sees(7)
        for row, phase in enumerate(phases.tolist()):
            assert np.array_equal(together[row], kind(3, phase).sees(7)[0])


def test_orders_keep_documents_and_windows_apart() -> None:
    segments, positions = jnp.array([[1, 1, 2, 2, 2, 0]]), jnp.array([[4, 5, 0, 1, 2, 0]])
    for order in (Causal(), BlockCausal(2, 1), Blocks(3)):
        layout = Layout(positions, jnp.zeros((1, 1), jnp.int32), order, segments)
        alone = np.asarray(order.sees(6)[0])
        same, near = (np.asarray(x[0]) for x in (segments, positions))
        expected = brute(6, lambda i, j, alone=alone, same=same: alone[i, j] and same[i] == same[j])
        assert np.asarray(layout.sees_rows(None)[0], int).tolist() == expected
        windowed = brute(6, lambda i, j, seen=expected, near=near: seen[i][j] and near[i] - near[j] < 2)
        assert np.asarray(layout.sees_rows(2)[0], int).tolist() == windowed


def test_every_row_may_have_a_horizon_of_its_own() -> None:
    """Packed beginnings of a text: row i sees the slots below its horizon, in a window by positions."""
    horizon, positions = jnp.array([[0, 2, 5], [4, 4, 1]]), jnp.array([[0, 2, 5], [7, 8, 1]])
    layout = Layout(positions, horizon, Blocks(1))
    for batch in range(2):
        for i in range(3):
            below = [slot for slot in range(6) if slot < horizon[batch, i]]
            assert np.flatnonzero(layout.sees_prefix(6, None)[batch, i]).tolist() == below
            near = [slot for slot in below if positions[batch, i] - slot < 3]
            assert np.flatnonzero(layout.sees_prefix(6, 3)[batch, i]).tolist() == near
    # Of packed documents, each row continues one.
    packed = dataclasses.replace(layout, since=jnp.array([[0, 1, 3], [4, 2, 0]]))
    seen = [[np.flatnonzero(row).tolist() for row in rows] for rows in packed.sees_prefix(6, None)]
    assert seen == [[[], [1], [3, 4]], [[], [2, 3], [0]]]


def test_packed_documents_end_what_a_row_sees_of_the_prefix() -> None:
    """Two documents in slots 0 to 2 and 3 to 7; positions restart, so windows need them said."""
    layout = Layout(
        jnp.array([[2, 3, 4]]),
        jnp.array([[2, 6, 7]]),
        Blocks(1),
        since=jnp.array([[0, 3, 3]]),
        prefix_positions=jnp.array([[0, 1, 2, 0, 1, 2, 3, 4]]),
    )
    assert [np.flatnonzero(row).tolist() for row in layout.sees_prefix(8, None)[0]] == [[0, 1], [3, 4, 5], [3, 4, 5, 6]]
    assert [np.flatnonzero(row).tolist() for row in layout.sees_prefix(8, 2)[0]] == [[1], [5], [6]]


def test_slots_and_positions_of_the_prefix_may_differ() -> None:
    """Four latents in slots 2 to 5 hold the position of the token before them: windows go by positions."""
    at = jnp.array([[0, 1, 1, 1, 1, 1, 2, 3]])
    layout = Layout.extend(jnp.array([8]), 2, first=jnp.array([4]))
    assert layout.positions.tolist() == [[4, 5]] and layout.horizon.tolist() == [[8]]
    placed = dataclasses.replace(layout, prefix_positions=at)
    assert [np.flatnonzero(row).tolist() for row in placed.sees_prefix(8, 4)[0]] == [[1, 2, 3, 4, 5, 6, 7], [6, 7]]
    by_slots = [np.flatnonzero(row).tolist() for row in layout.sees_prefix(8, 4)[0]]
    assert by_slots == [[1, 2, 3, 4, 5, 6, 7], [2, 3, 4, 5, 6, 7]]


def test_scratch_rows_fall_out_of_a_window_at_its_width() -> None:
    seen = jnp.ones((1, 2, 4), bool)
    layout = Layout(
        jnp.array([[5, 6]]),
        jnp.array([[3]]),
        scratch_seen=seen,
        scratch_positions=jnp.array([[2, 3, 4, 5]]),
    )
    assert np.asarray(layout.sees_scratch(None)[0], int).tolist() == [[1, 1, 1, 1], [1, 1, 1, 1]]
    assert np.asarray(layout.sees_scratch(3)[0], int).tolist() == [[0, 1, 1, 1], [0, 0, 1, 1]]
