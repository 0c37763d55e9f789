"""What everybody's images are compared with, and what is the best that can be expected.

The reference is the training split, as it is for published numbers. Two more sets go through the same metrics: held-out
images, which tell what the distance between two honest draws from the data is, and their reconstructions by the
tokenizer, which no model of its codes can be expected to beat.

Where the network is a classifier of the data's own classes there is one more metric, `classifier_agreement`: the share
of images that it takes for the class they were asked to be.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8

from decoding.images.generate import Tokenizer
from eval.images.features import Extractor, extract
from eval.images.metrics import Described, describe, evaluate, open_images
from eval.images.pictures import reconstructions
from eval.images.samples import INCEPTION, evenly
from models.errors import UserError
from train.data.images import Images

Blocks = Iterator[UInt8[np.ndarray, "B H W 3"]]


class Judge:
    """A network and the images that it compares others with."""

    def __init__(
        self,
        extractor: Extractor,
        reference: Images,
        count: int,
        batch: int,
        progress: Callable[[str], None] = lambda line: None,
    ):
        """Runs the network over the reference.

        Args:
          extractor: the network.
          reference: a split.
          count: how many of its images are taken, evenly spread.
          batch: images that the network sees together.
          progress: told what is being done.

        Raises:
          UserError: there are fewer than two images, or a classifier that is not Inception has another number of
            classes than the data.
        """
        _check_classes(extractor, reference)
        self.extractor, self._batch, self._progress = extractor, batch, progress
        self.chosen = spread(reference, count)
        self._reference = self._described(_blocks(reference, self.chosen, batch), "reference", reference.size)

    def samples(self, path: str | Path, labels: Sequence[int]) -> dict[str, Any]:
        """Metrics and notes of a file of samples, as `evaluate` returns them.

        Args:
          path: the `.npz`.
          labels: the classes that its images were asked to be.
        """
        file = open_images(path, self.extractor)
        return self._judged(describe(file, self.extractor, self._batch, self._progress), labels)

    def bounds(self, tokenizer: Tokenizer, held_out: Images, count: int) -> dict[str, dict[str, float]]:
        """Metrics of `count` held-out images and of their reconstructions, by name.

        Raises:
          UserError: there are fewer than two.
        """
        chosen = spread(held_out, count)
        labels = [int(held_out[index]["label"]) for index in chosen]

        def rebuilt() -> Blocks:
            for block in _blocks(held_out, chosen, self._batch):
                filled = np.concatenate([block, np.repeat(block[-1:], self._batch - len(block), axis=0)])
                yield reconstructions(tokenizer, filled)[: len(block)]

        sets = {"held-out images": _blocks(held_out, chosen, self._batch), "reconstructions": rebuilt()}
        return {
            name: self._judged(self._described(images, name, held_out.size), labels)["metrics"]
            for name, images in sets.items()
        }

    def _described(self, images: Blocks, source: str, side: int) -> Described:
        found = extract(self.extractor, images, self._batch, self._progress)
        return Described(source, (len(found.features), side, side, 3), found.statistics, False, found)

    def _judged(self, images: Described, labels: Sequence[int]) -> dict[str, Any]:
        found = evaluate(images, self._reference, self.extractor)
        if self.extractor.kind != INCEPTION and images.extracted is not None:
            taken_for = np.argmax(images.extracted.probabilities, axis=1)
            found["metrics"][f"{self.extractor.kind}_agreement"] = float(np.mean(taken_for == np.asarray(labels)))
        return found


def _check_classes(extractor: Extractor, data: Images) -> None:
    """Before the network runs: agreement compares numbers of classes, which say the same only in the same list."""
    if extractor.kind == INCEPTION:
        return
    image = jax.ShapeDtypeStruct((1, data.size, data.size, 3), np.uint8)
    known = jax.eval_shape(extractor.apply, extractor.params, image).probabilities.shape[1]
    if known != len(data.classes):
        raise UserError(f"the {extractor.kind} knows {known} classes, the data set has {len(data.classes)}")


def spread(images: Images, count: int) -> list[int]:
    """Numbers of `count` images of a split, evenly spread, or of all.

    Raises:
      UserError: there are fewer than two.
    """
    if min(count, len(images)) < 2:
        raise UserError(f"metrics take at least 2 images, got {min(count, len(images))}")
    return evenly(count, len(images))


def _blocks(images: Images, chosen: Sequence[int], size: int) -> Blocks:
    for start in range(0, len(chosen), size):
        yield np.stack([images[index]["image"] for index in chosen[start : start + size]])
