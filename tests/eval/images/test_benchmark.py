"""Speeds of image models are medians over batches, numbers by hand."""

import pathlib

import pytest

from eval.images.benchmark import Made, rates, speedups


def made(stage_seconds: list[tuple[float, ...]], decode_seconds: list[float]) -> Made:
    return Made(pathlib.Path("none"), stage_seconds=stage_seconds, decode_seconds=decode_seconds)


def test_rates_are_medians_over_batches() -> None:
    # Batches of 4 take 1, 2 and 8 seconds in both stages together, and 1, 8 and 2 more in the decoder.
    found = rates(made([(0.5, 0.5), (0.5, 1.5), (6.0, 2.0)], [1.0, 8.0, 2.0]), 4)
    assert found["images_per_second_repeats"] == [4.0, 2.0, 0.5]
    assert found["images_per_second"] == 2.0, "the mean would be 2.17, the total 1.09"
    assert found["end_to_end_images_per_second"] == pytest.approx(0.4), "of 2, 0.4 and 0.4"
    assert found["stage_seconds"] == [0.5, 1.5] and found["decode_seconds"] == 2.0


def test_speedups_are_over_the_baseline_of_the_same_kind() -> None:
    fast = {"images_per_second": 6.0, "end_to_end_images_per_second": 2.0}
    slow = {"images_per_second": 2.0, "end_to_end_images_per_second": 1.0}
    assert speedups(fast, slow) == {"speedup": 3.0, "end_to_end_speedup": 2.0}
