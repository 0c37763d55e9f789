"""Labelled images on disk and how they become batches: TFDS for storage, Grain for order and exact resume.

A data set is a TFDS `array_record` directory of `{'name', 'image', 'label'}` with square PNG images of one size and a
`manifest.json`; `scripts/build_dataset.py` makes it and `open_images` reads it. Image sets of the TFDS catalogue
(`tfds:cifar10`, `tfds:mnist`, `tfds:imagenet2012`) go through the same door. Images are decoded here, by Pillow, so
that whatever is stored comes out as uint8 [S, S, 3].
"""

import functools
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import grain
import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Int32, UInt8
from PIL import Image, UnidentifiedImageError

from models.errors import UserError
from models.formats.text_files import read_json
from train.data.order import in_order, shuffled
from train.data.records import (
    CATALOGUE_PREFIX,
    Records,
    catalogue_builder,
    open_catalogue,
    open_directory,
    write_records,
)

KIND = "images"  # What the manifest of such a data set says.
PADDING = -1  # Label of the rows that fill up a last batch.
_CACHED_BYTES = 256_000_000


class Example(TypedDict):
    """One image to be stored.

    Attributes:
      name: where it came from, unique in its data set.
      image: its pixels.
      label: number of its class.
    """

    name: str
    image: UInt8[np.ndarray, "S S 3"]
    label: int


class ImageBatch(TypedDict):
    """Images with their classes, `PADDING` for those that only fill up a batch."""

    image: UInt8[np.ndarray, "B S S 3"]
    label: Int32[np.ndarray, "B"]


class Images:
    """Random access to the images of a split.

    Attributes:
      size: side of every image.
      classes: names of the classes.
      manifest: what `scripts/build_dataset.py` wrote about the data set; empty for a catalogue set.
    """

    def __init__(
        self,
        count: int,
        size: int,
        classes: Sequence[str],
        fetch: Callable[[int], tuple[UInt8[np.ndarray, "S S 3"], int]],
        manifest: Mapping[str, Any] | None = None,
    ):
        self.size, self.classes, self.manifest = size, tuple(classes), dict(manifest or {})
        self._count = count
        self._fetch = functools.lru_cache(maxsize=max(16, _CACHED_BYTES // (3 * size * size)))(fetch)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """`image` uint8 [S, S, 3], `label` int32 []."""
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        image, label = self._fetch(int(index))
        return {"image": image, "label": np.asarray(label, np.int32)}


def open_images(
    name_or_dir: str | Path, split: str, *, size: int | None = None, data_dir: str | Path | None = None
) -> Images:
    """The images of one split, from a directory or from the TFDS catalogue.

    Args:
      name_or_dir: a directory written by `scripts/build_dataset.py`, or `tfds:NAME`.
      split: name of a split, or a slice of one as TFDS writes it, such as `train[:10%]`.
      size: side that images are brought to (`fitted`); None for the one they are stored in.
      data_dir: where catalogue sets are kept; by default TFDS's own place.

    Raises:
      UserError: no such data set or split, it holds no labelled images, it cannot be downloaded, or `size` is None and
        its images are not all of one size.
    """
    decoders = {"image": tfds.decode.SkipDecoding()}
    if str(name_or_dir).startswith(CATALOGUE_PREFIX):
        builder = catalogue_builder(str(name_or_dir).removeprefix(CATALOGUE_PREFIX), data_dir)
        features = dict((builder.info.features or {}).items())
        kinds = {"image": tfds.features.Image, "label": tfds.features.ClassLabel}
        if not all(isinstance(features.get(name), kind) for name, kind in kinds.items()):
            raise UserError(
                f"{name_or_dir} is no set of labelled images: it holds {', '.join(features)}, expected image and label"
            )
        records, manifest = open_catalogue(builder, split, decoders), {}
    else:
        manifest = _manifest(Path(name_or_dir))
        records = open_directory(Path(name_or_dir), split, decoders)
    return _images(records, size, manifest, str(name_or_dir))


def _manifest(directory: Path) -> dict[str, Any]:
    path = directory / "manifest.json"
    if not path.is_file():
        raise UserError(
            f"no data set at {directory}: expected a directory written by `python -m scripts.build_dataset --images`, "
            f"or a TFDS catalogue name such as {CATALOGUE_PREFIX}cifar10"
        )
    manifest = read_json(path)
    if manifest.get("kind") != KIND:
        raise UserError(f"the data set {directory} holds {manifest.get('kind')!r}, expected {KIND!r}")
    return manifest


def _images(records: Records, size: int | None, manifest: dict[str, Any], where: str) -> Images:
    features = records.builder.info.features
    assert features is not None
    height, width, _ = features["image"].shape
    if size is None and (height is None or height != width):
        raise UserError(f"the images of {where} are not squares of one size: say which size to bring them to")
    if size is not None and size < 1:
        raise UserError(f"images must be at least 1 pixel wide, got {size}")
    side = size or height

    def fetch(index: int) -> tuple[np.ndarray, int]:
        record = records[index]
        return decoded(record["image"], side, f"image {index} of {where}"), int(record["label"])

    return Images(len(records), side, features["label"].names, fetch, manifest)


def decoded(content: bytes, size: int, where: str) -> UInt8[np.ndarray, "S S 3"]:
    """An encoded image (PNG, JPEG, ...) as RGB pixels of one size; what is transparent becomes white.

    Raises:
      UserError: it is no image; the message names `where`.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            return fitted(image, size)
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{where} cannot be read as an image ({error})") from None


def fitted(image: Image.Image, size: int) -> UInt8[np.ndarray, "S S 3"]:
    """An image brought to a square: its shorter side to `size` by Lanczos' filter, its middle cut out."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    short = min(image.size)
    if short != size:
        width, height = (max(size, round(length * size / short)) for length in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    left, top = ((length - size) // 2 for length in image.size)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def batches(
    images: Images,
    batch_size: int,
    seed: int,
    *,
    epochs: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator:
    """Shuffled batches for training, each epoch in another order.

    Step `s` holds the same images whatever the number of processes. `get_state()` is a small JSON-able dict that is the
    same on every process; after `set_state` with it an iterator made with the same arguments continues exactly.

    Args:
      images: from `open_images`.
      batch_size: images over all processes.
      seed: of the shuffles.
      epochs: passes over the data; None for no end. A last batch that is not full is dropped.
      process_index: which of `process_count` processes this one is; it gets every `process_count`-th image.

    Returns:
      An iterator of `ImageBatch`es of `batch_size / process_count` images, read ahead by threads.

    Raises:
      UserError: `batch_size` is not a multiple of `process_count`, or larger than all the epochs together.
    """
    if epochs is not None and epochs * len(images) < batch_size:
        raise UserError(f"{epochs} epochs of {len(images)} images do not fill one batch of {batch_size}")
    return shuffled(images, batch_size, seed, epochs, process_index, process_count)


def sequential(
    images: Images,
    batch_size: int,
    *,
    max_batches: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[ImageBatch]:
    """Every image once, in order, for evaluation; the last batch is filled up with black images of label `PADDING`.

    Arguments, errors and sharding are those of `batches`; `max_batches` ends the pass early. Every process gets the
    same number of batches.
    """
    black = np.zeros((images.size, images.size, 3), np.uint8)
    padding: dict[str, np.ndarray] = {"image": black, "label": np.asarray(PADDING, np.int32)}
    yield from in_order(images, padding, batch_size, max_batches, process_index, process_count)  # type: ignore[misc]


def write_splits(
    directory: Path,
    splits: Mapping[str, Callable[[], Iterable[Example]]],
    classes: Sequence[str],
    size: int,
    description: str,
) -> None:
    """Writes images as a TFDS `array_record` data set, each split in the order given.

    Args:
      directory: an existing, empty directory, which becomes the data set; the manifest is the caller's.
      splits: for each split, a function that yields its images.
      classes: names of the classes, each on one line.
      size: side of all images.
      description: goes into TFDS's own metadata.

    Raises:
      UserError: the records could not be written, because the disk is full for instance.
    """
    write_records(functools.partial(LabelledImages, splits, classes, size, description), directory)


class LabelledImages(tfds.core.GeneratorBasedBuilder):
    """The TFDS side of `write_splits`."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(
        self,
        splits: Mapping[str, Callable[[], Iterable[Example]]],
        classes: Sequence[str],
        size: int,
        description: str,
        **kwargs: Any,
    ):
        self._splits = splits
        self._classes = list(classes)
        self._size = size
        self._description = description
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self._description,
            features=tfds.features.FeaturesDict(
                {
                    "name": tfds.features.Text(),
                    "image": tfds.features.Image(shape=(self._size, self._size, 3), encoding_format="png"),
                    "label": tfds.features.ClassLabel(names=self._classes),
                }
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterable[tuple[int, dict[str, Any]]]]:
        return {name: self._generate_examples(name) for name in self._splits}

    def _generate_examples(self, name: str) -> Iterable[tuple[int, dict[str, Any]]]:
        for index, example in enumerate(self._splits[name]()):
            # TFDS would need TensorFlow to encode pixels; what is encoded already it stores as it is.
            content = io.BytesIO()
            Image.fromarray(example["image"]).save(content, "PNG")
            yield index, {"name": example["name"], "image": content.getvalue(), "label": example["label"]}
