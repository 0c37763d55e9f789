"""The order of examples: only whole batches to train on, every example once to evaluate."""

from typing import ClassVar

import numpy as np
import pytest

from train.data.order import in_order, shuffled


class Numbers:
    """Ten examples, each its own number."""

    padding: ClassVar = {"x": np.array(-1)}

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return {"x": np.array(index)}


def numbers(batches):
    return [batch["x"].tolist() for batch in batches]


@pytest.mark.parametrize(("epochs", "count"), [(1, 2), (3, 7)])
def test_a_last_batch_that_is_not_full_is_dropped(epochs, count):
    found = numbers(shuffled(Numbers(), 4, 0, epochs=epochs))
    assert [len(batch) for batch in found] == [4] * count
    times = np.bincount(np.concatenate(found), minlength=10)
    assert times.max() <= epochs and times.sum() == 4 * count
    # Of two processes each drops its part of it.
    halves = [numbers(shuffled(Numbers(), 4, 0, epochs=epochs, process_index=i, process_count=2)) for i in (0, 1)]
    assert [[len(half) for half in part] for part in halves] == [[2] * count] * 2
    assert [sorted(a + b) for a, b in zip(*halves, strict=True)] == [sorted(batch) for batch in found]


@pytest.mark.parametrize("most", [None, 1])
def test_evaluation_fills_up_its_last_batch(most):
    expected = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, -1, -1]]
    assert numbers(in_order(Numbers(), 4, max_batches=most)) == expected[:most]
