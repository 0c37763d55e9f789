"""Lets a target continue the documents of a data set: text of its own to train draft heads on (self-distillation).

    python -m scripts.continue_dataset --target DIR --data DATASET --out DIR [--documents 512] [--valid_documents 32]
        [--prompt_tokens 64] [--new_tokens 192] [--temperature 0] [--rows 32] [--seed 0] [--overwrite]

Windows for `train` and `valid` come from the data set's own splits. A head is of use where it guesses what the target
will say, not what the author of a text said. Every document of the result is a window of a training document and the
target's continuation; the continuation alone is marked as label (`objective.labels = 'assistant'`). Medusa's
self-distillation samples at temperature 0.3; 0 is for greedy decoding.
"""

import argparse
import functools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from models import command_line
from models.command_line import at_least
from models.errors import UserError, exit_on_user_error
from models.formats.target import load_target
from train.data import texts as data
from train.data.continuations import continuations
from train.data.text_building import write_dataset


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """The command: decodes, writes, and prints where the data set lies."""
    arguments = _parser().parse_args(argv)
    target = load_target(arguments.target)
    if target.tokenizer is None:
        raise UserError(f"{arguments.target} has no tokenizer")
    wanted = {"train": arguments.documents, "valid": arguments.valid_documents}
    splits = {
        name: data.open_split(arguments.data, name, tokenizer_fingerprint=target.tokenizer.fingerprint)
        for name, count in wanted.items()
        if count
    }
    counts = {name: {"documents": 0, "tokens": 0, "labels": 0} for name in splits}
    settings = (arguments.prompt_tokens, arguments.new_tokens, arguments.temperature, arguments.rows, arguments.seed)

    def counted(name: str) -> Iterator[data.Document]:
        for document in continuations(target, splits[name], wanted[name], *settings, progress=_print):
            counts[name]["documents"] += 1
            counts[name]["tokens"] += len(document["tokens"])
            counts[name]["labels"] += int(document["mask"].sum())
            yield document

    template = splits["train"].manifest.get("chat_template")
    source = {name: str(value) for name, value in vars(arguments).items() if name not in ("out", "overwrite")}
    write_dataset(
        arguments.out,
        target.tokenizer.with_chat_template(template) if template else target.tokenizer,
        {name: functools.partial(counted, name) for name in splits},
        lambda: {"kind": "continuations", "source": source, "chat_template": template, "splits": counts},
        overwrite=arguments.overwrite,
    )
    for name, count in counts.items():
        documents, tokens, labels = count.values()
        print(f"{arguments.out}: {name} {documents} documents, {tokens:,} tokens, {labels:,} of them labels")


def _print(line: str) -> None:
    print(line, file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = command_line.parser("scripts.continue_dataset", __doc__)
    parser.add_argument("--target", required=True, type=Path, help="target directory")
    parser.add_argument("--data", required=True, help="data set whose training documents are continued")
    parser.add_argument("--out", required=True, type=Path, help="the directory to write")
    parser.add_argument("--documents", type=at_least(1), default=512, help="how many to make")
    parser.add_argument("--valid_documents", type=at_least(0), default=32, help="as many from held-out ones")
    parser.add_argument("--prompt_tokens", type=at_least(1), default=64, help="tokens taken from a document")
    parser.add_argument("--new_tokens", type=at_least(1), default=192, help="tokens that the target adds")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--rows", type=at_least(1), default=32, help="documents decoded together")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of windows and draws")
    parser.add_argument("--overwrite", action="store_true", help="replace a data set that is there")
    return parser


if __name__ == "__main__":
    main()
