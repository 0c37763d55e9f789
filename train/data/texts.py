"""Documents on disk and how they become batches: TFDS for storage, Grain for order, packing and exact resume.

A data set is a TFDS `array_record` directory of documents, `{'name', 'tokens', 'mask'}`, with `manifest.json`, the
lengths of the documents and the tokenizer beside it; `write_splits` writes the records and `open_split` reads them.
A name from the TFDS catalogue is read through the same door, its text tokenised when it is opened.

Packing is arithmetic. All documents of a split laid end to end are one long tape, and row `i` is its tokens
`i * seq_len` to `(i + 1) * seq_len`; the cumulative lengths say which documents those are. So rows have random access,
a shuffle is a permutation of row numbers, and the whole state of an iterator is the index of the next row.
TensorFlow is never imported.
"""

import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Int, Int32, Int64, UInt8

from models.errors import UserError
from models.formats.text_files import read_json
from models.formats.tokenizer import Tokenizer
from train.data.records import (
    CATALOGUE_PREFIX,
    Records,
    catalogue_builder,
    check_present,
    open_catalogue,
    open_directory,
    write_records,
)

_FIELDS = (("text",), ("question", "answer"))  # Tried in this order when a catalogue set is opened without fields.
_CACHED_TOKENS = 64_000_000  # Decoded documents kept in memory, 5 bytes a token.


class Document(TypedDict):
    """One document as stored.

    Attributes:
      name: where it came from: a relative path, or a file and the document's number in it.
      tokens: its tokens, begin and end tokens included.
      mask: 1 where the token counts as a label.
    """

    name: str
    tokens: Int32[np.ndarray, "N"]
    mask: UInt8[np.ndarray, "N"]


class Batch(TypedDict):
    """Rows of packed documents.

    Attributes:
      tokens: token ids; 0 where `segments` is 0.
      segments: 1, 2, ... for the documents of a row in their order, 0 for padding.
      mask: 1 where the token counts as a label.
    """

    tokens: Int32[np.ndarray, "B T"]
    segments: Int32[np.ndarray, "B T"]
    mask: UInt8[np.ndarray, "B T"]


class Documents:
    """Random access to the documents of a split, whose lengths are known without reading them.

    Attributes:
      lengths: tokens of each document, int64 [N].
      manifest: what `scripts/build_dataset.py` wrote about the data set; empty for a catalogue set.
      files: what they lie in.
    """

    def __init__(
        self,
        lengths: Int[np.ndarray, "N"],
        fetch: Callable[[int], Document],
        manifest: Mapping[str, Any] | None = None,
        files: Sequence[Path] = (),
    ):
        self.lengths = np.asarray(lengths, np.int64)
        self.files = tuple(files)
        self.manifest = dict(manifest or {})
        mean_length = max(1, int(self.lengths.mean())) if len(self.lengths) else 1
        # A long document is read for each of the rows that it spans, from several threads.
        self._fetch = functools.lru_cache(maxsize=max(16, _CACHED_TOKENS // mean_length))(fetch)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Document:
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        return self._fetch(int(index))

    def within(self, vocab_size: int, where: str) -> "Documents":
        """The same documents for a model of `vocab_size` embeddings.

        A token without one is refused when its document is read, and at once where the manifest tells that there is
        one: indexing an embedding would take another token for it.

        Args:
          vocab_size: embeddings of the model.
          where: what these documents are, for messages.

        Raises:
          UserError: a token has no embedding; the message names its document.
        """

        def fetch(index: int) -> Document:
            document = self[index]
            tokens = document["tokens"]
            if len(tokens) and not 0 <= tokens.min() <= tokens.max() < vocab_size:
                place = int(np.argmax((tokens < 0) | (tokens >= vocab_size)))
                raise UserError(
                    f"{where}, document {index} ({document['name']}): token {place} is {tokens[place]}, but the model "
                    f"has the embeddings 0 to {vocab_size - 1} alone"
                )
            return document

        largest = self.manifest.get("largest_token")
        if isinstance(largest, dict) and any(token >= vocab_size for token in largest.values()):
            for index in range(len(self)):
                fetch(index)
        return Documents(self.lengths, fetch, self.manifest, self.files)


class PackedRows:
    """The documents laid end to end and cut into rows of `seq_len` tokens; only the last row is padded."""

    def __init__(self, documents: Documents, seq_len: int):
        """Raises `UserError` if `seq_len` is below 2 (no token would have a predecessor)."""
        if seq_len < 2:
            raise UserError(f"rows must be at least 2 tokens long, got {seq_len}")
        self._documents = documents
        self._seq_len = seq_len
        self._ends = np.cumsum(documents.lengths)

    @property
    def padding(self) -> dict[str, np.ndarray]:
        """A row of padding (segments 0), which fills up a last batch."""
        return {
            "tokens": np.zeros(self._seq_len, np.int32),
            "segments": np.zeros(self._seq_len, np.int32),
            "mask": np.zeros(self._seq_len, np.uint8),
        }

    def __len__(self) -> int:
        return -(-int(self._ends[-1]) // self._seq_len)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Row `index`: `tokens` int32 [T], `segments` int32 [T], `mask` uint8 [T]."""
        row = self.padding
        start = index * self._seq_len
        filled = segment = 0
        document = int(np.searchsorted(self._ends, start, side="right"))
        while filled < self._seq_len and document < len(self._documents):
            content = self._documents[document]
            offset = start + filled - int(self._ends[document] - self._documents.lengths[document])
            count = min(self._seq_len - filled, len(content["tokens"]) - offset)
            segment += 1
            row["tokens"][filled : filled + count] = content["tokens"][offset : offset + count]
            row["mask"][filled : filled + count] = content["mask"][offset : offset + count]
            row["segments"][filled : filled + count] = segment
            filled += count
            document += 1
        return row


def open_split(
    name_or_dir: str | Path,
    split: str,
    *,
    tokenizer: Tokenizer | None = None,
    tokenizer_fingerprint: str | None = None,
    fields: Sequence[str] | None = None,
    data_dir: str | Path | None = None,
) -> Documents:
    """The documents of one split, from a directory or from the TFDS catalogue.

    Args:
      name_or_dir: a directory written by `scripts/build_dataset.py`, or `tfds:NAME`.
      split: name of a split, or a slice of one as TFDS writes it, such as `train[:10%]`.
      tokenizer: for catalogue names, which hold text.
      tokenizer_fingerprint: the tokenizer that the tokens must come from.
      fields: text fields of a catalogue set that make a document, joined by newlines; by default `text`, or else
        `question` and `answer`.
      data_dir: where catalogue sets are kept; by default TFDS's own place.

    Raises:
      UserError: no such data set or split, it is of another tokenizer, or it cannot be downloaded.
    """
    if str(name_or_dir).startswith(CATALOGUE_PREFIX):
        name = str(name_or_dir).removeprefix(CATALOGUE_PREFIX)
        if tokenizer is None:
            raise UserError(f"{name_or_dir} holds text: expected a tokenizer to turn it into tokens")
        _check_tokenizer(tokenizer.fingerprint, tokenizer_fingerprint, str(name_or_dir))
        return _open_catalogue(name, split, tokenizer, fields, data_dir)
    return _open_directory(Path(name_or_dir), split, tokenizer_fingerprint)


def write_splits(
    directory: Path, splits: Mapping[str, Callable[[], Iterable[Document]]], description: str
) -> dict[str, Int64[np.ndarray, "N"]]:
    """Writes documents as a TFDS `array_record` data set, each split in the order given.

    Args:
      directory: an existing, empty directory, which becomes the data set; the manifest is the caller's.
      splits: for each split, a function that yields its documents.
      description: goes into TFDS's own metadata.

    Returns:
      The lengths of the documents of each split, also written beside the records.

    Raises:
      UserError: the records could not be written, because the disk is full for instance.
    """
    lengths: dict[str, list[int]] = {name: [] for name in splits}

    def examples(name: str) -> Iterator[tuple[int, Document]]:
        for index, document in enumerate(splits[name]()):
            lengths[name].append(len(document["tokens"]))
            yield index, document

    write_records(functools.partial(TokenDocuments, examples, list(splits), description), directory)
    arrays = {name: np.asarray(values, np.int64) for name, values in lengths.items()}
    for name, array in arrays.items():
        np.save(_lengths_path(directory, name), array)
    return arrays


class TokenDocuments(tfds.core.GeneratorBasedBuilder):
    """The TFDS side of `write_splits`."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(
        self,
        examples: Callable[[str], Iterable[tuple[int, Document]]],
        names: Sequence[str],
        description: str,
        **kwargs: Any,
    ):
        self._examples = examples
        self._names = names
        self._description = description
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self._description,
            features=tfds.features.FeaturesDict(
                {
                    "name": tfds.features.Text(),
                    "tokens": tfds.features.Tensor(shape=(None,), dtype=np.int32),
                    "mask": tfds.features.Tensor(shape=(None,), dtype=np.uint8),
                }
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterable[tuple[int, Document]]]:
        return {name: self._generate_examples(name) for name in self._names}

    def _generate_examples(self, name: str) -> Iterable[tuple[int, Document]]:
        return self._examples(name)


def _open_directory(directory: Path, split: str, tokenizer_fingerprint: str | None) -> Documents:
    manifest_path = directory / "manifest.json"
    if not manifest_path.is_file():
        raise UserError(
            f"no data set at {directory}: expected a directory written by `python -m scripts.build_dataset`, or a TFDS "
            f"catalogue name such as {CATALOGUE_PREFIX}gsm8k"
        )
    manifest = read_json(manifest_path)
    if not isinstance(manifest.get("tokenizer"), str):
        raise UserError(f"{manifest_path} does not say which tokenizer made the tokens (its entry 'tokenizer')")
    _check_tokenizer(manifest["tokenizer"], tokenizer_fingerprint, f"the data set {directory}")
    records = open_directory(directory, split)
    lengths_path = _lengths_path(directory, records.split)
    check_present(lengths_path)
    lengths = _lengths(lengths_path, records)

    def fetch(index: int) -> Document:
        example = records[index]
        if len(example["tokens"]) != lengths[index]:
            raise UserError(f"{lengths_path} is not of this data set: document {index} has another length")
        return {"name": example["name"].decode(), "tokens": example["tokens"], "mask": example["mask"]}

    return Documents(lengths, fetch, manifest, [*records.files, lengths_path])


def _open_catalogue(
    name: str, split: str, tokenizer: Tokenizer, fields: Sequence[str] | None, data_dir: str | Path | None
) -> Documents:
    builder = catalogue_builder(name, data_dir)
    available = list(builder.info.features or {})
    if fields is None:
        fields = next((known for known in _FIELDS if set(known) <= set(available)), ())
    if not fields or not set(fields) <= set(available):
        wanted = (
            f"has no field {', '.join(sorted(set(fields) - set(available)))}" if fields else "needs its fields named"
        )
        raise UserError(f"the TFDS set {name!r} {wanted}; it holds {', '.join(available)}")
    source = open_catalogue(builder, split)
    print(f"tokenising {len(source):,} documents of {CATALOGUE_PREFIX}{name} {split}", file=sys.stderr, flush=True)
    tokens: list[np.ndarray] = []
    for start in range(0, len(source), 256):
        examples = [source[index] for index in range(start, min(start + 256, len(source)))]
        texts = [
            "\n".join(_as_text(example[field], field, f"{name}, document {index}") for field in fields)
            for index, example in enumerate(examples, start)
        ]
        tokens.extend(np.asarray(ids, np.int32) for ids in tokenizer.encode_documents(texts))

    def fetch(index: int) -> Document:
        return {
            "name": f"{name}:{index}",
            "tokens": tokens[index],
            "mask": np.ones(len(tokens[index]), np.uint8),
        }

    return Documents(np.array([len(ids) for ids in tokens]), fetch, files=source.files)


def _check_tokenizer(actual: str, expected: str | None, what: str) -> None:
    if expected is not None and actual != expected:
        raise UserError(f"{what} was tokenised by tokenizer {actual}, but the model here uses tokenizer {expected}")


def _lengths_path(directory: Path, split: str) -> Path:
    return directory / f"lengths-{split}.npy"


def _lengths(path: Path, records: Records) -> np.ndarray:
    try:
        lengths = np.load(path, allow_pickle=False)[records.first : records.stop]
    except Exception as error:  # The header is Python, and fails in all the ways that Python may.
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error})") from None
    if lengths.shape != (len(records),) or lengths.dtype.kind != "i":
        raise UserError(f"{path} is not of this data set: it holds {lengths.dtype} {list(lengths.shape)}")
    return lengths


def _as_text(value: Any, field: str, name: str) -> str:
    if not isinstance(value, bytes | str):
        raise UserError(f"field {field!r} of the TFDS set {name} is {type(value).__name__}, not text")
    try:
        return value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError:
        raise UserError(f"field {field!r} of the TFDS set {name} is not UTF-8 text") from None
