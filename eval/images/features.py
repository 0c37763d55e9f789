"""What metrics see of images: features of a network, for whole files at one compiled batch size.

Metrics know a network as an `Extractor`: a name and a function. With the Inception graph of 2015 the numbers are those
that the field calls FID, sFID and Inception Score. Any other classifier serves the same arithmetic, and its numbers
then go by other names, because they compare with nothing published.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, UInt8

from eval.images.samples import INCEPTION, Gaussian, Statistics
from models.errors import UserError
from models.formats import image_models as files
from models.formats.inception import read_inception
from models.formats.text_files import read_json
from models.images import classifier, inception
from models.images.classifier import ClassifierConfig


class ImageFeatures(NamedTuple):
    """What an extractor tells of a batch.

    Attributes:
      features: what the Fréchet distance, precision and recall compare.
      probabilities: of its classes.
      spatial: features that keep places, or None.
    """

    features: Float[Array, "B F"]
    probabilities: Float[Array, "B C"]
    spatial: Float[Array, "B S"] | None = None


@dataclasses.dataclass(frozen=True)
class Extractor:
    """A network as metrics see it.

    Attributes:
      kind: `INCEPTION`, or what the names of its metrics begin with, such as `classifier`.
      network: the kind and whatever tells its weights apart; statistics of two networks are never compared.
      apply: parameters and images, uint8 [B, H, W, 3], to `ImageFeatures`; compiled once per size of images.
      params: the parameters.
    """

    kind: str
    network: str
    apply: Callable[[Any, UInt8[Array, "B H W 3"]], ImageFeatures]
    params: Any

    @property
    def metric_names(self) -> dict[str, str]:
        """What each metric is called with this network."""
        if self.kind == INCEPTION:
            return {name: name for name in ("fid", "sfid", "inception_score", "precision", "recall")}
        ours = {"fid": "frechet", "sfid": "spatial_frechet", "inception_score": "score"}
        return {name: f"{self.kind}_{ours.get(name, name)}" for name in (*ours, "precision", "recall")}


def _trained_here(directory: Path) -> Extractor:
    config, params = files.load(directory, ClassifierConfig)

    def apply(params, images: UInt8[Array, "B H W 3"]) -> ImageFeatures:
        if images.shape[1:3] != (config.image_size, config.image_size):
            found = "x".join(map(str, images.shape[1:3]))
            raise UserError(f"the classifier {directory} knows images of side {config.image_size}, these are {found}")
        features, scores = classifier.forward(config, params, images.astype(jnp.float32) / 127.5 - 1)
        return ImageFeatures(features, jax.nn.softmax(scores))

    with (directory / "model.safetensors").open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Extractor("classifier", f"classifier:{digest[:16]}", apply, params)


# What the entry `kind` of a classifier directory's config.json may be -> the function that loads it.
CLASSIFIERS: dict[str, Callable[[Path], Extractor]] = {"classifier": _trained_here}


def load_inception(path: str | Path) -> Extractor:
    """The extractor whose metrics may be called FID, from a file of the torch port's weights.

    Raises:
      UserError: the file is missing, damaged or of another network.
    """
    return Extractor(INCEPTION, INCEPTION, _inception_features, read_inception(path))


def _inception_features(params: inception.Params, images: UInt8[Array, "B H W 3"]) -> ImageFeatures:
    found = inception.features(params, images)
    return ImageFeatures(found.pool, jax.nn.softmax(found.logits), found.spatial)


def load_classifier(directory: str | Path) -> Extractor:
    """The extractor in a directory of a classifier trained here; its `config.json` names one of `CLASSIFIERS`.

    Raises:
      UserError: it is no such directory.
    """
    directory = Path(directory)
    if not (directory / "config.json").is_file():
        raise UserError(f"there is no classifier in {directory}: expected a directory with a config.json")
    kind = read_json(directory / "config.json").get("kind")
    if kind not in CLASSIFIERS:
        known = ", ".join(CLASSIFIERS) or "none so far"
        raise UserError(f"{directory / 'config.json'} is of kind {kind!r}, which is no classifier (known: {known})")
    return CLASSIFIERS[kind](directory)


_FOLD = 1024  # Rows that are summed up together: adding to a covariance costs as much for one as for hundreds.


class RunningGaussian:
    """Mean and covariance of rows that come in blocks, float64 (Chan, Golub & LeVeque 1979).

    Blocks are centred before they are squared, so that a mean far from zero costs no digits.
    """

    def __init__(self):
        self.count = 0
        self._mean: np.ndarray = np.zeros(())
        self._scatter: np.ndarray = np.zeros(())
        self._folded = 0
        self._pending: list[np.ndarray] = []

    def add(self, rows: Float[np.ndarray, "B F"]) -> None:
        """Takes in a block."""
        self.count += len(rows)
        self._pending.append(rows)
        if self.count - self._folded >= _FOLD:
            self._fold()

    def _fold(self) -> None:
        rows = np.concatenate(self._pending).astype(np.float64)
        self._pending = []
        mean = rows.mean(axis=0)
        shift = mean - self._mean
        # Both parts are about means of their own; this is what those differ by.
        between = np.sqrt(self._folded * len(rows) / self.count) * shift
        rows -= mean
        self._scatter = self._scatter + rows.T @ rows + np.multiply.outer(between, between)
        self._mean = self._mean + shift * (len(rows) / self.count)
        self._folded = self.count

    def result(self) -> Gaussian:
        """Of all rows so far.

        Raises:
          UserError: there are fewer than two.
        """
        if self.count < 2:
            raise UserError(f"a covariance takes at least 2 images, got {self.count}")
        if self._pending:
            self._fold()
        return Gaussian(self._mean, self._scatter / (self.count - 1))


@dataclasses.dataclass(frozen=True)
class Extracted:
    """Features of a whole set of images.

    Attributes:
      features: float32 [N, F].
      probabilities: float32 [N, C].
      statistics: of the features, float64.
    """

    features: Float32[np.ndarray, "N F"]
    probabilities: Float32[np.ndarray, "N C"]
    statistics: Statistics


def extract(
    extractor: Extractor,
    blocks: Iterable[UInt8[np.ndarray, "B H W 3"]],
    batch_size: int,
    progress: Callable[[str], None] = lambda line: None,
) -> Extracted:
    """Runs a network over images: one compilation, the last batch filled up with black images that nobody counts.

    Args:
      extractor: the network.
      blocks: the images, in blocks of at most `batch_size`.
      batch_size: of the compiled program.
      progress: told how many images are done.

    Raises:
      UserError: there are fewer than two images.
    """
    program = jax.jit(extractor.apply)
    kept: list[tuple[np.ndarray, np.ndarray]] = []
    whole, places = RunningGaussian(), RunningGaussian()
    running: tuple[ImageFeatures, int] | None = None

    def take(found: ImageFeatures, count: int) -> None:
        features, probabilities = (np.asarray(x, np.float32)[:count] for x in found[:2])
        kept.append((features, probabilities))
        whole.add(features)
        if found.spatial is not None:
            places.add(np.asarray(found.spatial)[:count])
        progress(f"{whole.count:,} images seen by the network")

    for block in blocks:
        filled = np.zeros((batch_size, *block.shape[1:]), np.uint8)
        filled[: len(block)] = block
        started = program(extractor.params, jnp.asarray(filled)), len(block)
        # The device works on this batch while the host sums up the one before.
        if running is not None:
            take(*running)
        running = started
    if running is not None:
        take(*running)
    gaussians = whole.result(), places.result() if places.count else None
    features, probabilities = (np.concatenate(part) for part in zip(*kept, strict=True))
    return Extracted(features, probabilities, Statistics(*gaussians, extractor.network))
