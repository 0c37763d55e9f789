"""The judge: what it compares with must be of the classes that its network knows."""

import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from eval.images.features import Extractor, ImageFeatures, load_classifier
from eval.images.quality import Judge, spread
from eval.images.samples import INCEPTION
from models.errors import UserError
from train.data.images import Images


def data(classes: int, count: int = 6) -> Images:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), np.uint8)
    return Images(count, 8, [str(label) for label in range(classes)], lambda index: (pixels[index], index % classes))


def test_a_classifier_of_other_classes_is_refused(image_directories: pathlib.Path) -> None:
    """Before it runs: numbers of two lists of classes say nothing about each other."""
    extractor = load_classifier(image_directories / "classifier")
    assert len(Judge(extractor, data(3), 6, 4).chosen) == 6
    for classes in (2, 4):
        seen: list[str] = []
        with pytest.raises(UserError, match=f"the classifier knows 3 classes, the data set has {classes}"):
            Judge(extractor, data(classes), 6, 4, seen.append)
        assert not seen


def test_inception_judges_any_classes() -> None:
    """Its 1008 classes are never compared with those of the data."""

    def apply(params, images) -> ImageFeatures:
        return ImageFeatures(images.astype(jnp.float32).mean(axis=(1, 2)), jnp.full((len(images), 5), 0.2))

    assert Judge(Extractor(INCEPTION, INCEPTION, apply, None), data(3), 6, 4).chosen == list(range(6))


def test_spread() -> None:
    assert spread(data(3), 3) == [0, 2, 4] and spread(data(3), 99) == list(range(6))
    with pytest.raises(UserError, match="at least 2 images, got 1"):
        spread(data(3), 1)
