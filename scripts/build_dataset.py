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
depends on their names alone, so it stays the same when documents are added.

Images come from a folder with a folder per class, an `.npz` or drawn glyphs:

    python -m scripts.build_dataset --images emoji64.npz --label group --valid_documents 200 --out data/emoji
    python -m scripts.build_dataset --images glyphs --max_documents 20000 --valid_documents 1000 --out data/glyphs

From Python: `train/data/text_building.py` and `train/data/image_building.py`.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from models import command_line
from models.command_line import at_least
from models.errors import UserError, exit_on_user_error
from models.formats.text_files import read_text
from models.formats.tokenizer import Tokenizer
from train.data import image_building, text_building, text_sources
from train.data.building import check_out
from train.data.glyphs import CHARACTERS
from train.data.image_building import GLYPH_SIZE, GLYPHS, ImageList, draw_glyphs, read_folder, read_npz
from train.data.text_sources import (
    BLANK_LINE,
    END_OF_TEXT,
    RawDocument,
    hold_out,
    limited,
    read_chat,
    read_jsonl,
    read_source,
)

KINDS = ("jsonl", "text", "source", "chat")
# Options that some sources alone have a use for: these kinds of text, or of images.
_ONLY_FOR = {
    "field": ("jsonl",),
    "separator": ("text",),
    "glob": ("source",),
    "exclude": ("source",),
    "strict": ("chat",),
    "max_refused": ("chat",),
    "tokenizer": KINDS,
    "train_tokenizer": KINDS,
    "chat_template": KINDS,
    "size": (GLYPHS, "npz", "folder"),
    "label": ("npz",),
    "characters": (GLYPHS,),
    "seed": (GLYPHS,),
}
_COUNT = 20_000  # of glyphs
_SHOWN_CLASSES = 100
_LARGEST_SIDE = 8192


def _reader(arguments: argparse.Namespace) -> Callable[[Path], Iterable[RawDocument]]:
    return {
        "jsonl": lambda path: read_jsonl(path, arguments.field.split(",")),
        "text": lambda path: text_sources.read_text(path, arguments.separator),
        "source": lambda path: read_source(path, arguments.glob, arguments.exclude.split(",")),
        "chat": read_chat,
    }[arguments.kind]


def _check_options(arguments: argparse.Namespace) -> None:
    """Raises UserError where an option is given that the source has no use for."""
    form, said = arguments.kind, f"--kind {arguments.kind}"
    if arguments.images is not None:
        form, said = "npz" if arguments.images.endswith(".npz") else "folder", f"--images {arguments.images}"
        form = GLYPHS if arguments.images == GLYPHS else form
    parser = _parser()
    for name, forms in _ONLY_FOR.items():
        if form not in forms and getattr(arguments, name) != parser.get_default(name):
            raise UserError(f"{said} has no use for --{name}")


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
        tokenizer = text_building.train_tokenizer(documents, arguments.train_tokenizer, _print)
    if arguments.chat_template is None:
        return tokenizer
    if not arguments.chat_template.is_file():
        raise UserError(f"no file {arguments.chat_template}: expected a Jinja chat template")
    return tokenizer.with_chat_template(read_text(arguments.chat_template))


def _source(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options that decide which documents a data set holds, as given."""
    per_kind = {"jsonl": ["field"], "text": ["separator"], "source": ["glob", "exclude"], "chat": []}[arguments.kind]
    names = ["src", *per_kind, "max_documents", "valid_fraction", "valid_documents", "valid_src"]
    given = {name: getattr(arguments, name) for name in names}
    return {name: str(value) if isinstance(value, Path) else value for name, value in given.items() if value}


def _image_source(arguments: argparse.Namespace) -> tuple[ImageList, dict[str, Any]]:
    """The images, and the options that decided which."""
    if arguments.images == GLYPHS:
        count, size = arguments.max_documents or _COUNT, arguments.size or GLYPH_SIZE
        options = {"seed": arguments.seed, "characters": arguments.characters}
        return draw_glyphs(count, size, **options), options
    if arguments.images.endswith(".npz"):
        return read_npz(arguments.images, arguments.label, arguments.size), {"label": arguments.label}
    if arguments.size is None:
        raise UserError("--size is needed for a folder: which side shall its images be brought to?")
    return read_folder(arguments.images, arguments.size), {}


def _build_images(arguments: argparse.Namespace) -> None:
    """The command, once it is known to be about images."""
    if arguments.kind is not None or arguments.src is not None or arguments.valid_src is not None:
        raise UserError("--images says where images come from, so --kind, --src and --valid_src have no meaning")
    _check_options(arguments)
    if arguments.size is not None and not 1 <= arguments.size <= _LARGEST_SIDE:
        raise UserError(f"--size must be from 1 to {_LARGEST_SIDE}, got {arguments.size}")
    if arguments.max_documents is not None and arguments.max_documents < 1:
        raise UserError(f"max_documents must be at least 1, got {arguments.max_documents}")
    source, options = _image_source(arguments)
    source = source.first(arguments.max_documents or len(source.names))
    splits = image_building.hold_out(source.names, arguments.valid_fraction, arguments.valid_documents)
    given = {name: getattr(arguments, name) for name in ("max_documents", "valid_fraction", "valid_documents")}
    description = {"images": arguments.images, **options, **{name: value for name, value in given.items() if value}}
    manifest = image_building.build(
        source, splits, arguments.out, description=description, overwrite=arguments.overwrite, progress=_print
    )
    counts = ", ".join(f"{name} {split['images']:,} images" for name, split in manifest["splits"].items())
    print(f"{arguments.out}: {counts} of {source.size}x{source.size}, {len(source.classes)} classes")
    print(f"classes: {_mapping(source.classes)}")
    for title, numbers in (("left out", manifest["left_out"]), ("changed", manifest["changes"])):
        if numbers:
            print(f"{title}: {', '.join(f'{what} ({count:,})' for what, count in numbers.items())}")


def _mapping(classes: Sequence[str]) -> str:
    """Which number stands for which class; of very many the first and the last."""
    numbered = [f"{number} {name}" for number, name in enumerate(classes)]
    if len(numbered) <= _SHOWN_CLASSES:
        return ", ".join(numbered)
    return f"{', '.join(numbered[: _SHOWN_CLASSES - 1])}, ..., {numbered[-1]} (all are in manifest.json)"


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
    parser.add_argument("--strict", action="store_true", help="chat: stop at the first conversation that is refused")
    parser.add_argument(
        "--max_refused", type=at_least(0), default=1000, help="chat: pass over so many of a split (%(default)s)"
    )
    parser.add_argument("--max_documents", type=int, help="take only the first so many")
    parser.add_argument("--valid_fraction", type=float, default=0.0, help="share of documents held out as `valid`")
    parser.add_argument("--valid_documents", type=int, default=0, help="or their number")
    parser.add_argument("--valid_src", type=Path, help="or where the valid split comes from")
    group = parser.add_argument_group("images")
    group.add_argument(
        "--images", metavar="SRC", help=f"a folder with a folder per class, an .npz, or {GLYPHS!r}, which are drawn"
    )
    group.add_argument("--size", type=int, help=f"side in pixels; an .npz has its own, glyphs {GLYPH_SIZE}")
    group.add_argument("--label", default="labels", help=".npz: which of its arrays holds the labels (%(default)s)")
    group.add_argument("--characters", default=CHARACTERS, help="glyphs: the classes (%(default)s)")
    group.add_argument("--seed", type=at_least(0), default=0, help="glyphs: of all that varies (%(default)s)")
    return parser


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """The command: reads, tokenises, writes, and prints where the data set lies."""
    arguments = _parser().parse_args(argv)
    check_out(arguments.out, arguments.overwrite)
    if arguments.images is not None:
        _build_images(arguments)
        return
    if arguments.kind is None or arguments.src is None:
        raise UserError("give --kind and --src for text, or --images for images")
    _check_options(arguments)
    splits = _splits(arguments)
    tokenizer = _tokenizer(arguments, splits["train"])
    manifest = text_building.build(
        splits,
        tokenizer,
        arguments.out,
        kind=arguments.kind,
        source=_source(arguments),
        max_refused=0 if arguments.strict else arguments.max_refused,
        overwrite=arguments.overwrite,
        progress=_print,
    )
    counts = ", ".join(f"{name} {split['tokens']:,} tokens" for name, split in manifest["splits"].items())
    print(f"{arguments.out}: {counts}, tokenizer {manifest['tokenizer']}")


if __name__ == "__main__":
    main()
