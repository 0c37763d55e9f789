"""Puts first turns of several files of questions into one, as many of each, for comparisons of drafters.

    python -m scripts.questions --src mt_bench=question.jsonl gsm8k=test.jsonl humaneval=HumanEval.jsonl.gz \
        --each 32 --out questions.jsonl

Files have any of the forms of `eval/text/prompts.py`. Of each the questions are taken at even distances, and two of
each come after two of another, so that every other row, by which `eval.acceptance` chooses trees, is of every kind too.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from eval.report.files import make_directory, write_text
from eval.text.prompts import read_questions, spread
from models import command_line
from models.command_line import add_overwrite, at_least, keep_files, like
from models.errors import UserError, exit_on_user_error


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """The command; see the module's docstring."""
    parser = command_line.parser("scripts.questions", __doc__)
    named = like(r"([^=]+)=(.+)", "NAME=FILE", lambda parts: (parts[0], parts[1]))
    parser.add_argument("--src", type=named, nargs="+", required=True, help="a category and its file, NAME=FILE")
    parser.add_argument("--each", type=at_least(1), default=32, help="questions of a file")
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    add_overwrite(parser)
    args = parser.parse_args(argv)
    keep_files([args.out], args.overwrite)
    kinds = []
    for name, path in args.src:
        questions = read_questions(path)
        if len(questions) < args.each:
            raise UserError(f"{path} has {len(questions)} questions, fewer than the {args.each} of --each")
        kinds.append([(name, question.turns[0]) for question in spread(questions, args.each)])
    chosen = [row for first in range(0, args.each, 2) for kind in kinds for row in kind[first : first + 2]]
    rows = ({"question_id": n, "category": name, "turns": [text]} for n, (name, text) in enumerate(chosen))
    make_directory(args.out.parent)
    write_text("".join(json.dumps(row) + "\n" for row in rows), args.out)
    print(f"wrote {len(chosen)} questions to {args.out}")


if __name__ == "__main__":
    main()
