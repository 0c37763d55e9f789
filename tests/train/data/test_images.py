"""Images on disk and back, order, resume, sharding, and the image sets of the TFDS catalogue."""

import io
import json
import pathlib

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from models.errors import UserError
from train.data import images
from train.data.images import open_images
from train.data.order import in_order, shuffled

SIZE = 6
PIXELS = np.random.default_rng(0).integers(0, 256, (11, SIZE, SIZE, 3), np.uint8)
LABELS = [0, 2, 1, 1, 0, 2, 2, 0, 1, 0, 2]
CLASSES = ["a class", "é", "3"]


def examples(first: int, stop: int) -> list[images.Example]:
    return [{"name": f"image {i}", "image": PIXELS[i], "label": LABELS[i]} for i in range(first, stop)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("images") / "set"
    path.mkdir()
    splits = {"train": lambda: examples(0, 8), "valid": lambda: examples(8, 11)}
    images.write_splits(path, splits, CLASSES, SIZE, "for tests")
    (path / "manifest.json").write_text(json.dumps({"kind": "images", "size": SIZE}))
    return path


@pytest.fixture
def train(directory) -> images.Images:
    return open_images(directory, "train")


def test_images_come_back_in_order(train, directory) -> None:
    assert (len(train), train.size, train.classes) == (8, SIZE, tuple(CLASSES))
    assert train.manifest["kind"] == "images"
    for index in range(8):
        example = train[index]
        assert example["image"].dtype == np.uint8 and example["label"].dtype == np.int32
        np.testing.assert_array_equal(example["image"], PIXELS[index])
        assert example["label"] == LABELS[index]
    with pytest.raises(IndexError):
        train[8]
    slice_of_valid = open_images(directory, "valid[1:]")
    assert len(slice_of_valid) == 2
    np.testing.assert_array_equal(slice_of_valid[0]["image"], PIXELS[9])


def numbers(batch: dict[str, np.ndarray]) -> list[int]:
    """Which of `PIXELS` a batch holds; -1 for black ones."""
    where = (batch["image"][:, None] == PIXELS).all(axis=(2, 3, 4))
    return [int(row.argmax()) if row.any() else -1 for row in where]


def test_every_epoch_holds_every_image_once_with_its_label(train) -> None:
    made = list(shuffled(train, 4, seed=3, epochs=2))
    assert [set(batch) for batch in made] == [{"image", "label"}] * 4
    assert made[0]["image"].shape == (4, SIZE, SIZE, 3) and made[0]["image"].dtype == np.uint8
    assert made[0]["label"].shape == (4,) and made[0]["label"].dtype == np.int32
    for batch in made:
        assert batch["label"].tolist() == [LABELS[i] for i in numbers(batch)]
    first, second = (numbers(made[i]) + numbers(made[i + 1]) for i in (0, 2))
    assert sorted(first) == sorted(second) == list(range(8)) and first != second
    for seed, same in ((3, True), (4, False)):
        again = [i for batch in shuffled(train, 4, seed=seed, epochs=1) for i in numbers(batch)]
        assert (again == first) == same


def test_a_run_resumes_exactly(train) -> None:
    whole = shuffled(train, 3, seed=1)
    for _ in range(4):
        next(whole)
    state = json.loads(json.dumps(whole.get_state()))
    resumed = shuffled(train, 3, seed=1)
    resumed.set_state(state)
    for _ in range(7):
        assert numbers(next(resumed)) == numbers(next(whole))


def test_processes_share_the_batches_of_one(train) -> None:
    alone = shuffled(train, 4, seed=2)
    shared = [shuffled(train, 4, seed=2, process_index=i, process_count=2) for i in range(2)]
    for _ in range(5):
        parts = [numbers(next(part)) for part in shared]
        assert [parts[0][0], parts[1][0], parts[0][1], parts[1][1]] == numbers(next(alone))


def test_evaluation_sees_every_image_once_in_order(train) -> None:
    made = list(in_order(train, 3))
    assert [numbers(batch) for batch in made] == [[0, 1, 2], [3, 4, 5], [6, 7, -1]]
    assert made[2]["label"].tolist() == [LABELS[6], LABELS[7], images.PADDING] and not made[2]["image"][2].any()
    assert len(list(in_order(train, 3, max_batches=1))) == 1
    second = list(in_order(train, 4, process_index=1, process_count=2))
    assert [numbers(batch) for batch in second] == [[1, 3], [5, 7]]


def test_batches_that_cannot_be_made(train) -> None:
    with pytest.raises(UserError, match="1 epochs of 8 examples do not fill one batch of 9"):
        shuffled(train, 9, seed=0, epochs=1)
    with pytest.raises(UserError, match="positive multiple of 2"):
        shuffled(train, 3, seed=0, process_count=2)


def test_images_are_brought_to_a_size(directory) -> None:
    larger = open_images(directory, "train", size=12)
    assert larger.size == 12 and larger[0]["image"].shape == (12, 12, 3)
    expected = Image.fromarray(PIXELS[0]).resize((12, 12), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(larger[0]["image"], np.asarray(expected))


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    content = io.BytesIO()
    image.save(content, kind)
    return content.getvalue()


def test_directories_that_are_no_image_sets(directory, tmp_path) -> None:
    with pytest.raises(UserError, match=r"no data set at .*build_dataset --images.*tfds:cifar10"):
        open_images(tmp_path, "train")
    (tmp_path / "manifest.json").write_text('{"kind": "text"}')
    with pytest.raises(UserError, match="holds 'text', expected 'images'"):
        open_images(tmp_path, "train")
    with pytest.raises(UserError, match="has no split 'test'; it has train, valid"):
        open_images(directory, "test")
    with pytest.raises(UserError, match="at least 1 pixel"):
        open_images(directory, "train", size=0)


# The catalogue.


class TandemPictures(tfds.core.GeneratorBasedBuilder):
    """Three grey pictures of different sizes, registered under the name tandem_pictures."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 1)),
            "label": tfds.features.ClassLabel(names=["dark", "light"]),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"test": self._generate_examples()}

    def _generate_examples(self):
        for index in range(3):
            image = Image.new("L", (8 + index, 9), 100 * index)
            yield index, {"image": encoded(image), "label": index // 2}


class TandemWords(tfds.core.GeneratorBasedBuilder):
    """No pictures at all."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {}

    def _generate_examples(self):
        return []


def test_catalogue_sets_read_like_directories(tmp_path, capsys) -> None:
    pictures = open_images("tfds:tandem_pictures", "test", size=8, data_dir=tmp_path)
    assert (len(pictures), pictures.classes, pictures.manifest) == (3, ("dark", "light"), {})
    found = sorted((int(pictures[i]["image"].mean()), int(pictures[i]["label"])) for i in range(3))
    assert found == [(0, 0), (100, 0), (200, 1)]
    assert next(shuffled(pictures, 2, seed=0))["image"].shape == (2, 8, 8, 3)
    assert capsys.readouterr().out == ""


def test_catalogue_requests_that_cannot_be_met(tmp_path) -> None:
    with pytest.raises(UserError, match="not squares of one size: say which size"):
        open_images("tfds:tandem_pictures", "test", data_dir=tmp_path)
    with pytest.raises(UserError, match="no set of labelled images: it holds text, expected image and label"):
        open_images("tfds:tandem_words", "train", data_dir=tmp_path)
    with pytest.raises(UserError, match="did you mean 'tandem_pictures'"):
        open_images("tfds:tandem_picture", "test", data_dir=tmp_path)


@pytest.mark.parametrize("name", ["mnist", "cifar10", "imagenet2012"])
def test_the_public_sets_are_sets_of_labelled_images(name) -> None:
    """By their descriptions, which TFDS carries; the images would have to be downloaded."""
    features = tfds.builder(name).info.features
    assert isinstance(features["image"], tfds.features.Image) and isinstance(
        features["label"], tfds.features.ClassLabel
    )


def test_tensorflow_is_never_imported(directory, run_python) -> None:
    run_python(
        "import sys\n"
        "from train.data import images, order\n"
        f"next(order.shuffled(images.open_images({str(directory)!r}, 'train'), 2, seed=0))\n"
        "assert 'tensorflow' not in sys.modules\n"
    )
