"""Confidences that mean what they say: sequential temperature scaling on held-out drafts (DSpark, section 4).

What is scheduled by is the product of a chain's confidences, so that is what is made right: slot by slot one
temperature, by which the logit of its confidence is divided, such that the product up to there is off by the least on
average, the temperatures before it kept.
"""

import numpy as np
from jaxtyping import Float

_TEMPERATURES = np.geomspace(0.2, 5.0, 97)  # The middle one is 1.
_BINS = 15


def sequential_temperatures(
    logits: Float[np.ndarray, "M D"], survived: Float[np.ndarray, "M D"]
) -> Float[np.ndarray, "D"]:
    """One temperature per slot.

    Args:
      logits: of the confidences of M held-out drafts.
      survived: 1 where a draft survived verification up to this slot, itself included, else 0; or how probable that is.
    """
    reached, found = np.ones(len(logits)), []
    for logit, label in zip(logits.T, survived.T, strict=True):
        products = reached / (1 + np.exp(-logit / _TEMPERATURES[:, None]))
        errors = np.array([calibration_error(product, label) for product in products])
        # Of equally good ones that which changes least.
        near = np.abs(np.log(_TEMPERATURES))
        best = np.lexsort((near, errors))[0]
        found.append(_TEMPERATURES[best])
        reached = products[best]
    return np.array(found)


def calibration_error(predicted: Float[np.ndarray, "M"], label: Float[np.ndarray, "M"]) -> float:
    """Expected calibration error: |mean prediction - mean label| over bins of equal width, by what they hold."""
    place = np.minimum((predicted * _BINS).astype(int), _BINS - 1)
    gap = np.bincount(place, predicted - label, _BINS)
    return float(np.abs(gap).sum() / len(predicted))
