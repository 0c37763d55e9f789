"""Documents become a tokenised data set that `train/data/texts.py` reads: `build(hold_out(...), tokenizer, out)`.

The directory holds TFDS `array_record` files, `manifest.json` (source, kind, tokenizer fingerprint, chat template,
counts per split) and the tokenizer. It appears whole under its name or not at all.
"""

import collections
import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from models.errors import UserError
from models.formats.storage import write_json
from models.formats.text_files import half_character
from models.formats.tokenizer import Tokenizer
from train.data import texts as data
from train.data.building import new_dataset
from train.data.text_sources import RawDocument

_CHUNK = 64  # Documents tokenised together.
_SHOWN = 5  # Refusals told in full.
_BLANK, _REFUSED = "documents without text", "conversations that are refused"


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
    max_refused: int = 0,
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
      max_refused: conversations of a split that may be passed over because they cannot be used; one more is an error.
      overwrite: replace a data set that is there.
      progress: told a line every second or so, and at the end what was left out.

    Returns:
      The manifest: `kind`, `source`, `tokenizer`, `vocab_size`, `largest_token` of each split, `chat_template` and, per
      split, `documents`, `tokens`, `labels`, `bytes` (of the text, UTF-8) and `left_out` (documents that are not in it,
      by reason).

    Raises:
      UserError: a split is empty, a document cannot be tokenised, or `out` holds something that must not be lost.
    """
    counters = {name: _Counter(name, tokenizer.chat_template or "", max_refused, progress) for name in splits}
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
    largest = dict.fromkeys(splits, 0)

    def read(name: str) -> Iterator[data.Document]:
        for document in splits[name]():
            largest[name] = max(largest[name], int(document["tokens"].max(initial=0)))
            yield document

    with new_dataset(out, overwrite) as directory:
        data.write_splits(directory, {name: functools.partial(read, name) for name in splits}, "Documents as tokens.")
        facts = {"tokenizer": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size, "largest_token": largest}
        manifest = {**facts, **describe()}
        write_json(directory / "manifest.json", manifest)
        tokenizer.save(directory / "tokenizer")
    return manifest


def _tokenised(documents: Iterable[RawDocument], tokenizer: Tokenizer, counter: "_Counter") -> Iterator[data.Document]:
    present = (document for document in documents if counter.wants(document))
    while chunk := list(itertools.islice(present, _CHUNK)):
        texts = iter(_encoded([document for document in chunk if not document.messages], tokenizer))
        for document in chunk:
            if document.messages:
                try:
                    tokens, mask = tokenizer.encode_chat_with_mask(document.messages, document.tools)
                except UserError as error:
                    counter.refuse(f"{document.where or document.name}: {error}")
                    continue
            else:
                tokens = next(texts)
                mask = [1] * len(tokens)
            counter.add(document, tokens, mask)
            yield {"name": document.name, "tokens": np.array(tokens, np.int32), "mask": np.array(mask, np.uint8)}
    counter.finish()


def _encoded(documents: Sequence[RawDocument], tokenizer: Tokenizer) -> list[list[int]]:
    for document in documents:
        at = half_character(document.text)
        if at is not None:
            raise UserError(f"{document.where or document.name}: character {at} is half a surrogate pair")
    return tokenizer.encode_documents([document.text for document in documents])


class _Counter:
    """What went into one split and what did not, told about as it grows."""

    def __init__(self, split: str, template: str, max_refused: int, progress: Callable[[str], None]):
        """`template` is the chat template; more than `max_refused` conversations that cannot be used are an error."""
        self._totals = {"documents": 0, "tokens": 0, "labels": 0, "bytes": 0}
        self._left_out: collections.Counter[str] = collections.Counter()
        self._unused: collections.Counter[str] = collections.Counter()
        self._refusals: list[str] = []
        self._split, self._template, self._max_refused, self._progress = split, template, max_refused, progress
        self._told = float("inf")

    @property
    def totals(self) -> dict[str, Any]:
        """Counts of what went in, and of what was left out by reason."""
        return {**self._totals, "left_out": dict(self._left_out)}

    def wants(self, document: RawDocument) -> bool:
        """Whether a document goes in; counted if not."""
        if document.refused:
            self.refuse(document.refused)
        elif document.left_out:
            self._left_out[document.left_out] += 1
        elif not document.content.strip():
            self._left_out[_BLANK] += 1
        else:
            return True
        return False

    def refuse(self, reason: str) -> None:
        """Counts a conversation that cannot be used. Raises UserError for one more than may be."""
        self._left_out[_REFUSED] += 1
        count = self._left_out[_REFUSED]
        if count <= _SHOWN:
            self._refusals.append(reason)
        if count > self._max_refused:
            first = self._refusals[0]
            raise UserError(first if count == 1 else f"{count:,} conversations are refused, the first: {first}")

    def add(self, document: RawDocument, tokens: Sequence[int], mask: Sequence[int]) -> None:
        self._totals["documents"] += 1
        self._totals["tokens"] += len(tokens)
        self._totals["labels"] += sum(mask)
        self._totals["bytes"] += len(document.content.encode())
        fields = {key for turn in document.messages for key in turn if key not in ("role", "content")}
        # What a template never names it cannot show; what it shows of the rest, `ChatTemplate` has checked.
        self._unused.update([*document.unused, *(f"{key} of turns" for key in fields if key not in self._template)])
        self._told = min(self._told, time.monotonic())
        if time.monotonic() - self._told > 1:
            self._tell("so far")

    def finish(self) -> None:
        listed = _listed(self._left_out)
        if not self._totals["documents"]:
            if self._refusals:
                raise UserError(f"{self._refusals[0]} (no conversation of {self._split!r} can be used)")
            left_out = f" (left out: {listed})" if listed else ""
            raise UserError(f"the split {self._split!r} is empty: there is no document with text in it{left_out}")
        self._tell("in all")
        if listed:
            self._progress(f"{self._split}: left out: {listed}")
        for reason in self._refusals:
            self._progress(f"{self._split}: refused {reason}")
        if (more := self._left_out[_REFUSED] - len(self._refusals)) > 0:
            self._progress(f"{self._split}: and {more:,} more")
        if self._unused:
            self._progress(f"{self._split}: fields that go nowhere, and in how many rows: {_listed(self._unused)}")

    def _tell(self, when: str) -> None:
        self._told = time.monotonic()
        documents, tokens = self._totals["documents"], self._totals["tokens"]
        self._progress(f"{self._split}: {documents:,} documents, {tokens:,} tokens {when}")


def _listed(counts: collections.Counter[str]) -> str:
    return ", ".join(f"{name} ({count:,})" for name, count in sorted(counts.items()))
