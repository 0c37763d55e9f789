"""Documents become a tokenised data set that `train/data/texts.py` reads: `build(hold_out(...), tokenizer, out)`.

The directory holds TFDS `array_record` files, `manifest.json` (source, kind, tokenizer fingerprint, chat template,
counts per split) and the tokenizer. It appears whole under its name or not at all.
"""

import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from models.errors import UserError
from models.formats.storage import write_json
from models.formats.tokenizer import Tokenizer
from train.data import texts as data
from train.data.building import new_dataset
from train.data.text_sources import RawDocument

_CHUNK = 64  # Documents tokenised together.


def train_tokenizer(
    documents: Iterable[RawDocument], vocab_size: int, progress: Callable[[str], None] = lambda line: None
) -> Tokenizer:
    """A byte-level BPE tokenizer trained on the documents' text."""
    return Tokenizer.train((document.content for document in documents), vocab_size, progress)


def build(
    splits: Mapping[str, Iterable[RawDocument]],
    tokenizer: Tokenizer,
    out: str | Path,
    *,
    kind: str = "text",
    source: Any = "memory",
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Tokenises documents and writes them as a data set.

    A text becomes begin token, text, end token, all of them labels. A conversation goes through the tokenizer's chat
    template, and the assistant's tokens with their closing token are labels. Documents without text are left out.

    Args:
      splits: documents by split, from `hold_out` for instance.
      tokenizer: saved with the data set, in `out/tokenizer`.
      out: the directory to write.
      kind: for the manifest, what sort of documents they are.
      source: for the manifest, where the documents come from: a string or other JSON value.
      overwrite: replace a data set that is there.
      progress: told a line every second or so.

    Returns:
      The manifest: `kind`, `source`, `tokenizer`, `vocab_size`, `chat_template` and, per split, `documents`, `tokens`,
      `labels` and `bytes` (of the text, UTF-8).

    Raises:
      UserError: a split is empty, a document cannot be tokenised, or `out` holds something that must not be lost.
    """
    counters = {name: _Counter(name, progress) for name in splits}
    return write_dataset(
        out,
        tokenizer,
        {name: functools.partial(_tokenised, splits[name], tokenizer, counters[name]) for name in splits},
        lambda: {
            "kind": kind,
            "source": source,
            "chat_template": tokenizer.chat_template if kind == "chat" else None,
            "splits": {name: counter.totals for name, counter in counters.items()},
        },
        overwrite=overwrite,
    )


def write_dataset(
    out: str | Path,
    tokenizer: Tokenizer,
    splits: Mapping[str, Callable[[], Iterable[data.Document]]],
    describe: Callable[[], Mapping[str, Any]],
    *,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes tokenised documents as a data set, whole or not at all.

    Args:
      out: the directory to write.
      tokenizer: what made the tokens, saved in `out/tokenizer`.
      splits: for each split, a function that yields its documents.
      describe: called when all are written, for the rest of the manifest.
      overwrite: replace a data set that is there.

    Returns:
      The manifest.

    Raises:
      UserError: the records could not be written, or `out` holds something that must not be lost.
    """
    with new_dataset(out, overwrite) as directory:
        data.write_splits(directory, splits, "Documents as tokens.")
        manifest = {"tokenizer": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size, **describe()}
        write_json(directory / "manifest.json", manifest)
        tokenizer.save(directory / "tokenizer")
    return manifest


def _tokenised(documents: Iterable[RawDocument], tokenizer: Tokenizer, counter: "_Counter") -> Iterator[data.Document]:
    present = (document for document in documents if document.content.strip())
    while chunk := list(itertools.islice(present, _CHUNK)):
        texts = iter(tokenizer.encode_documents([document.text for document in chunk if not document.messages]))
        for document in chunk:
            if document.messages:
                try:
                    tokens, mask = tokenizer.encode_chat_with_mask(document.messages)
                except UserError as error:
                    raise UserError(f"{document.name}: {error}") from error
            else:
                tokens = next(texts)
                mask = [1] * len(tokens)
            counter.add(document, tokens, mask)
            yield {"name": document.name, "tokens": np.array(tokens, np.int32), "mask": np.array(mask, np.uint8)}
    counter.finish()


class _Counter:
    """What went into one split, told about as it grows."""

    def __init__(self, split: str, progress: Callable[[str], None]):
        self.totals = {"documents": 0, "tokens": 0, "labels": 0, "bytes": 0}
        self._split = split
        self._progress = progress
        self._told = float("inf")

    def add(self, document: RawDocument, tokens: Sequence[int], mask: Sequence[int]) -> None:
        self.totals["documents"] += 1
        self.totals["tokens"] += len(tokens)
        self.totals["labels"] += sum(mask)
        self.totals["bytes"] += len(document.content.encode())
        self._told = min(self._told, time.monotonic())
        if time.monotonic() - self._told > 1:
            self._tell("so far")

    def finish(self) -> None:
        if not self.totals["documents"]:
            raise UserError(f"the split {self._split!r} is empty: there is no document with text in it")
        self._tell("in all")

    def _tell(self, when: str) -> None:
        self._told = time.monotonic()
        documents, tokens = self.totals["documents"], self.totals["tokens"]
        self._progress(f"{self._split}: {documents:,} documents, {tokens:,} tokens {when}")
