"""The definitions of acceptance, on counts that fit on a line."""

import jax.numpy as jnp
import numpy as np

from decoding.stats import Counters, Stats


def recorded() -> Counters:
    """Three steps of two rows on a tree of four nodes, two deep; the second row is done after its first step."""
    counters = Counters.zeros(2, 2, 4)
    paths = jnp.array([[0, 1, 3], [0, 2, 2]])
    live = [jnp.array([1, 1]), jnp.array([1, 0]), jnp.array([1, 0])]
    # Row 0: two drafts and a bonus; one draft and a bonus; both drafts, but the limit leaves only the first one.
    counters = counters.record(paths, jnp.array([3, 2]), jnp.array([2, 1]), live[0])
    counters = counters.record(paths, jnp.array([2, 0]), jnp.array([1, 0]), live[1])
    return counters.record(paths, jnp.array([1, 0]), jnp.array([1, 0]), live[2])


def test_counts_per_row() -> None:
    first, second = Stats.of(recorded(), 0), Stats.of(recorded(), 1)
    assert (first.steps, first.committed) == (3, 6) and (second.steps, second.committed) == (1, 2)
    assert first.accepted_by_depth.tolist() == [3, 1] and second.accepted_by_depth.tolist() == [1, 0]
    assert first.accepted_by_node.tolist() == [0, 3, 0, 1] and second.accepted_by_node.tolist() == [0, 0, 1, 0]


def test_derived_numbers() -> None:
    first = Stats.of(recorded(), 0)
    assert first.acceptance_length == 2.0
    np.testing.assert_allclose(first.conditional_acceptance, [1.0, 1 / 3])
    assert first.histogram.tolist() == [0, 2, 1] and first.histogram.sum() == first.steps


def test_sums_are_those_of_all_rows() -> None:
    total, added = Stats.of(recorded()), Stats.of(recorded(), 0) + Stats.of(recorded(), 1)
    assert (total.steps, total.committed) == (added.steps, added.committed) == (4, 8)
    assert total.accepted_by_depth.tolist() == added.accepted_by_depth.tolist() == [4, 1]
    assert total.accepted_by_node.tolist() == added.accepted_by_node.tolist() == [0, 3, 1, 1]


def test_a_text_that_is_cut_keeps_the_shares_of_its_sizes() -> None:
    runs = [[1, 0], [0]]
    one, several = (Stats(8, 12, np.array([4]), np.zeros(2, int), sizes) for sizes in ({3: 8}, {3: 6, 0: 2}))
    assert one.cut(runs).sizes == {3: 2} and sum(several.cut(runs).sizes.values()) == several.cut(runs).steps == 2
    assert several.cut([[0]] * 4).sizes == {3: 3, 0: 1}


def test_nothing_decoded() -> None:
    nothing = Stats.of(Counters.zeros(1, 2, 3))
    assert nothing.acceptance_length == 1.0 and np.isnan(nothing.conditional_acceptance).all()
    assert nothing.histogram.tolist() == [0, 0, 0] and "0 tokens in 0 target forwards" in nothing.line()


def test_line_for_people() -> None:
    line = Stats.of(recorded(), 0).line()
    assert line == ("6 tokens in 3 target forwards, acceptance length 2.00, conditional acceptance by depth 1.00 0.33")
    plain = Stats(3, 3, np.zeros(0, int), np.zeros(1, int))
    assert plain.line() == "3 tokens in 3 target forwards, acceptance length 1.00" and plain.histogram.tolist() == [3]
    shallow = Stats(2, 3, np.array([1, 0, 0]), np.zeros(1, int))
    assert shallow.line().endswith("by depth 0.50 0.00"), "no step came to depth 3"
