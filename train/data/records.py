"""The TFDS side of data sets, which texts and images share: written, opened, found in the catalogue.

Records are TFDS `array_record` files. TensorFlow is never imported.
"""

import contextlib
import dataclasses
import difflib
import importlib
import io
import logging
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import absl.logging
import tensorflow_datasets as tfds
from google.protobuf import json_format
from tensorflow_datasets.core.download import downloader
from tensorflow_datasets.core.example_serializer import ExampleSerializer

from models.errors import UserError
from models.formats.text_files import refuse_name, refuse_pointer

CATALOGUE_PREFIX = "tfds:"


@dataclasses.dataclass(frozen=True)
class Records:
    """The records of a split, or of a slice of one.

    Attributes:
      builder: the data set.
      split: name of the split, without the slice.
      first: the first record of the slice.
      stop: the record after its last.
      source: all records of the split, by number.
    """

    builder: tfds.core.DatasetBuilder
    split: str
    first: int
    stop: int
    source: Any

    @property
    def files(self) -> tuple[Path, ...]:
        """What the whole split lies in."""
        return tuple(map(Path, self.builder.info.splits[self.split].filepaths))

    def __len__(self) -> int:
        return self.stop - self.first

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Record `index`. Raises `UserError` where its file is damaged."""
        with _damage(self.builder.data_path):
            record = self.source[self.first + index]
            if any(value is None for value in record.values()):  # What it makes of an empty record.
                raise ValueError(f"record {index} is missing")
            return record


def write_records(make_builder: Callable[..., tfds.core.GeneratorBasedBuilder], directory: Path) -> None:
    """Writes all that a builder generates, with TFDS's own metadata.

    Args:
      make_builder: takes `data_dir` and `file_format` and returns the builder.
      directory: an existing directory that holds nothing of TFDS yet, which becomes the data set.

    Raises:
      UserError: the records could not be written, because the disk is full for instance.
    """
    with quiet(), _same_bytes():
        builder = make_builder(data_dir=directory, file_format="array_record")
        try:
            builder.download_and_prepare()
        except RuntimeError as error:
            failed_write = re.search(r"write\(\) failed: ([^;]*)", str(error))
            if failed_write is None:
                raise
            raise UserError(f"could not write the data set in {directory.parent}: {failed_write[1]}") from error
    for path in Path(builder.data_path).iterdir():
        path.rename(directory / path.name)
    Path(builder.data_path).rmdir()
    Path(builder.data_path).parent.rmdir()
    for empty in (directory / "downloads" / "extracted", directory / "downloads"):
        with contextlib.suppress(FileNotFoundError):
            empty.rmdir()


def open_directory(directory: Path, split: str, decoders: Any = None) -> Records:
    """A split of what `write_records` wrote; `decoders` are those of TFDS.

    Raises:
      UserError: a file is missing or damaged, or there is no such split.
    """
    refuse_name(directory)
    with quiet(), _damage(directory):
        for name in ("dataset_info.json", "features.json"):
            check_present(directory / name)
        builder = tfds.builder_from_directory(str(directory))
        instruction = _absolute(builder, split, str(directory))
        for path in builder.info.splits[instruction.splitname].filepaths:
            check_present(Path(path))
        return _records(builder, instruction, decoders)


def open_catalogue(builder: tfds.core.DatasetBuilder, split: str, decoders: Any = None) -> Records:
    """A split of a set of the TFDS catalogue, downloaded and prepared first where it is not there yet.

    Raises:
      UserError: it cannot be downloaded, there is no such split, or it was prepared in another format.
    """
    with quiet():
        _prepare(builder)
        instruction = _absolute(builder, split, builder.name)
        try:
            return _records(builder, instruction, decoders)
        except NotImplementedError as error:
            raise UserError(
                f"the TFDS set {builder.name!r} in {builder.data_path} is not stored as array_record, the only format "
                "readable without TensorFlow: prepare it again with file_format='array_record'"
            ) from error


def catalogue_builder(name: str, data_dir: str | Path | None) -> tfds.core.DatasetBuilder:
    """The builder of a set of the TFDS catalogue, kept in `data_dir` or in TFDS's own place.

    Raises:
      UserError: there is no such set; the message names the nearest.
    """
    arguments = {"data_dir": data_dir, "file_format": "array_record"}
    with quiet():
        try:
            return tfds.builder(name, **arguments)
        except tfds.core.DatasetNotFoundError:
            pass
        except (ValueError, OSError) as error:
            raise UserError(f"the TFDS set {name!r} cannot be opened ({_first_line(error)})") from error
        # Some sets, gsm8k among them, are shipped with TFDS but registered only when their module is imported.
        with contextlib.suppress(ImportError, tfds.core.DatasetNotFoundError):
            importlib.import_module(f"tensorflow_datasets.text.{name.split('/')[0].split(':')[0]}")
            return tfds.builder(name, **arguments)
        near = difflib.get_close_matches(name, tfds.list_builders(with_community_datasets=False), n=1)
    raise UserError(f"TFDS has no data set {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))


def check_present(path: Path) -> None:
    """Raises `UserError` where a file of a data set is missing, or a Git LFS pointer stands for it."""
    if not path.is_file():
        raise UserError(f"the data set {path.parent} is incomplete: there is no {path.name}")
    refuse_pointer(path)


@contextlib.contextmanager
def _damage(directory: str | Path) -> Iterator[None]:
    """What the readers of records and of their metadata say of files that are cut short or overwritten."""
    try:
        yield
    except UserError:
        raise
    except (RuntimeError, ValueError, json_format.ParseError) as error:
        raise UserError(f"the data set {directory} is damaged ({_first_line(error)})") from error


@contextlib.contextmanager
def _same_bytes() -> Iterator[None]:
    """Equal records become equal bytes: TFDS leaves the order of their fields to chance, another in every process."""

    def serialized(self: ExampleSerializer, example: dict[str, Any]) -> bytes:
        return self.get_tf_example(example).SerializeToString(deterministic=True)

    with mock.patch.object(ExampleSerializer, "serialize_example", serialized):
        yield


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """TFDS narrates what it does on stdout, in progress bars and in the log; what matters is in its exceptions."""
    verbosity = absl.logging.get_verbosity()
    absl.logging.set_verbosity(absl.logging.ERROR)
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        absl.logging.set_verbosity(verbosity)


def _records(builder: tfds.core.DatasetBuilder, instruction: Any, decoders: Any) -> Records:
    name = instruction.splitname
    total = builder.info.splits[name].num_examples
    source = builder.as_data_source(split=name, decoders=decoders)
    stop = total if instruction.to is None else instruction.to
    if stop <= (instruction.from_ or 0):
        raise UserError(f"the part of the split {name!r} of {builder.data_path} that was asked for is empty")
    return Records(builder, name, instruction.from_ or 0, stop, source)


def _prepare(builder: tfds.core.DatasetBuilder) -> None:
    if not Path(builder.data_path).exists():
        print(f"downloading {CATALOGUE_PREFIX}{builder.name} to {builder.data_path}", file=sys.stderr, flush=True)
    downloader.MAX_RETRIES = 4  # Without a network TFDS's own ten take four minutes to fail.
    try:
        builder.download_and_prepare()
    except Exception as error:  # Builders fail in as many ways as there are builders.
        raise UserError(
            f"the TFDS set {builder.name!r} is not in {builder.data_path} and could not be downloaded and prepared "
            f"here ({_first_line(error)})"
        ) from error


def _absolute(builder: tfds.core.DatasetBuilder, split: str, where: str) -> Any:
    try:
        (instruction,) = tfds.core.ReadInstruction.from_spec(split).to_absolute(builder.info.splits)
    except (ValueError, KeyError, AssertionError) as error:
        raise UserError(f"{where} has no split {split!r}; it has {', '.join(builder.info.splits)}") from error
    return instruction


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}"
