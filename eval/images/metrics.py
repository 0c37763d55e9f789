"""FID, sFID, Inception Score, precision and recall of images, by the convention of ADM's evaluation suite.

    python -m eval.images.metrics --samples samples.npz --reference VIRTUAL_imagenet256_labeled.npz \
        --weights pt_inception-2015-12-05-6726825d.pth --out metrics.json
    python -m eval.images.metrics --samples train.npz --weights FILE --statistics reference.npz --with_images 10000
    python -m eval.images.metrics --samples samples.npz --reference validation.npz --features CLASSIFIER_DIR

Files are those of `eval/images/samples.py`; statistics that a file holds are used as they are. Precision and recall
take images on both sides: like ADM's references, those that the second command makes have some beside their statistics.
Only with the weights of the Inception graph of 2015 do the numbers carry the names above. With another classifier they
are called `classifier_frechet`, `classifier_score` and so on: they rank models by the same arithmetic, and compare with
nothing published.
"""

import argparse
import dataclasses
import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from eval.images.features import Extracted, Extractor, extract, load_classifier, load_inception
from eval.images.samples import Gaussian, ImageFile, Statistics, write_statistics
from eval.measure.environment import describe_environment
from eval.measure.progress import Progress
from eval.report.files import write_json
from models import command_line, processes
from models.command_line import add_distributed, add_overwrite, at_least, keep_files
from models.errors import UserError, exit_on_user_error

SPLIT = 5000  # Images per split of an Inception Score.
NEIGHBOURS = 3  # k of precision and recall.
_SEED = 2020
_BLOCK = 512  # Rows of distances held at a time.


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|mu_a - mu_b|^2 + Tr(A + B - 2 (A B)^1/2) of two Gaussians (Heusel et al. 2017, equation 6).

    The trace of (A B)^1/2 is the sum of the square roots of the eigenvalues of A^1/2 B A^1/2, which is symmetric. So
    two symmetric eigenproblems do, in float64, and singular covariances need no term added to them, as they do where
    the root of the product itself is taken.

    Raises:
      UserError: they are of different numbers of features.
    """
    if a.mu.shape != b.mu.shape:
        raise UserError(f"features of {len(a.mu)} and of {len(b.mu)} numbers cannot be compared")
    values, vectors = np.linalg.eigh(a.sigma)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    product = root @ b.sigma @ root
    overlap = np.sqrt(np.maximum(np.linalg.eigvalsh((product + product.T) / 2), 0)).sum()
    distance = np.sum((a.mu - b.mu) ** 2) + np.trace(a.sigma) + np.trace(b.sigma) - 2 * overlap
    return float(max(distance, 0))  # Of equal Gaussians rounding may leave less.


@dataclasses.dataclass(frozen=True)
class InceptionScore:
    """exp of the mean KL divergence of an image's class probabilities from those of its split.

    Attributes:
      mean: over splits.
      deviation: standard deviation over splits.
      splits: their number.
      split_size: images in each.
      left_over: images in none, because they do not fill one.
    """

    mean: float
    deviation: float
    splits: int
    split_size: int
    left_over: int


def inception_score(
    probabilities: Float[np.ndarray, "N C"], split_size: int = SPLIT, seed: int = _SEED
) -> InceptionScore:
    """The score of Salimans et al. 2016, over splits of shuffled images.

    Files are often sorted by class. In their order a split of 5,000 would hold 100 of 1,000 classes, and the score
    could not pass 100; so images are shuffled first, always alike. The score grows with the size of a split, which is
    why images that fill no split are left over; fewer than one split's make a single, smaller one.

    Args:
      probabilities: rows that sum to 1.
      split_size: images per split.
      seed: of the shuffle.

    Raises:
      UserError: there are no images.
    """
    if not len(probabilities):
        raise UserError("an Inception Score takes at least one image")
    shuffled = np.random.default_rng(seed).permutation(len(probabilities))
    size = min(split_size, len(probabilities))
    scores = []
    for start in range(0, len(probabilities) - size + 1, size):
        p = probabilities[shuffled[start : start + size]].astype(np.float64)
        mean = p.mean(axis=0)
        # 0 log 0 = 0; a class that no image of the split has adds nothing.
        ratio = np.log(np.where(p > 0, p, 1)) - np.log(np.where(mean > 0, mean, 1))
        scores.append(np.exp(np.mean(np.sum(p * ratio, axis=1))))
    left_over = len(probabilities) - size * len(scores)
    return InceptionScore(float(np.mean(scores)), float(np.std(scores)), len(scores), size, left_over)


def precision_recall(
    samples: Float[np.ndarray, "N F"],
    reference: Float[np.ndarray, "M F"],
    neighbours: int = NEIGHBOURS,
    block: int = _BLOCK,
) -> tuple[float, float]:
    """Shares of samples inside the reference's manifold and of the reference inside the samples' (Kynkäänniemi 2019).

    A manifold is the union of spheres around its points, each as large as the distance to the point's k-th neighbour;
    borders belong to it.

    Args:
      samples: features of generated images.
      reference: features of real ones.
      neighbours: k.
      block: rows of the distance matrix that are held at a time.

    Raises:
      UserError: there are not more than `neighbours` images on one side.
    """
    for name, points in (("samples", samples), ("reference images", reference)):
        if len(points) <= neighbours:
            raise UserError(f"precision and recall take more than {neighbours} {name}, got {len(points)}")
    # Distances do not change, and squares lose fewer digits.
    centre = reference.mean(axis=0, dtype=np.float64)
    samples, reference = (points - centre for points in (samples, reference))
    precision = _inside(samples, reference, _radii(reference, neighbours, block), block)
    recall = _inside(reference, samples, _radii(samples, neighbours, block), block)
    return float(precision.mean()), float(recall.mean())


def _radii(points: Float[np.ndarray, "N F"], neighbours: int, block: int) -> Float[np.ndarray, "N"]:
    """Squared distance of each point to its k-th neighbour; the nearest of all is the point itself."""
    rows = _distances(points, points, block)
    return np.concatenate([np.partition(d, neighbours, axis=1)[:, neighbours] for d in rows])


def _inside(
    points: Float[np.ndarray, "N F"], centres: Float[np.ndarray, "M F"], radii: Float[np.ndarray, "M"], block: int
) -> Bool[np.ndarray, "N"]:
    return np.concatenate([(d <= radii).any(axis=1) for d in _distances(points, centres, block)])


def _distances(
    a: Float[np.ndarray, "N F"], b: Float[np.ndarray, "M F"], block: int
) -> Iterator[Float[np.ndarray, "B M"]]:
    """Squared distances of all pairs, `block` rows at a time, float64."""
    b_squares = np.sum(b * b, axis=1)
    for start in range(0, len(a), block):
        rows = a[start : start + block]
        squares = np.sum(rows * rows, axis=1)[:, None] + b_squares
        distances = squares - 2 * rows @ b.T
        # What rounding leaves between equal images, which would fall out of spheres of radius 0.
        distances[distances < 1e-12 * squares] = 0
        yield distances


@dataclasses.dataclass(frozen=True)
class Described:
    """What is known of one side of a comparison.

    Attributes:
      source: where it comes from.
      shape: of its images, (N, H, W, 3); None if there are only statistics.
      statistics: of its features, from the file if it holds them.
      statistics_read: whether they are from the file.
      extracted: features of its images; None if there are none.
    """

    source: str
    shape: tuple[int, ...] | None
    statistics: Statistics
    statistics_read: bool
    extracted: Extracted | None

    def record(self) -> dict[str, Any]:
        """As plain values for JSON."""
        shape = None if self.shape is None else list(self.shape)
        return {"source": self.source, "images": shape, "statistics": "read" if self.statistics_read else "computed"}


def open_images(path: str | Path, extractor: Extractor) -> ImageFile:
    """Opens a file.

    Raises:
      UserError: it is missing or bad, or its statistics are of another network.
    """
    file = ImageFile(path)
    if file.statistics is not None and file.statistics.network != extractor.network:
        raise UserError(
            f"{path} holds statistics of the network {file.statistics.network}, the network here is {extractor.network}"
        )
    return file


def describe(
    file: ImageFile, extractor: Extractor, batch_size: int, progress: Callable[[str], None] = lambda line: None
) -> Described:
    """Runs the network over the images of a file, if it has any.

    Raises:
      UserError: the file is damaged or holds a single image.
    """
    extracted = extract(extractor, file.blocks(batch_size), batch_size, progress) if len(file) else None
    statistics = file.statistics or (extracted.statistics if extracted else None)
    assert statistics is not None, "a file holds images or statistics"
    return Described(str(file.path), file.shape, statistics, file.statistics is not None, extracted)


def evaluate(samples: Described, reference: Described | None, extractor: Extractor) -> dict[str, Any]:
    """All metrics that the two sides allow; without a reference that is the score of the samples alone.

    Returns:
      `network`: the extractor's. `metrics`: name -> number; with Inception `fid`, `sfid`, `inception_score`,
      `precision`, `recall`, as far as both sides hold what they need. `details`: the splits behind the score. `notes`:
      what to know when reading the numbers, as sentences.

    Raises:
      UserError: the features of the two are of different widths.
    """
    names = extractor.metric_names
    metrics: dict[str, float] = {}
    details: dict[str, Any] = {}
    notes = [*_notes(samples, "samples"), *(_notes(reference, "reference") if reference else [])]
    if reference is not None:
        metrics[names["fid"]] = frechet_distance(samples.statistics.features, reference.statistics.features)
        if samples.statistics.spatial and reference.statistics.spatial:
            metrics[names["sfid"]] = frechet_distance(samples.statistics.spatial, reference.statistics.spatial)
    if samples.extracted is not None:
        score = inception_score(samples.extracted.probabilities)
        metrics[names["inception_score"]] = score.mean
        details[names["inception_score"]] = dataclasses.asdict(score)
        notes += _score_notes(score, names["inception_score"])
    if samples.extracted is not None and reference is not None and reference.extracted is not None:
        sides = samples.extracted.features, reference.extracted.features
        if min(map(len, sides)) > NEIGHBOURS:
            metrics[names["precision"]], metrics[names["recall"]] = precision_recall(*sides)
        if (samples.shape or ())[1:] != (reference.shape or ())[1:]:
            notes.append("samples and reference are images of different sizes")
    return {"network": extractor.network, "metrics": metrics, "details": details, "notes": notes}


def _notes(side: Described, name: str) -> list[str]:
    width = len(side.statistics.features.mu)
    if side.statistics_read or side.extracted is None or len(side.extracted.features) > width:
        return []
    count = len(side.extracted.features)
    return [
        f"{name}: a covariance of {width:,} features takes more than {count:,} images to be of full rank, and "
        "distances are biased upwards"
    ]


def _score_notes(score: InceptionScore, name: str) -> list[str]:
    if score.split_size < SPLIT:
        return [f"{name} is over one split of {score.split_size:,} images, not of {SPLIT:,}, and so biased downwards"]
    if score.left_over:
        return [f"{name} leaves out {score.left_over:,} images that fill no split of {SPLIT:,}"]
    return []


def print_table(results: dict[str, Any]) -> None:
    """Metrics, one to a line, and the notes."""
    for name, value in results["metrics"].items():
        print(f"{name:24}{value:12.4f}")
    for note in results["notes"]:
        print(f"note: {note}", file=sys.stderr)


def _extractor(args: argparse.Namespace) -> Extractor:
    if args.weights is not None:
        return load_inception(args.weights)
    if args.features is not None:
        return load_classifier(args.features)
    raise UserError(
        "FID, sFID and Inception Score are those of the Inception weights of 2015: give their file "
        "(pt_inception-2015-12-05-6726825d.pth) as --weights FILE, or a classifier trained here as --features DIR, "
        "whose numbers go by other names (classifier_frechet and so on)"
    )


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """The command; see the module's docstring."""
    parser = command_line.parser("eval.images.metrics", __doc__)
    parser.add_argument("--samples", required=True, help=".npz of images to judge, or of their statistics")
    parser.add_argument("--reference", help=".npz to compare them with: statistics, images or both")
    network = parser.add_mutually_exclusive_group()
    network.add_argument("--weights", help="Inception weights of 2015-12-05, as the torch port has them")
    network.add_argument("--features", help="or a classifier's directory, for metrics of other names")
    parser.add_argument("--statistics", help="write the samples' statistics to this .npz, as a later --reference")
    parser.add_argument("--with_images", type=at_least(0), default=0, help="with so many of the images, evenly spread")
    parser.add_argument("--out", help="write the results to this JSON file")
    parser.add_argument("--batch_size", type=at_least(1), default=32, help="images that the network sees together")
    add_overwrite(parser)
    add_distributed(parser)
    args = parser.parse_args(argv)
    processes.start(args.distributed)
    keep_files([args.statistics, args.out], args.overwrite)
    if args.with_images and args.statistics is None:
        raise UserError(f"--with_images {args.with_images} goes with --statistics, which names the file for them")
    for path in (args.statistics, args.out):
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise UserError(f"cannot write {path}: there is no directory {Path(path).parent}")
    extractor = _extractor(args)
    # Both before the network runs, which may take long.
    files = [open_images(path, extractor) for path in (args.samples, args.reference) if path is not None]
    if args.reference is None and not len(files[0]):
        raise UserError(f"{args.samples} holds statistics alone: give a --reference to compare them with")
    if args.with_images and not len(files[0]):
        raise UserError(f"{args.samples} holds statistics alone: --with_images {args.with_images} has nothing to take")
    with Progress() as progress:
        samples, *others = (describe(file, extractor, args.batch_size, progress) for file in files)
        reference = others[0] if others else None
        progress("comparing")
        results = evaluate(samples, reference, extractor)
    print_table(results)
    if args.statistics is not None:
        images = files[0].some(args.with_images) if args.with_images else None
        write_statistics(args.statistics, samples.statistics, images)
    if args.out is not None:
        environment = describe_environment()
        sides = {"samples": samples.record(), "reference": reference.record() if reference else None}
        weights = {"path": args.weights, "sha256": _digest(args.weights)} if args.weights else None
        head = {"environment": environment, "command": environment["command"], **sides, "weights": weights}
        write_json({**head, **results}, Path(args.out))


def _digest(path: str) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    main()
