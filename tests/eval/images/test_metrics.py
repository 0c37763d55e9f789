"""Metrics against closed forms and brute force, and the command from files to JSON with a network of its own."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from eval.images import features, metrics
from eval.images.features import Extractor, ImageFeatures, RunningGaussian, extract
from eval.images.metrics import frechet_distance, inception_score, precision_recall
from eval.images.samples import Gaussian, ImageFile, write_images
from models.errors import UserError

RNG = np.random.default_rng


def cloud(count: int, width: int, seed: int) -> np.ndarray:
    rng = RNG(seed)
    return rng.normal(size=(count, width)) @ rng.normal(size=(width, width)) + rng.normal(size=width)


def gaussian(rows: np.ndarray) -> Gaussian:
    return Gaussian(rows.mean(axis=0), np.atleast_2d(np.cov(rows, rowvar=False)))


def by_sqrtm(a: Gaussian, b: Gaussian) -> float:
    root = scipy.linalg.sqrtm(a.sigma @ b.sigma).real
    return float(np.sum((a.mu - b.mu) ** 2) + np.trace(a.sigma + b.sigma - 2 * root))


@pytest.mark.parametrize("width", [1, 2, 17])
def test_frechet_distance_is_that_of_the_root_of_the_product(width: int) -> None:
    a, b = gaussian(cloud(50, width, 1)), gaussian(cloud(70, width, 2))
    assert frechet_distance(a, b) == pytest.approx(by_sqrtm(a, b), rel=1e-8)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-8)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-8)


def test_frechet_distance_of_commuting_covariances() -> None:
    """Where A and B commute it is |mu_a - mu_b|^2 + sum of (sqrt a_i - sqrt b_i)^2."""
    turn, _ = np.linalg.qr(RNG(0).normal(size=(4, 4)))
    a, b = np.array([1.0, 4.0, 9.0, 0.0]), np.array([4.0, 4.0, 1.0, 0.0])
    sides = [Gaussian(np.full(4, mean), turn @ np.diag(v) @ turn.T) for mean, v in ((1.0, a), (3.0, b))]
    expected = 4 * 2.0**2 + np.sum((np.sqrt(a) - np.sqrt(b)) ** 2)
    assert frechet_distance(*sides) == pytest.approx(expected, abs=1e-6)


def test_frechet_distance_of_singular_covariances_is_finite_and_continuous() -> None:
    few, many = gaussian(cloud(5, 12, 1)), gaussian(cloud(100, 12, 2))
    nearly = Gaussian(few.mu, few.sigma + 1e-9 * np.eye(12))
    assert np.linalg.matrix_rank(few.sigma) == 4
    assert frechet_distance(few, many) == pytest.approx(frechet_distance(nearly, many), rel=1e-3)


def test_features_of_other_widths_are_refused() -> None:
    with pytest.raises(UserError, match="features of 3 and of 4 numbers"):
        frechet_distance(gaussian(cloud(9, 3, 0)), gaussian(cloud(9, 4, 0)))


def test_score_of_certain_and_of_blind_classifiers() -> None:
    certain = np.eye(10)[np.arange(200) % 10]
    assert inception_score(certain).mean == pytest.approx(10)
    assert inception_score(np.full((50, 10), 0.1)).mean == pytest.approx(1)
    # Half the mass of each image on its class, the rest on all: exp of log(10) - H(p).
    p = 0.5 * certain + 0.05
    row = p[0]
    assert inception_score(p).mean == pytest.approx(10 * np.exp(np.sum(row * np.log(row))))


def test_score_shuffles_before_it_splits() -> None:
    """A file sorted by class would give one class per split, and a score of 1."""
    certain = np.repeat(np.eye(10), 50, axis=0)
    score = inception_score(certain, split_size=250)
    assert (score.splits, score.split_size, score.left_over) == (2, 250, 0)
    assert 9.5 < score.mean <= 10
    assert inception_score(certain, split_size=250) == score
    assert inception_score(certain, split_size=250, seed=1) != score


def test_score_says_what_fills_no_split() -> None:
    p = RNG(0).dirichlet(np.ones(5), size=25)
    assert inception_score(p, split_size=10).left_over == 5
    single = inception_score(p, split_size=100)
    assert (single.splits, single.split_size, single.left_over, single.deviation) == (1, 25, 0, 0)
    mean = p.mean(axis=0)
    assert single.mean == pytest.approx(np.exp(np.mean(np.sum(p * np.log(p / mean), axis=1))))
    with pytest.raises(UserError, match="at least one image"):
        inception_score(p[:0])


def by_brute_force(samples: np.ndarray, reference: np.ndarray, k: int) -> tuple[float, float]:
    def inside(points, centres):
        radii = [
            sorted(np.linalg.norm(c - d) for j, d in enumerate(centres) if j != i)[k - 1] for i, c in enumerate(centres)
        ]
        return np.mean([any(np.linalg.norm(p - c) <= r for c, r in zip(centres, radii, strict=True)) for p in points])

    return inside(samples, reference), inside(reference, samples)


@pytest.mark.parametrize("block", [3, 1000])
@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_by_brute_force(block: int, k: int) -> None:
    samples, reference = RNG(1).normal(size=(31, 3)) * 0.7 + 0.6, RNG(2).normal(size=(23, 3))
    expected = by_brute_force(samples, reference, k)
    assert 0 < min(expected) < max(expected) < 1 and expected[0] != expected[1]
    assert precision_recall(samples, reference, k, block) == pytest.approx(expected)
    # Far from zero, single precision.
    far = [(1000 + x).astype(np.float32) for x in (samples, reference)]
    assert precision_recall(*far, k, block) == pytest.approx(by_brute_force(*(x.astype(float) for x in far), k))


def test_precision_and_recall_of_the_ends() -> None:
    points = RNG(3).normal(size=(20, 4))
    assert precision_recall(points, points) == (1, 1)
    assert precision_recall(points + 100, points) == (0, 0)
    # All samples one image of the reference: its spheres have radius 0 and hold it alone.
    one = np.repeat(points[:1], 9, axis=0)
    assert precision_recall(one, points) == (1, 1 / 20)
    with pytest.raises(UserError, match="more than 3 samples, got 3"):
        precision_recall(points[:3], points)


@pytest.mark.parametrize("fold", [1, 20, 1000])
def test_running_gaussian_is_that_of_all_rows(fold: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "_FOLD", fold)
    rows = cloud(40, 6, 5) + 1e6
    running = RunningGaussian()
    for start, stop in ((0, 1), (1, 17), (17, 40)):
        running.add(rows[start:stop])
    found = running.result()
    np.testing.assert_allclose(found.mu, rows.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.sigma, np.cov(rows, rowvar=False), rtol=1e-7, atol=1e-7)
    with pytest.raises(UserError, match="at least 2 images, got 0"):
        RunningGaussian().result()


def apply(params, images) -> ImageFeatures:
    """A network that looks at mean colours."""
    means = images.astype(jnp.float32).mean(axis=(1, 2)) @ params
    shares = jnp.abs(means[:, :3]) + 1
    return ImageFeatures(means, shares / shares.sum(axis=1, keepdims=True), means[:, :2])


PARAMS = RNG(7).normal(size=(3, 3)).astype(np.float32)
TOY = Extractor("classifier", "classifier:toy", apply, PARAMS)
INCEPTION_LIKE = Extractor("inception", "inception", apply, PARAMS)


def images(count: int, seed: int, low: int = 0) -> np.ndarray:
    return RNG(seed).integers(low, 256, (count, 2, 2, 3), np.uint8)


def test_extraction_pads_the_last_batch_and_compiles_once() -> None:
    traced = []
    pixels = images(11, 0)
    counting = Extractor("x", "x", lambda p, x: (traced.append(x.shape), apply(p, x))[1], TOY.params)
    found = extract(counting, [pixels[:4], pixels[4:8], pixels[8:]], 4)
    assert traced == [(4, 2, 2, 3)]
    expected = apply(TOY.params, jnp.asarray(pixels))
    np.testing.assert_allclose(found.features, expected.features, rtol=1e-5)
    np.testing.assert_allclose(found.probabilities, expected.probabilities, rtol=1e-5)
    np.testing.assert_allclose(found.statistics.features.sigma, np.cov(expected.features, rowvar=False), rtol=1e-4)
    assert found.statistics.spatial is not None and found.statistics.spatial.mu.shape == (2,)
    with pytest.raises(UserError, match="at least 2 images, got 1"):
        extract(TOY, [pixels[:1]], 4)


@pytest.fixture
def toy_directory(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    monkeypatch.setitem(features.CLASSIFIERS, "toy", lambda directory: TOY)
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "config.json").write_text('{"kind": "toy"}')
    return tmp_path / "toy"


def test_command_names_a_classifier_as_such(toy_directory: pathlib.Path, capsys: pytest.CaptureFixture) -> None:
    folder = toy_directory.parent
    write_images(folder / "a.npz", images(30, 1))
    write_images(folder / "b.npz", images(40, 2, low=60))
    common = ["--samples", str(folder / "a.npz"), "--features", str(toy_directory), "--batch_size", "8"]
    metrics.main([*common, "--reference", str(folder / "b.npz"), "--out", str(folder / "m.json")])
    results = json.loads((folder / "m.json").read_text())
    assert list(results["metrics"]) == [
        "classifier_frechet",
        "classifier_spatial_frechet",
        "classifier_score",
        "classifier_precision",
        "classifier_recall",
    ]
    assert results["network"] == "classifier:toy" and results["weights"] is None
    a, b = (np.asarray(apply(PARAMS, jnp.asarray(x)).features, float) for x in (images(30, 1), images(40, 2, low=60)))
    expected = frechet_distance(gaussian(a), gaussian(b))
    assert results["metrics"]["classifier_frechet"] == pytest.approx(expected, rel=1e-5)
    printed = capsys.readouterr()
    assert f"classifier_frechet      {expected:12.4f}" in printed.out and "fid" not in printed.out.lower()
    assert "one split of 30 images" in printed.err

    # The same through a file of statistics, which then are those of this network alone.
    metrics.main(["--samples", str(folder / "b.npz"), *common[2:], "--statistics", str(folder / "s.npz")])
    metrics.main([*common, "--reference", str(folder / "s.npz"), "--out", str(folder / "n.json")])
    again = json.loads((folder / "n.json").read_text())
    assert again["metrics"]["classifier_frechet"] == pytest.approx(expected, rel=1e-5)
    assert "classifier_precision" not in again["metrics"]
    assert again["reference"] == {"source": str(folder / "s.npz"), "images": None, "statistics": "read"}
    assert "give a --reference" in complaint(["--samples", str(folder / "s.npz"), *common[2:]], capsys)
    with pytest.raises(UserError, match="statistics of the network classifier:toy, the network here is inception"):
        metrics.open_images(folder / "s.npz", INCEPTION_LIKE)


def test_inception_carries_the_names_of_the_field(tmp_path: pathlib.Path) -> None:
    write_images(tmp_path / "a.npz", images(30, 1))
    side = metrics.describe(ImageFile(tmp_path / "a.npz"), INCEPTION_LIKE, 8)
    results = metrics.evaluate(side, side, INCEPTION_LIKE)
    assert list(results["metrics"]) == ["fid", "sfid", "inception_score", "precision", "recall"]
    assert results["metrics"]["fid"] == pytest.approx(0, abs=1e-6) and results["metrics"]["precision"] == 1
    assert list(metrics.evaluate(side, None, INCEPTION_LIKE)["metrics"]) == ["inception_score"]
    assert side.record() == {"source": str(tmp_path / "a.npz"), "images": [30, 2, 2, 3], "statistics": "computed"}


def test_a_reference_of_ours_serves_precision_and_recall(toy_directory: pathlib.Path) -> None:
    """Statistics of all images beside some of them, as ADM's files have it."""
    folder, train = toy_directory.parent, images(700, 2, low=60)
    write_images(folder / "a.npz", images(30, 1))
    write_images(folder / "train.npz", train)
    network = ["--features", str(toy_directory), "--batch_size", "8"]
    kept = ["--statistics", str(folder / "r.npz"), "--with_images", "50"]
    metrics.main(["--samples", str(folder / "train.npz"), *network, *kept])
    with np.load(folder / "r.npz") as file:
        assert set(file) == {"arr_0", "mu", "sigma", "mu_s", "sigma_s", "network"}
        np.testing.assert_array_equal(file["arr_0"], train[::14])
        mean = np.asarray(apply(PARAMS, jnp.asarray(train)).features, float).mean(axis=0)
        np.testing.assert_allclose(file["mu"], mean, rtol=1e-5)
    common = ["--samples", str(folder / "a.npz"), *network, "--reference"]
    metrics.main([*common, str(folder / "r.npz"), "--out", str(folder / "m.json")])
    found = json.loads((folder / "m.json").read_text())
    sides = [np.asarray(apply(PARAMS, jnp.asarray(x)).features) for x in (images(30, 1), train[::14])]
    names = ("classifier_precision", "classifier_recall")
    assert [found["metrics"][name] for name in names] == pytest.approx(precision_recall(*sides))
    assert found["reference"] == {"source": str(folder / "r.npz"), "images": [50, 2, 2, 3], "statistics": "read"}


def test_few_images_and_other_sizes_are_noted(tmp_path: pathlib.Path) -> None:
    write_images(tmp_path / "a.npz", images(3, 1))
    write_images(tmp_path / "b.npz", RNG(0).integers(0, 256, (9, 4, 2, 3), np.uint8))
    few, other = (metrics.describe(ImageFile(tmp_path / f"{name}.npz"), TOY, 8) for name in "ab")
    results = metrics.evaluate(few, other, TOY)
    assert any("samples: a covariance of 3 features takes more than 3 images" in note for note in results["notes"])
    assert "samples and reference are images of different sizes" in results["notes"]
    assert "classifier_precision" not in results["metrics"]


def complaint(arguments: list[str], capsys: pytest.CaptureFixture) -> str:
    with pytest.raises(SystemExit) as exit:
        metrics.main(arguments)
    assert exit.value.code == 2
    return capsys.readouterr().err


def test_command_refuses_in_one_sentence(toy_directory: pathlib.Path, capsys: pytest.CaptureFixture) -> None:
    folder = toy_directory.parent
    write_images(folder / "a.npz", images(9, 1))
    common = ["--samples", str(folder / "a.npz")]
    assert "--weights FILE, or a classifier trained here as --features DIR" in complaint(common, capsys)
    assert "there is no released file" in complaint([*common, "--weights", str(folder / "none.pth")], capsys)
    assert "there is no classifier in" in complaint([*common, "--features", str(folder)], capsys)
    (toy_directory / "config.json").write_text('{"kind": "var"}')
    assert "is of kind 'var'" in complaint([*common, "--features", str(toy_directory)], capsys)
    (toy_directory / "config.json").write_text('{"kind": "toy"}')
    toy = [*common, "--features", str(toy_directory)]
    assert "there is no file" in complaint([*toy, "--reference", str(folder / "none.npz")], capsys)
    assert "there is no directory" in complaint([*toy, "--out", str(folder / "none" / "m.json")], capsys)
    assert "--batch_size must be at least 1" in complaint([*toy, "--batch_size", "0"], capsys)
    assert "--with_images must be at least 0, got -1" in complaint([*toy, "--with_images", "-1"], capsys)
    assert "--with_images 5 goes with --statistics" in complaint([*toy, "--with_images", "5"], capsys)
    statistics, again = str(folder / "s.npz"), str(folder / "t.npz")
    metrics.main([*toy, "--statistics", statistics])
    without = ["--samples", statistics, *toy[2:], "--reference", str(folder / "a.npz"), "--statistics", again]
    assert "--with_images 5 has nothing to take" in complaint([*without, "--with_images", "5"], capsys)
