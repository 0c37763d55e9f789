"""Lets a target write text of its own to train draft heads on: conversations of its own, or continuations of documents.

    python -m scripts.continue_dataset --target DIR --out DIR [--prompts FILE.jsonl] [--documents N]
        [--valid_documents 32] [--prompt_tokens 64] [--new_tokens 512] [--prompt_temperature 1] [--temperature 0.7]
        [--max_repetition 0.3] [--keep_unended] [--minutes M] [--rows 32] [--seed 0] [--drafter DIR_OR_NAME]
        [--mesh tensor=4] [--overwrite]
    python -m scripts.continue_dataset --target DIR --data DATASET --out DIR [--documents 512] [--valid_documents 32]
        [--prompt_tokens 64] [--new_tokens 192] [--temperature 0] [--rows 32] [--seed 0] [--drafter DIR_OR_NAME]
        [--mesh tensor=4]

A head is of use where it guesses what the target will say, not what the author of a text said. The first form needs no
data: a target with a chat template completes an empty user's turn, answers what it wrote, and the answer is marked as
label; `--prompts` gives it questions instead, one per line, as `{"prompt": ...}` or `{"messages": [...]}`, all of
which are asked, where otherwise 512 documents are made. Prompts that
it does not end are left out, those that say what an earlier one says, and answers that do not end or that loop; 16
batches in a row of which nothing is left end the run. Several temperatures, `--temperature 0,0.7`, take turns.
`--minutes` ends earlier, with the documents that are finished then. A run that was killed goes on where it was when it
is asked again.

With `--data`, a directory or `tfds:NAME`, every document of the result is a window of one of the data set's and the
target's continuation, which alone is label; windows for `train` and `valid` come from the data set's own splits.
Medusa's self-distillation samples at temperature 0.3; 0 is for greedy decoding. Train on either with
`objective.labels = 'assistant'`.
"""

import argparse
import collections
import functools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from decoding.drafters.registry import load_drafter
from decoding.sampling import Sampling
from models import command_line, processes
from models.command_line import add_distributed, add_mesh, at_least, numbers
from models.errors import UserError, exit_on_user_error
from models.formats.target import Target, load_target
from models.formats.tokenizer import Message
from models.sharding import parse_mesh
from train.data import texts as data
from train.data.building import check_out
from train.data.continuations import continuations
from train.data.self_chat import ChatSettings, SelfChat
from train.data.text_building import write_dataset
from train.data.text_sources import read_prompts

# Options of one form alone, with their defaults there; None is no default.
_CHAT_ONLY = {"prompts": None, "prompt_temperature": 1.0, "max_repetition": 0.3, "keep_unended": False, "minutes": None}
_DOCUMENTS = 512
_DEFAULTS = {"chat": {"new_tokens": 512, "temperature": [0.7]}, "data": {"new_tokens": 192, "temperature": [0.0]}}


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """The command: decodes, writes, and prints where the data set lies."""
    arguments = _parser().parse_args(argv)
    form = "chat" if arguments.data is None else "data"
    if arguments.prompts is not None and arguments.prompt_temperature is not None:
        raise UserError("--prompts has no use for --prompt_temperature: the target writes none")
    for name, default in {**_CHAT_ONLY, **_DEFAULTS[form]}.items():
        if form == "data" and name in _CHAT_ONLY and getattr(arguments, name) is not None:
            raise UserError(f"--data has no use for --{name}")
        if getattr(arguments, name) is None:
            setattr(arguments, name, default)
    for temperature in (*arguments.temperature, *([arguments.prompt_temperature] if form == "chat" else [])):
        Sampling(temperature)  # Refuses what no text can be drawn at, before anything is written.
    if form == "chat" and not 0 <= arguments.max_repetition <= 1:
        raise UserError(f"--max_repetition must lie in 0..1, got {arguments.max_repetition}")
    if arguments.minutes is not None and not arguments.minutes > 0:
        raise UserError(f"--minutes must be above 0, got {arguments.minutes}")
    processes.start(arguments.distributed)
    # Said before the work, which takes minutes; what writes the directory holds to it again.
    check_out(arguments.out, arguments.overwrite)
    target = load_target(arguments.target, mesh=parse_mesh(arguments.mesh) if arguments.mesh else None)
    if target.tokenizer is None:
        raise UserError(f"{arguments.target} has no tokenizer")
    counts = write_chats(target, arguments) if form == "chat" else write_continuations(target, arguments)
    for name, count in counts.items():
        documents, tokens, labels = count.values()
        print(f"{arguments.out}: {name} {documents} documents, {tokens:,} tokens, {labels:,} of them labels")


def write_chats(target: Target, arguments: argparse.Namespace) -> dict[str, dict[str, int]]:
    """Conversations that the target writes; the first ones are held out. Returns counts by split."""
    tokenizer = target.tokenizer
    assert tokenizer is not None
    settings = ChatSettings(
        prompt_tokens=arguments.prompt_tokens,
        new_tokens=arguments.new_tokens,
        prompt_temperature=arguments.prompt_temperature,
        temperatures=tuple(arguments.temperature),
        max_repetition=arguments.max_repetition,
        keep_unended=arguments.keep_unended,
        rows=arguments.rows,
        seed=arguments.seed,
    )
    prompts: list[Sequence[Message]] | None = None
    if arguments.prompts is not None:
        prompts = [document.messages for document in read_prompts(arguments.prompts)]
    held_out = arguments.valid_documents
    if prompts is not None and len(prompts) <= held_out:
        raise UserError(
            f"{arguments.prompts} has {len(prompts)} prompts, and {held_out} answers are held out: give a smaller "
            "--valid_documents"
        )
    if arguments.documents is None:  # Every prompt that is given is meant to be asked.
        arguments.documents = _DOCUMENTS if prompts is None else len(prompts) - held_out
    drafter, params = load_drafter(arguments.drafter, target)
    rounds = arguments.out.absolute().with_name(f".{arguments.out.absolute().name}.rounds.jsonl")
    rounds.parent.mkdir(parents=True, exist_ok=True)
    chat = SelfChat(target, settings, rounds, prompts=prompts, drafter=drafter, drafter_params=params, progress=_print)
    chat.write(held_out + arguments.documents, 60 * (arguments.minutes or float("inf")))
    if len(chat.documents) <= held_out:
        raise UserError(
            f"only {len(chat.documents)} documents are finished, and {held_out} of them are held out: give more time, "
            f"prompts or --new_tokens, or a smaller --valid_documents ({_told(chat.counts)})"
        )
    last = min(len(chat.documents), held_out + arguments.documents)
    numbered = {"valid": range(held_out), "train": range(held_out, last)}
    splits = {name: indices for name, indices in numbered.items() if indices}
    counts = {name: _counted([chat.document(i) for i in indices]) for name, indices in splits.items()}
    statistics = chat.statistics()
    manifest = {
        "kind": "self-chat",
        "source": {**_source(arguments), **statistics},
        "chat_template": tokenizer.chat_template,
        "splits": counts,
    }

    def write() -> None:
        documents = {name: functools.partial(map, chat.document, indices) for name, indices in splits.items()}
        write_dataset(arguments.out, tokenizer, documents, lambda: manifest, overwrite=arguments.overwrite)
        rounds.unlink()

    processes.on_first(write)
    shares = ", ".join(f"{name.replace('_', '-')} {share:.2f}" for name, share in statistics["repetition"].items())
    print(f"{_told(chat.counts)}; {statistics['tokens_per_second']:,.0f} tokens/s; repetition {shares}")
    return counts


def write_continuations(target: Target, arguments: argparse.Namespace) -> dict[str, dict[str, int]]:
    """Windows of a data set's documents, continued. Returns counts by split."""
    if len(arguments.temperature) > 1:
        raise UserError("--data takes one --temperature")
    arguments.documents = arguments.documents or _DOCUMENTS
    wanted = {"train": arguments.documents, "valid": arguments.valid_documents}
    assert target.tokenizer is not None
    fingerprint = target.tokenizer.fingerprint
    splits = {
        name: data.open_split(arguments.data, name, tokenizer=target.tokenizer, tokenizer_fingerprint=fingerprint)
        for name, count in wanted.items()
        if count
    }
    drafter = load_drafter(arguments.drafter, target)
    counts: dict[str, dict[str, int]] = {name: _counted([]) for name in splits}

    def counted(name: str) -> Iterator[data.Document]:
        for document in continuations(
            target,
            splits[name],
            wanted[name],
            arguments.prompt_tokens,
            arguments.new_tokens,
            arguments.temperature[0],
            arguments.rows,
            arguments.seed,
            drafter,
            _print,
        ):
            counts[name] = {key: counts[name][key] + more for key, more in _counted([document]).items()}
            yield document

    if not processes.is_first():  # It decodes its share of what the first one writes.
        for name in splits:
            collections.deque(counted(name), maxlen=0)
        return counts
    template = splits["train"].manifest.get("chat_template")
    write_dataset(
        arguments.out,
        target.tokenizer.with_chat_template(template) if template else target.tokenizer,
        {name: functools.partial(counted, name) for name in splits},
        lambda: {"kind": "continuations", "source": _source(arguments), "chat_template": template, "splits": counts},
        overwrite=arguments.overwrite,
    )
    return counts


def _counted(documents: Sequence[data.Document]) -> dict[str, int]:
    return {
        "documents": len(documents),
        "tokens": sum(len(document["tokens"]) for document in documents),
        "labels": sum(int(document["mask"].sum()) for document in documents),
    }


def _source(arguments: argparse.Namespace) -> dict[str, Any]:
    told = {name: value for name, value in vars(arguments).items() if name not in ("out", "overwrite", "distributed")}
    return json.loads(json.dumps(told, default=str))


def _told(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in sorted(counts.items()))


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = command_line.parser("scripts.continue_dataset", __doc__)
    parser.add_argument("--target", required=True, type=Path, help="target directory")
    parser.add_argument("--data", help="data set whose documents are continued, instead of conversations")
    parser.add_argument("--prompts", type=Path, help="JSONL of prompts, instead of the target's own")
    parser.add_argument("--out", required=True, type=Path, help="the directory to write")
    parser.add_argument("--documents", type=at_least(1), help="how many to make (512; --prompts: one for each)")
    parser.add_argument("--valid_documents", type=at_least(0), default=32, help="as many that are held out")
    parser.add_argument("--prompt_tokens", type=at_least(1), default=64, help="most tokens of a prompt, or of a window")
    parser.add_argument("--new_tokens", type=at_least(1), help="most tokens that the target adds (512; --data: 192)")
    parser.add_argument("--prompt_temperature", type=float, help="of the target's own prompts (1)")
    parser.add_argument("--temperature", type=numbers(float), help="0 is greedy; several take turns (0.7; --data: 0)")
    parser.add_argument("--max_repetition", type=float, help="largest share of repeated runs of 4 tokens (0.3)")
    parser.add_argument("--keep_unended", action="store_const", const=True, help="keep the beginnings of such answers")
    parser.add_argument("--minutes", type=float, help="end after so many, with what is finished")
    parser.add_argument("--rows", type=at_least(1), default=32, help="documents decoded together")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of windows and draws")
    parser.add_argument("--drafter", default="none", help="speeds up decoding: a drafter directory or a bare name")
    parser.add_argument("--overwrite", action="store_true", help="replace a data set that is there")
    add_mesh(parser)
    add_distributed(parser)
    return parser


if __name__ == "__main__":
    main()
