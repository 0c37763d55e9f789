"""Image folders, `.npz` files and drawn glyphs become data sets that `train/data/images.py` reads.

A folder holds one folder per class, and those their images at whatever depth. What is left out of it, and which images
do not look as they are stored, is counted. An `.npz` holds `images`, uint8
[N, H, W, 3], an array of labels, and perhaps their names (`group` and `group_names`). Glyphs (`train/data/glyphs.py`)
need nothing. The directory holds TFDS `array_record` files and `manifest.json`: source, size, classes, counts per
split and per class.
"""

import collections
import dataclasses
import fractions
import functools
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from train.data.folders import Found, files, is_hidden
from train.data.glyphs import CHARACTERS, check, glyph
from train.data.pixels import SUFFIXES, decoded, fitted

_MOST_CLASSES = 1_000_000
GLYPHS = "glyphs"
GLYPH_SIZE = 32
# Why files of a folder are left out, besides the reasons of `folders.py`.
HIDDEN = "hidden files"
EMPTY_CLASS = "class folders without an image"
BESIDE = "images beside the class folders"
BEYOND = "beyond --max_documents"


@dataclasses.dataclass(frozen=True)
class ImageList:
    """Labelled images that are read one by one.

    Attributes:
      names: where each comes from; unique.
      labels: the number of each one's class.
      classes: their names.
      size: side that `read` brings images to.
      read: the pixels of image i, uint8 [size, size, 3].
      left_out: what was found and is not here: reason -> number.
      changes: filled by `read`: how many images do not look as they are stored, by what was done (`pixels.py`).
    """

    names: Sequence[str]
    labels: Sequence[int]
    classes: Sequence[str]
    size: int
    read: Callable[[int], UInt8[np.ndarray, "S S 3"]]
    left_out: Mapping[str, int] = dataclasses.field(default_factory=dict)
    changes: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def first(self, count: int) -> "ImageList":
        """The first `count` images."""
        if count >= len(self.names):
            return self
        left_out = {**self.left_out, BEYOND: len(self.names) - count}
        return dataclasses.replace(self, names=self.names[:count], labels=self.labels[:count], left_out=left_out)


def read_folder(folder: str | Path, size: int) -> ImageList:
    """The images of a folder in the order of their paths; each folder right below it is a class.

    Classes are in the order of their names, by number where all names are numbers. Links are followed.

    Raises:
      UserError: no such folder, or it has no folders with images in them.
    """
    folder = Path(folder)
    if not folder.is_dir():
        problem = "is no folder" if folder.exists() else "does not exist"
        raise UserError(f"{folder} {problem}: expected a folder with a folder of images per class, or an .npz file")
    left_out: collections.Counter[str] = collections.Counter()
    by_class: dict[str, list[Path]] = {}
    for found in files(folder):
        reason = _reason(found)
        if reason:
            left_out[reason] += 1
        else:
            by_class.setdefault(found.path.parts[0], []).append(found.path)
    folders = [path.name for path in folder.iterdir() if path.is_dir() and not path.is_symlink()]
    left_out[EMPTY_CLASS] = sum(name not in by_class and not name.startswith(".") for name in folders)
    if not by_class:
        raise UserError(
            f"{folder} holds no images in folders: expected one folder per class, with {', '.join(SUFFIXES)}"
        )
    classes = class_order(by_class)
    changes: collections.Counter[str] = collections.Counter()
    labelled = sorted((path, label) for label, name in enumerate(classes) for path in by_class[name])

    def read(index: int) -> np.ndarray:
        path = folder / labelled[index][0]
        return decoded(path.read_bytes(), size, str(path), changes)

    names, labels = [_shown(path) for path, _ in labelled], [label for _, label in labelled]
    return ImageList(names, labels, [_shown(name) for name in classes], size, read, +left_out, changes)


def class_order(names: Iterable[str]) -> list[str]:
    """Names sorted: as numbers where all of them are, else as text."""
    names = sorted(names)
    numbers = all(re.fullmatch(r"[+-]?[0-9]+(\.[0-9]+)?", name) for name in names)
    return sorted(names, key=fractions.Fraction) if numbers else names


def _reason(found: Found) -> str:
    """Why what was found is no labelled image; empty for one that is."""
    suffix = found.path.suffix.lower()
    if is_hidden(found.path):
        return HIDDEN
    if found.left_out:
        return found.left_out
    if suffix not in SUFFIXES:
        return f"files that are no images ({_shown(suffix) or 'no suffix'})"
    return BESIDE if len(found.path.parts) == 1 else ""


def _shown(name: str | Path) -> str:
    """A path as text that can be stored; TFDS keeps one class a line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown(str(name)))


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
    if count > _MOST_CLASSES:
        raise UserError(f"{path}: {label} goes up to {count - 1}, but classes are numbered from 0 without gaps")
    names = [str(name) for name in np.asarray(arrays.get(f"{label}_names", range(count))).ravel().astype(str)]
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
        lambda index: fitted(Image.fromarray(pixels[index]), side),
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
    except Exception as error:  # An archive of compressed files with headers of their own fails in many ways.
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
      The manifest: `kind`, `source`, `size`, `classes`, per split `images` and `per_class`, their numbers in all and
      by class, and the source's `left_out` and `changes`.

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

    with new_dataset(out, overwrite) as directory:
        writers = {name: functools.partial(examples, name, part) for name, part in splits.items()}
        images.write_splits(directory, writers, source.classes, source.size, "Images with classes.")
        manifest = {
            "kind": images.KIND,
            "source": description,
            "size": source.size,
            "classes": list(source.classes),
            "splits": {name: counted(part) for name, part in splits.items()},
            "left_out": dict(source.left_out),
            "changes": {change: count for change, count in source.changes.items() if count},
        }
        write_json(directory / "manifest.json", manifest)
    return manifest
