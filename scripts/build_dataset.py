"""Text, JSONL, source files or chats become a tokenised data set that `train/data/texts.py` reads; images one of
images.

    python -m scripts.build_dataset --kind source --src DIR --glob '**/*.py' --exclude 'test*,site-packages' \
        --train_tokenizer 2048 --valid_fraction 0.02 --out data/python
    python -m scripts.build_dataset --kind jsonl --src train.jsonl --valid_src test.jsonl --field question,answer \
        --tokenizer TARGET_DIR --out data/gsm8k
    python -m scripts.build_dataset --kind chat --src chats.jsonl --tokenizer TARGET_DIR --out data/chat
    python -m scripts.build_dataset --images FOLDER --size 64 --valid_fraction 0.02 --out data/pictures

The directory holds TFDS `array_record` files, `manifest.json` (source, kind, tokenizer fingerprint, chat template,
counts per split) and the tokenizer. It appears whole under its name or not at all. Which documents are held out
depends on their names alone, so it stays the same when documents are added. From Python: `build(hold_out(...), ...)`.
For images see `scripts/image_dataset.py`.
"""

import argparse
import contextlib
import dataclasses
import fnmatch
import functools
import gzip
import hashlib
import itertools
import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from models import command_line
from models.errors import UserError, exit_on_user_error
from models.formats.storage import write_json
from models.formats.tokenizer import Message, Tokenizer
from scripts import image_dataset
from scripts.dataset_directory import check_out, name_rank, new_dataset
from train.data import texts as data

KINDS = ("jsonl", "text", "source", "chat")
END_OF_TEXT = "<|endoftext|>"
BLANK_LINE = "blank-line"
_CHUNK = 64  # Documents tokenised together.
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


@dataclasses.dataclass(frozen=True)
class RawDocument:
    """A document before tokenisation: a text, or a conversation.

    Attributes:
      name: where it came from, unique in its data set.
      text: the text, where it is no conversation.
      messages: `{'role', 'content'}` turns of a conversation.
    """

    name: str
    text: str = ""
    messages: tuple[Message, ...] = ()

    @property
    def content(self) -> str:
        """Everything that was said, which is what a tokenizer is trained on."""
        return self.text or "\n".join(message["content"] for message in self.messages)


class DocumentList(Iterable[RawDocument]):
    """Documents that can be read more than once: each pass calls `read` again."""

    def __init__(self, read: Callable[[], Iterable[RawDocument]]):
        self._read = read

    def __iter__(self) -> Iterator[RawDocument]:
        return iter(self._read())


def read_jsonl(path: str | Path, fields: Sequence[str] = ("text",)) -> DocumentList:
    """One document per line of a (gzipped) JSONL file: its string `fields`, joined by newlines.

    Reading raises `UserError`, with the line's number, for bad JSON and for a missing field.
    """

    def document(name: str, where: str, record: dict[str, Any]) -> RawDocument:
        for field in fields:
            if not isinstance(record.get(field), str):
                raise UserError(f"{where}: expected a string field {field!r}; the line holds {', '.join(record)}")
        return RawDocument(name, "\n".join(record[field] for field in fields))

    return DocumentList(lambda: _records(Path(path), document))


def read_chat(path: str | Path) -> DocumentList:
    """One conversation per line of a (gzipped) JSONL file.

    Either `{'messages': [{'role', 'content'}]}` or ShareGPT's `{'conversations': [{'from', 'value'}]}`, whose `human`
    and `gpt` are user and assistant. Reading raises `UserError`, with the line's number, for any other form.
    """

    def document(name: str, where: str, record: dict[str, Any]) -> RawDocument:
        keys = ("messages", "role", "content") if "messages" in record else ("conversations", "from", "value")
        turns = record.get(keys[0])
        if not isinstance(turns, list) or not turns:
            raise UserError(f"{where}: expected a list of turns in 'messages' or 'conversations'")
        messages = []
        for turn in turns:
            role, content = (turn.get(key) if isinstance(turn, dict) else None for key in keys[1:])
            if not isinstance(role, str) or not isinstance(content, str):
                raise UserError(f"{where}: expected every turn to hold the strings {keys[1]!r} and {keys[2]!r}")
            messages.append({"role": _SHAREGPT_ROLES.get(role, role), "content": content})
        return RawDocument(name, messages=tuple(messages))

    return DocumentList(lambda: _records(Path(path), document))


def read_text(path: str | Path, separator: str = END_OF_TEXT) -> DocumentList:
    """The documents of one (gzipped) text file, which `separator` parts; `blank-line` parts at empty lines."""

    def read() -> Iterator[RawDocument]:
        with _opened(Path(path)) as file:
            text = file.read()
        pieces = re.split(r"\n\s*\n", text) if separator == BLANK_LINE else text.split(separator)
        for number, piece in enumerate(pieces, 1):
            yield RawDocument(f"{Path(path).name}:{number}", piece.strip("\n"))

    return DocumentList(read)


def read_source(folder: str | Path, glob: str = "**/*", exclude: Sequence[str] = ()) -> DocumentList:
    """One document per file of a folder, in the order of their relative paths, which are their names.

    Files that are not UTF-8 and repetitions of an earlier file are left out.

    Args:
      folder: where to look.
      glob: which files, relative to `folder`.
      exclude: patterns; a file is left out when one matches its relative path or any single part of it.

    Raises:
      UserError: no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: expected a folder of source files")

    def excluded(path: Path) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in exclude for name in (path.as_posix(), *path.parts))

    def read() -> Iterator[RawDocument]:
        seen: set[bytes] = set()
        paths = sorted(path.relative_to(folder) for path in folder.glob(glob) if path.is_file())
        for path in paths:
            if excluded(path):
                continue
            content = (folder / path).read_bytes()
            digest = hashlib.sha256(content).digest()
            if digest in seen:
                continue
            seen.add(digest)
            with contextlib.suppress(UnicodeDecodeError):
                yield RawDocument(path.as_posix(), content.decode())

    return DocumentList(read)


def limited(documents: Iterable[RawDocument], max_documents: int | None) -> Iterable[RawDocument]:
    """The first `max_documents` documents, or all of them."""
    if max_documents is None:
        return documents
    if max_documents < 1:
        raise UserError(f"max_documents must be at least 1, got {max_documents}")
    return DocumentList(lambda: itertools.islice(documents, max_documents))


def hold_out(
    documents: Iterable[RawDocument], *, fraction: float = 0.0, count: int = 0
) -> dict[str, Iterable[RawDocument]]:
    """Parts documents into `train` and `valid` by a hash of their names.

    Args:
      documents: kept in memory if they can be read only once.
      fraction: share of documents held out, about; 0 or less than 1.
      count: or their exact number.

    Returns:
      `{'train', 'valid'}`, or `{'train'}` alone when nothing is asked to be held out.

    Raises:
      UserError: both are given, one is out of range, or there are not more documents than `count`.
    """
    if fraction and count:
        raise UserError("hold out either a fraction of the documents or a number of them, not both")
    if not 0 <= fraction < 1 or count < 0:
        raise UserError(f"the held-out part must be a fraction in 0..1 or a positive number, got {fraction or count}")
    if not fraction and not count:
        return {"train": documents}
    if iter(documents) is documents:
        documents = list(documents)
    bound = int(fraction * 2**64)
    if count:
        ranks = sorted(name_rank(document.name) for document in documents if document.content.strip())
        if count >= len(ranks):
            raise UserError(f"cannot hold out {count} documents of {len(ranks)}: none would be left to train on")
        bound = ranks[count]
    return {
        "train": DocumentList(lambda: (document for document in documents if name_rank(document.name) >= bound)),
        "valid": DocumentList(lambda: (document for document in documents if name_rank(document.name) < bound)),
    }


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
      kind: for the manifest, one of `KINDS`.
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


def _records(path: Path, document: Callable[[str, str, dict[str, Any]], RawDocument]) -> Iterator[RawDocument]:
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                record = json.loads(line)
            except ValueError as error:
                raise UserError(f"{where}: not valid JSON ({error})") from error
            if not isinstance(record, dict):
                raise UserError(f"{where}: expected a JSON object, got {type(record).__name__}")
            yield document(f"{path.name}:{number}", where, record)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    if not path.is_file():
        raise UserError(f"no file {path}: expected the file with the documents")
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            yield file
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text") from error
    except gzip.BadGzipFile as error:
        raise UserError(f"{path} is not a gzip file ({error})") from error


def _reader(arguments: argparse.Namespace) -> Callable[[Path], Iterable[RawDocument]]:
    return {
        "jsonl": lambda path: read_jsonl(path, arguments.field.split(",")),
        "text": lambda path: read_text(path, arguments.separator),
        "source": lambda path: read_source(path, arguments.glob, arguments.exclude.split(",")),
        "chat": read_chat,
    }[arguments.kind]


def _splits(arguments: argparse.Namespace) -> dict[str, Iterable[RawDocument]]:
    read = _reader(arguments)
    documents = limited(read(arguments.src), arguments.max_documents)
    if arguments.valid_src is None:
        return hold_out(documents, fraction=arguments.valid_fraction, count=arguments.valid_documents)
    if arguments.valid_fraction or arguments.valid_documents:
        raise UserError("--valid_src gives the valid split, so --valid_fraction and --valid_documents have no meaning")
    return {"train": documents, "valid": read(arguments.valid_src)}


def _tokenizer(arguments: argparse.Namespace, documents: Iterable[RawDocument]) -> Tokenizer:
    if (arguments.tokenizer is None) == (arguments.train_tokenizer is None):
        raise UserError("give either --tokenizer DIR or --train_tokenizer VOCABULARY_SIZE")
    if arguments.tokenizer is not None:
        tokenizer = Tokenizer.load(arguments.tokenizer)
    else:
        tokenizer = train_tokenizer(documents, arguments.train_tokenizer, _print)
    if arguments.chat_template is None:
        return tokenizer
    if not arguments.chat_template.is_file():
        raise UserError(f"no file {arguments.chat_template}: expected a Jinja chat template")
    return tokenizer.with_chat_template(arguments.chat_template.read_text(encoding="utf-8"))


def _source(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options that decide which documents a data set holds, as given."""
    per_kind = {"jsonl": ["field"], "text": ["separator"], "source": ["glob", "exclude"], "chat": []}[arguments.kind]
    names = ["src", *per_kind, "max_documents", "valid_fraction", "valid_documents", "valid_src"]
    given = {name: getattr(arguments, name) for name in names}
    return {name: str(value) if isinstance(value, Path) else value for name, value in given.items() if value}


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = command_line.parser("scripts.build_dataset", __doc__)
    parser.add_argument("--kind", choices=KINDS)
    parser.add_argument("--src", type=Path, help="a file (.gz too), or the folder of --kind source")
    parser.add_argument("--out", required=True, type=Path, help="the directory to write")
    parser.add_argument("--overwrite", action="store_true", help="replace a data set that is there")
    parser.add_argument("--tokenizer", type=Path, help="directory with tokenizer.json, such as a target's")
    parser.add_argument("--train_tokenizer", type=int, metavar="VOCAB", help="or train one of this many entries")
    parser.add_argument("--field", default="text", help="jsonl: fields of a document, comma-separated (%(default)s)")
    parser.add_argument(
        "--separator", default=END_OF_TEXT, help=f"text: what parts documents (%(default)s), or {BLANK_LINE}"
    )
    parser.add_argument("--glob", default="**/*", help="source: which files (%(default)s)")
    parser.add_argument("--exclude", default="", help="source: patterns of paths or path parts, comma-separated")
    parser.add_argument("--chat_template", type=Path, help="chat: a Jinja file in place of the tokenizer's template")
    parser.add_argument("--max_documents", type=int, help="take only the first so many")
    parser.add_argument("--valid_fraction", type=float, default=0.0, help="share of documents held out as `valid`")
    parser.add_argument("--valid_documents", type=int, default=0, help="or their number")
    parser.add_argument("--valid_src", type=Path, help="or where the valid split comes from")
    image_dataset.add_options(parser)
    return parser


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """The command: reads, tokenises, writes, and prints where the data set lies."""
    arguments = _parser().parse_args(argv)
    check_out(arguments.out, arguments.overwrite)
    if arguments.images is not None:
        image_dataset.run(arguments)
        return
    if arguments.kind is None or arguments.src is None:
        raise UserError("give --kind and --src for text, or --images for images")
    splits = _splits(arguments)
    tokenizer = _tokenizer(arguments, splits["train"])
    manifest = build(
        splits,
        tokenizer,
        arguments.out,
        kind=arguments.kind,
        source=_source(arguments),
        overwrite=arguments.overwrite,
        progress=_print,
    )
    counts = ", ".join(f"{name} {split['tokens']:,} tokens" for name, split in manifest["splits"].items())
    print(f"{arguments.out}: {counts}, tokenizer {manifest['tokenizer']}")


if __name__ == "__main__":
    main()
