"""The classifier's objective: what is counted, how images are moved, that a job leaves what the metrics read."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eval.images.features import load_classifier
from models.errors import UserError
from models.images import classifier
from scripts import build_dataset
from train import trainer
from train.config import parse
from train.objectives import OBJECTIVES
from train.objectives.classifier import ImageClassifier, ImageClassifierConfig, _shifted

MODEL = {"image_size": 8, "width": 4, "multipliers": (1, 2)}


def objective(shift: int = 0) -> ImageClassifier:
    return ImageClassifier(ImageClassifierConfig("image_classifier", MODEL, shift), ["a", "b", "c"])


def batch(labels: list[int]) -> dict[str, jax.Array]:
    pixels = np.random.default_rng(0).integers(0, 256, (len(labels), 8, 8, 3), np.uint8)
    return {"image": jnp.asarray(pixels), "label": jnp.asarray(labels, jnp.int32)}


def test_loss_is_the_cross_entropy_of_images_that_count() -> None:
    made, given = objective(), batch([2, 0, 1, -1])

    @jax.jit
    def measure(key, given):
        params = made.init(key, None)
        _, scores = classifier.forward(made.model, params, given["image"] / 127.5 - 1)
        return scores, made.loss(params, None, given, key, 0.0), made.evaluate(params, None, given)

    scores, ((total, weight), measured), evaluated = jax.device_get(measure(jax.random.key(0), given))
    shares = np.asarray(scores, np.float64) - np.log(np.exp(np.asarray(scores, np.float64)).sum(1, keepdims=True))
    wanted = -sum(shares[row, label] for row, label in enumerate([2, 0, 1]))
    np.testing.assert_allclose([total, weight], [wanted, 3], rtol=1e-5)
    right = sum(int(np.argmax(scores[row])) == label for row, label in enumerate([2, 0, 1]))
    assert measured["accuracy"] == (right, 3)
    np.testing.assert_allclose(evaluated["loss"], [wanted, 3], rtol=1e-5)
    assert evaluated["accuracy"] == (right, 3)


def test_images_are_moved_whole_and_their_edges_repeated() -> None:
    image = jnp.arange(2 * 4 * 4 * 3, dtype=jnp.float32).reshape(2, 4, 4, 3)
    padded = np.pad(np.asarray(image), ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    seen = set()
    for seed in range(30):
        for row, moved in enumerate(np.asarray(_shifted(image, jax.random.key(seed), 1))):
            places = [
                (y, x) for y in range(3) for x in range(3) if np.array_equal(moved, padded[row, y : y + 4, x : x + 4])
            ]
            assert len(places) == 1
            seen.add((row, *places))
    assert len(seen) == 18


def test_a_job_learns_and_leaves_what_metrics_read(tmp_path: pathlib.Path) -> None:
    glyphs = ["--images", "glyphs", "--size", "8", "--characters", "1MO", "--max_documents", "120"]
    build_dataset.main([*glyphs, "--valid_documents", "30", "--out", str(tmp_path / "data")])
    raw = {
        "objective": {"name": "image_classifier", "model": MODEL, "shift": 1},
        "data": {"path": str(tmp_path / "data")},
        "optimizer": {"learning_rate": 1e-2},
        "evaluation": {"every": 60},
        "checkpoint": {"every": 60},
        "steps": 60,
        "batch_size": 16,
    }
    trainer.train(parse(raw, OBJECTIVES), tmp_path / "work")
    extractor = load_classifier(tmp_path / "work" / "classifier")
    assert extractor.kind == "classifier" and extractor.network.startswith("classifier:")
    found = extractor.apply(extractor.params, jnp.zeros((2, 8, 8, 3), jnp.uint8))
    assert found.features.shape == (2, 8)
    np.testing.assert_allclose(found.probabilities.sum(1), 1, rtol=1e-5)
    with pytest.raises(UserError, match="images of side 8, these are 16x16"):
        extractor.apply(extractor.params, jnp.zeros((2, 16, 16, 3), jnp.uint8))
    lines = [line for line in (tmp_path / "work" / "metrics.jsonl").read_text().splitlines() if "accuracy" in line]
    assert lines


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"model": {**MODEL, "num_classes": 3}}, "num_classes comes from the data set"),
        ({"model": {**MODEL, "depth": 3}}, "unknown key objective.model.depth"),
        ({"model": MODEL, "shift": -1}, "shift must not be negative"),
    ],
)
def test_sections_that_do_not_fit(section, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ImageClassifierConfig("image_classifier", **section)
