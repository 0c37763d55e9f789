"""95% bootstrap intervals, over the choice of what was measured: prompts, questions or rows of text."""

import numpy as np
from jaxtyping import Float, Int, Num

RESAMPLES = 1000


def choices(count: int) -> Int[np.ndarray, "R N"]:
    """RESAMPLES choices of `count` of as many entries, with replacement; always the same ones."""
    return np.random.default_rng(0).integers(0, count, (RESAMPLES, count))


def interval(values: Float[np.ndarray, "R"]) -> list[float]:
    """Between which the middle 95% of the values lie."""
    return np.quantile(values, [0.025, 0.975]).tolist()


def mean_interval(values: Num[np.ndarray, "N"]) -> list[float]:
    """That of the mean."""
    return interval(values[choices(len(values))].mean(axis=1))


def ratio_interval(numerator: Num[np.ndarray, "N"], denominator: Num[np.ndarray, "N"]) -> list[float]:
    """That of sum(numerator) / sum(denominator)."""
    picks = choices(len(numerator))
    return interval(numerator[picks].sum(axis=1) / denominator[picks].sum(axis=1))
