"""Writes chats whose answers are the first sentences of stories, to learn and to measure short answers to long prompts.

    python -m scripts.openings --src train.txt --out chats.jsonl [--separator '<|endoftext|>'] [--max_documents N]
    python -m scripts.build_dataset --kind chat --src chats.jsonl --valid_documents 256 \
        --train_tokenizer 1024 --chat_template chats.jinja --out data/openings

A chat's prompt is a story without its first sentence, its answer that sentence: who it is about and what happens can be
read off the rest. Beside the chats a template is written that says no more than the texts.
"""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path

from eval.report.files import make_directory, write_text
from models import command_line
from models.command_line import add_overwrite, at_least, keep_files
from models.errors import UserError, exit_on_user_error
from train.data.text_sources import END_OF_TEXT, read_text

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ message.content }}\n\n{% endif %}{% endfor %}"
)
_SENTENCE = re.compile(r"(.+?[.!?][\"']?)\s+(\S.*)", re.DOTALL)


def opening(text: str) -> tuple[str, str] | None:
    """(rest, first sentence) of a story; None where it has only one."""
    found = _SENTENCE.fullmatch(text.strip())
    return None if found is None else (found[2], found[1])


def _parser() -> argparse.ArgumentParser:
    parser = command_line.parser("scripts.openings", __doc__)
    parser.add_argument("--src", type=Path, required=True, help="stories in one file")
    parser.add_argument("--separator", default=END_OF_TEXT, help="what parts them")
    parser.add_argument("--max_documents", type=at_least(1), help="take only the first so many")
    parser.add_argument("--most_characters", type=at_least(1), default=900, help="of a story; longer ones are left out")
    parser.add_argument("--out", type=Path, required=True, help="file to write; the template gets the ending .jinja")
    add_overwrite(parser)
    return parser


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """The command; see the module's docstring."""
    args = _parser().parse_args(argv)
    template = args.out.with_suffix(".jinja")
    keep_files([args.out, template], args.overwrite)
    stories = (document.content for document in read_text(args.src, args.separator))
    parts = (opening(story) for story in stories if len(story) <= args.most_characters)
    lines: list[str] = []
    for part in parts:
        if part is None:
            continue
        turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), part, strict=True)]
        lines.append(json.dumps({"messages": turns}, ensure_ascii=False))
        if len(lines) == args.max_documents:
            break
    if not lines:
        raise UserError(f"{args.src} holds no story of two sentences and at most {args.most_characters} characters")
    make_directory(args.out.parent)
    # The chats last: where they are, all is.
    write_text(TEMPLATE, template)
    write_text("\n".join(lines) + "\n", args.out)
    print(f"{args.out}: {len(lines):,} chats; {template}")


if __name__ == "__main__":
    main()
