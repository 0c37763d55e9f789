"""Image folders, `.npz` files and drawn glyphs become data sets that `train/data/images.py` reads.

A folder holds one folder per class, and those their images at whatever depth. An `.npz` holds `images`, uint8
[N, H, W, 3], an array of labels, and perhaps their names (`group` and `group_names`). Glyphs (`train/data/glyphs.py`)
need nothing. The directory holds TFDS `array_record` files and `manifest.json`: source, size, classes, counts per
split and per class.
"""

import collections
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from models.errors import UserError
from models.formats.storage import write_json
from models.formats.text_files import refuse_pointer, shown
from train.data import images
from train.data.building import name_rank, new_dataset
from train.data.glyphs import CHARACTERS, check, glyph

GLYPHS = "glyphs"
GLYPH_SIZE = 32
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")


@dataclasses.dataclass(frozen=True)
class ImageList:
    """Labelled images that are read one by one.

    Attributes:
      names: where each comes from; unique.
      labels: the number of each one's class.
      classes: their names.
      size: side that `read` brings images to.
      read: the pixels of image i, uint8 [size, size, 3].
    """

    names: Sequence[str]
    labels: Sequence[int]
    classes: Sequence[str]
    size: int
    read: Callable[[int], UInt8[np.ndarray, "S S 3"]]


def read_folder(folder: str | Path, size: int) -> ImageList:
    """The images of a folder in the order of their paths; each folder right below it is a class.

    Raises:
      UserError: no such folder, or it has no folders with images in them.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: expected a folder of images")
    found = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    paths = [path for path in found if len(path.parts) > 1]
    if not paths:
        raise UserError(
            f"{folder} holds no images in folders: expected one folder per class, with {', '.join(SUFFIXES)}"
        )
    classes = sorted({path.parts[0] for path in paths})

    def read(index: int) -> np.ndarray:
        path = folder / paths[index]
        return images.decoded(path.read_bytes(), size, str(path))

    labels = [classes.index(path.parts[0]) for path in paths]
    names = [shown(path.as_posix()) for path in paths]
    return ImageList(names, labels, [shown(name) for name in classes], size, read)


def read_npz(path: str | Path, label: str = "labels", size: int | None = None) -> ImageList:
    """The images of an `.npz`: `images`, the labels under the name `label`, names of the classes as `{label}_names`.

    Raises:
      UserError: the file is missing or damaged, or one of its arrays is of another kind or shape.
    """
    arrays = _arrays(Path(path), ("images", label), f"{label}_names")
    pixels, labels = arrays["images"], arrays[label]
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3 or not len(pixels):
        raise UserError(f"{path}: images is {pixels.dtype} {list(pixels.shape)}, expected uint8 [N, H, W, 3]")
    if labels.dtype.kind not in "iu" or labels.shape != pixels.shape[:1] or labels.min() < 0:
        raise UserError(
            f"{path}: {label} is {labels.dtype} {list(labels.shape)}, expected {len(pixels)} whole numbers from 0"
        )
    count = int(labels.max()) + 1
    names = [str(name) for name in arrays.get(f"{label}_names", range(count))]
    if len(names) < count:
        raise UserError(f"{path}: {label}_names holds {len(names)} names, {label} goes up to {count - 1}")
    if len(set(names)) < len(names):
        raise UserError(f"{path}: {label}_names holds a name twice")
    side = size or min(pixels.shape[1:3])
    return ImageList(
        [f"{Path(path).name}:{index}" for index in range(len(pixels))],
        labels.tolist(),
        names,
        side,
        lambda index: images.fitted(Image.fromarray(pixels[index]), side),
    )


def _arrays(path: Path, wanted: Sequence[str], optional: str) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise UserError(f"no file {path}: expected an .npz with {' and '.join(wanted)}")
    refuse_pointer(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            if missing := [name for name in wanted if name not in file]:
                raise UserError(f"{path} has no array {missing[0]!r}; it holds {', '.join(file)}")
            return {name: file[name] for name in (*wanted, optional) if name in file}
    except UserError:
        raise
    except Exception as error:  # Archives and headers of arrays fail in as many ways as they can be damaged.
        raise UserError(f"{path} is damaged or not an .npz file ({error})") from None


def draw_glyphs(count: int, size: int = GLYPH_SIZE, seed: int = 0, characters: str = CHARACTERS) -> ImageList:
    """The first `count` glyphs of a seed (`train/data/glyphs.py`); every class gets as many as the others."""
    if count < 1:
        raise UserError(f"draw at least one glyph, not {count}")
    check(size, characters)
    labels = [index % len(characters) for index in range(count)]
    names = [f"{GLYPHS}:{seed}:{index}" for index in range(count)]
    return ImageList(names, labels, list(characters), size, lambda index: glyph(index, seed, size, characters))


def hold_out(names: Sequence[str], fraction: float = 0.0, count: int = 0) -> dict[str, list[int]]:
    """Numbers of the images of `train` and, if asked for, of `valid`, parted by a hash of their names.

    Raises:
      UserError: both are given, one is out of range, or nothing would be left to train on or to validate with.
    """
    if fraction and count:
        raise UserError("hold out either a fraction of the images or a number of them, not both")
    if not 0 <= fraction < 1 or count < 0:
        raise UserError(f"the held-out part must be a fraction in 0..1 or a positive number, got {fraction or count}")
    if not fraction and not count:
        return {"train": list(range(len(names)))}
    ranks = [name_rank(name) for name in names]
    if count >= len(names):
        raise UserError(f"cannot hold out {count} images of {len(names)}: none would be left to train on")
    bound = sorted(ranks)[count] if count else int(fraction * 2**64)
    parts = {
        "train": [index for index, rank in enumerate(ranks) if rank >= bound],
        "valid": [index for index, rank in enumerate(ranks) if rank < bound],
    }
    if empty := [name for name, part in parts.items() if not part]:
        raise UserError(f"the split {empty[0]!r} is empty: {len(names)} images are too few for {fraction} held out")
    return parts


def build(
    source: ImageList,
    splits: dict[str, list[int]],
    out: str | Path,
    *,
    description: dict[str, Any],
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Writes images as a data set.

    Args:
      source: the images.
      splits: which of them make each split, from `hold_out`.
      out: the directory to write.
      description: for the manifest, where the images come from.
      overwrite: replace a data set that is there.
      progress: told a line every second or so.

    Returns:
      The manifest: `kind`, `source`, `size`, `classes` and, per split, `images` and `per_class`, their numbers in all
      and by class.

    Raises:
      UserError: an image cannot be read, or `out` holds something that must not be lost.
    """

    def counted(part: list[int]) -> dict[str, Any]:
        number = collections.Counter(source.labels[index] for index in part)
        return {"images": len(part), "per_class": [number[label] for label in range(len(source.classes))]}

    def examples(name: str, part: list[int]) -> Iterator[images.Example]:
        told = time.monotonic()
        for done, index in enumerate(part):
            if time.monotonic() - told > 1:
                told = time.monotonic()
                progress(f"{name}: {done:,} of {len(part):,} images")
            yield {"name": source.names[index], "image": source.read(index), "label": source.labels[index]}

    manifest = {
        "kind": images.KIND,
        "source": description,
        "size": source.size,
        "classes": list(source.classes),
        "splits": {name: counted(part) for name, part in splits.items()},
    }
    with new_dataset(out, overwrite) as directory:
        writers = {name: functools.partial(examples, name, part) for name, part in splits.items()}
        images.write_splits(directory, writers, source.classes, source.size, "Images with classes.")
        write_json(directory / "manifest.json", manifest)
    return manifest
