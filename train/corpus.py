"""The training and validation splits of a job, and the tokenizer that both speak.

The tokenizer is the base model's where there is one (a target to finetune or to train heads on), and then the data
must agree with it; otherwise it is the one stored with the data set, or, for raw catalogue text, the one that
`data.tokenizer` names.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import grain
import jax

from models.errors import UserError
from models.tokenizer import Tokenizer
from train import data
from train.config import DataConfig


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Both splits, opened.

    Attributes:
      tokenizer: of the tokens in both.
      train: documents to learn from.
      valid: documents held out.
    """

    tokenizer: Tokenizer
    train: data.Documents
    valid: data.Documents

    def batches(self, batch_size: int, length: int, seed: int) -> grain.DatasetIterator:
        """This process's part of endless shuffled training batches; `get_state()` and `set_state()` resume exactly."""
        return data.batches(self.train, batch_size, length, seed, **_this_process())

    def validation(self, batch_size: int, length: int, max_batches: int | None) -> Iterator[data.Batch]:
        """This process's part of one pass over the held-out documents, in order."""
        return data.sequential(self.valid, batch_size, length, max_batches=max_batches, **_this_process())


def open_corpus(config: DataConfig, base: str | None = None) -> Corpus:
    """Opens what a config's section `data` names.

    Args:
      config: the section.
      base: directory of the target that the job starts from, or None.

    Raises:
      UserError: no such data set or split, no tokenizer for raw text, or data of another tokenizer than the base's.
    """
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
    return Corpus(tokenizer or Tokenizer.load(Path(config.path) / "tokenizer"), train, valid)


def _this_process() -> dict[str, int]:
    return {"process_index": jax.process_index(), "process_count": jax.process_count()}
