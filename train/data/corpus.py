"""The training and validation splits of a job, texts or images, and what they decide about its model.

Text: the tokenizer is the base model's where there is one (a target to finetune or to train heads on), and then the
data must agree with it; otherwise it is the one stored with the data set, or, for raw catalogue text, the one that
`data.tokenizer` names. The chat template is the data's where it has one. Images: the classes, and every image is
brought to the size that the objective's model has.
"""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import jax
import numpy as np

from models.errors import UserError
from models.formats.tokenizer import Tokenizer
from train.config import DataConfig, TrainConfig
from train.data.features import FeatureRows
from train.data.order import in_order, shuffled

if TYPE_CHECKING:  # Training steps are timed where Grain and TFDS are not installed.
    import grain

    from train.data import images
    from train.data import texts as data


class Corpus(Protocol):
    """Both splits of a job, opened.

    Attributes:
      facts: what the data decides about the model; the objective is built with it.
      train: what is learnt from, with random access.
      valid: what is held out.
    """

    @property
    def facts(self) -> Any: ...

    @property
    def train(self) -> Any: ...

    @property
    def valid(self) -> Any: ...

    def batches(self, batch_size: int, seed: int) -> "grain.DatasetIterator":
        """This process's part of endless shuffled training batches; `get_state()` and `set_state()` resume exactly."""

    def validation(self, batch_size: int, max_batches: int | None) -> Iterator[Any]:
        """This process's part of one pass over what is held out, in order."""


@dataclasses.dataclass(frozen=True)
class TextCorpus:
    """A `Corpus` of texts.

    Attributes:
      facts: the tokenizer of both splits.
      train: documents to learn from.
      valid: documents held out.
      length: tokens per row of a batch.
      source_length: where prompts lie apart from answers (`train/data/pairs.py`), tokens of a prompt; else None.
      features: the rows to learn from with a target's features beside them, where these are kept on disk.
    """

    facts: Tokenizer
    train: "data.Documents"
    valid: "data.Documents"
    length: int
    source_length: int | None = None
    features: FeatureRows | None = None

    def within(self, vocab_size: int, config: DataConfig) -> "TextCorpus":
        """The same for a model of `vocab_size` embeddings: tokens without one are refused (`Documents.within`)."""
        train = self.train.within(vocab_size, f"{config.path}, split {config.split}")
        valid = self.valid.within(vocab_size, f"{config.path}, split {config.valid_split}")
        return dataclasses.replace(self, train=train, valid=valid)

    @functools.cached_property
    def rows(self) -> Any:
        """What is learnt from."""
        return self._rows_of(self.train)

    def _rows_of(self, documents: "data.Documents") -> Any:
        from train.data import texts as data

        if self.source_length is None:
            return data.PackedRows(documents, self.length)
        from train.data.pairs import PairRows

        return PairRows(documents, self.source_length, self.length)

    def batches(self, batch_size: int, seed: int) -> "grain.DatasetIterator":
        """Batches of rows."""
        if self.features is None:
            return shuffled(self.rows, batch_size, seed, **_this_process())
        # A batch may be of half a gigabyte.
        return shuffled(self.features, batch_size, seed, **_this_process(), ahead=4)

    def validation(self, batch_size: int, max_batches: int | None) -> Iterator[dict[str, np.ndarray]]:
        """Batches of rows."""
        return in_order(self._held_out, batch_size, max_batches=max_batches, **_this_process())

    @functools.cached_property
    def _held_out(self) -> Any:
        return self._rows_of(self.valid)


@dataclasses.dataclass(frozen=True)
class ImageCorpus:
    """A `Corpus` of labelled images.

    Attributes:
      facts: the names of the classes of both splits.
      train: images to learn from.
      valid: images held out.
    """

    facts: tuple[str, ...]
    train: "images.Images"
    valid: "images.Images"

    def batches(self, batch_size: int, seed: int) -> "grain.DatasetIterator":
        """Batches of images."""
        return shuffled(self.train, batch_size, seed, **_this_process())

    def validation(self, batch_size: int, max_batches: int | None) -> Iterator[dict[str, np.ndarray]]:
        """Batches of images."""
        return in_order(self.valid, batch_size, max_batches=max_batches, **_this_process())


def open_corpus(config: TrainConfig) -> Corpus:
    """Opens what a config's section `data` names, as what its objective reads.

    Raises:
      UserError: no such data set or split, no tokenizer for raw text, data of another tokenizer than the base's, or
        options of text for images.
    """
    if config.objective.reads == "images":
        return _open_images(config.data, config.objective.image_size)
    assert config.length is not None
    source_length = getattr(config.objective, "source_length", None)
    return _open_texts(config.data, config.objective.base, config.length, source_length)


def _open_images(config: DataConfig, size: int) -> ImageCorpus:
    from train.data import images

    for name in ("tokenizer", "fields"):
        if getattr(config, name) is not None:
            raise UserError(f"data.{name} must be None for images, got {getattr(config, name)!r}")
    train, valid = (images.open_images(config.path, split, size=size) for split in (config.split, config.valid_split))
    return ImageCorpus(train.classes, train, valid)


def _open_texts(config: DataConfig, base: str | None, length: int, source_length: int | None) -> TextCorpus:
    from train.data import texts as data

    raw = config.path.startswith(data.CATALOGUE_PREFIX)
    if config.tokenizer is not None and (base is not None or not raw):
        owner = f"the target {base}" if base is not None else f"the data set {config.path}"
        raise UserError(f"data.tokenizer must be None: {owner} has its own tokenizer")
    if raw and base is None and config.tokenizer is None:
        raise UserError(f"{config.path} holds text: set data.tokenizer to the directory of a tokenizer")
    directory = base or config.tokenizer
    tokenizer = None if directory is None else Tokenizer.load(directory)
    train, valid = (
        data.open_split(
            config.path,
            split,
            tokenizer=tokenizer,
            tokenizer_fingerprint=None if tokenizer is None else tokenizer.fingerprint,
            fields=config.fields and config.fields.split(","),
        )
        for split in (config.split, config.valid_split)
    )
    tokenizer = tokenizer or Tokenizer.load(Path(config.path) / "tokenizer")
    # The template that wrote the chats goes with what learns from them, whichever its base had.
    if train.manifest.get("chat_template"):
        tokenizer = tokenizer.with_chat_template(train.manifest["chat_template"])
    return TextCorpus(tokenizer, train, valid, length, source_length)


def _this_process() -> dict[str, int]:
    return {"process_index": jax.process_index(), "process_count": jax.process_count()}
