"""Where written text begins, how it is laid out, and which of its tokens took a rejected draft's place."""

import numpy as np

from train.objectives.written import as_rows, corrected, openings


def batch(*rows):
    """Of (tokens, segments, mask)."""
    tokens, segments, mask = (np.array(column) for column in zip(*rows, strict=True))
    return {"tokens": tokens, "segments": segments, "mask": mask}


def test_prompts_end_where_labels_begin_or_with_the_first_quarter() -> None:
    tokens = np.arange(10, 18)
    rows = batch(
        (tokens, [1, 1, 1, 1, 2, 2, 2, 2], [1, 0, 1, 1, 0, 0, 1, 1]),  # The first document lacks its beginning.
        (tokens, [1, 1, 1, 1, 1, 1, 1, 1], [1, 0, 0, 1, 1, 0, 1, 1]),
        (tokens, [1, 2, 2, 2, 2, 2, 2, 2], [1] * 8),
        (tokens, [0] * 8, [0] * 8),
        (tokens, [1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0]),
    )
    expected = [[14, 15], [10, 11, 12], [11], [10, 11], [10, 11]]
    assert openings(rows, 8) == expected
    assert openings(rows, 2) == [prompt[-2:] for prompt in expected]
    assert openings(batch((tokens, [0] * 8, [0] * 8)), 8) == []


def test_what_is_written_stands_behind_its_prompt_and_alone_counts() -> None:
    rows = as_rows([[5, 6], [7]], [[8], [9, 10, 11]], [[True], [False, True, False]], 6)
    np.testing.assert_array_equal(rows["tokens"], [[5, 6, 8, 0, 0, 0], [7, 9, 10, 11, 0, 0]])
    np.testing.assert_array_equal(rows["segments"], [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0]])
    np.testing.assert_array_equal(rows["mask"], [[0, 0, 1, 0, 0, 0], [0, 0, 1, 0, 0, 0]])


def test_tokens_that_corrected_a_draft_are_told_from_first_and_bonus_tokens() -> None:
    #          first; none kept; both kept, bonus; one kept, corrected; none kept; cut short
    writers = [0, 0, 1, 2, 0, 1, 0, 0, 1]
    assert corrected(writers, 2) == [False, True, False, False, False, False, True, True, False]
    assert corrected([], 2) == []
