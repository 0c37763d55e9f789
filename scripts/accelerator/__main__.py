"""What scripts/accelerator.sh runs: everything that wants an accelerator, in order of worth, results as they come.

    python -m scripts.accelerator [--out DIR] [--minutes 8] [--parts NAME,...] [--shape llama3-8b|DIR] [--tiny]
        [--together 3] [--target DIR] [--questions FILE.jsonl] [--cache DIR] [--back DIR]

    correctness  attention's kernel with its slopes beside the dense path; every drafter's text beside plain decoding's
                 in float64 and bfloat16; chi-square at batch 1 and 16
    plain        bandwidth, rows, plain decoding
    replay       loop efficiency for 1 to 128 rows, by an oracle
    drafters     a step of every drafter and its parts
    peers        Hugging Face's generate with a dynamic and a static cache, each in turns with plain decoding
    growth       steps as contexts grow to 32k and batches to 64
    training     training steps on random tokens, their model-FLOP utilisation and memory
    images       VAR of 30 and of 16 layers, and of 16 and of 8: seconds of compilation and images/s, beside PyTorch's
    coprocessor  what its training step costs; LoRA, soft embeddings and pause tokens for a chat model
    smollm2      heads for a chat model (`python -m scripts.accelerator.smollm2`); rehearsed where there is no --target

All of it takes longer than the default of 8 minutes: what there is time for is done, and `--parts` names the rest for
another time.

`OUT/parts.json` says what became of every part, `OUT/*.json` hold results and `OUT/*.log` what was said; `OUT/back`, or
`--back`, holds all of it in one archive, made anew after every part. A part that fails, lacks a package or runs out of
time stops no other. `--tiny` goes through the same with shapes that a CPU has done in minutes.
"""

import argparse
import datetime
import itertools
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path

import jax

from eval.speed import check_shape
from models import command_line
from models.command_line import at_least, listed, positive
from models.errors import UserError, exit_on_user_error
from scripts.accelerator.job import Job, end_when_told
from scripts.accelerator.parts import PARTS, QUEUED, Sizes

_PATIENCE = 10  # Limits are for accelerators.
KEPT = (".json", ".jsonl", ".html", ".log")


def pack(out: Path, back: Path) -> None:
    """All that is small, in one archive: whole or not at all, whenever this is ended."""
    back.mkdir(parents=True, exist_ok=True)
    partial = back / ".everything"
    with tarfile.open(partial, "w:gz") as archive:
        for path in sorted(out.rglob("*")):
            inside = path.relative_to(out)
            if path.suffix in KEPT and path.is_file() and not {"back", "cache", "rehearsal", "chats"} & {*inside.parts}:
                archive.add(path, str(inside))
    os.replace(partial, back / "everything.tar.gz")


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """The command; see the module's docstring."""
    args = _parser().parse_args(argv)
    for name in args.parts:
        if name not in PARTS:
            raise UserError(f"there is no part {name!r}, only {', '.join(PARTS)}")
    for path in (args.target, args.questions):
        if path is not None and not path.exists():
            raise UserError(f"there is no {path}")
    check_shape(args.shape)
    args.out = args.out or Path("runs") / f"accelerator-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    args.out.mkdir(parents=True, exist_ok=True)
    if any(args.out.iterdir()):
        raise UserError(f"{args.out} is not empty: choose a new directory")
    args.cache, args.back = args.cache or args.out / "cache", args.back or args.out / "back"
    # The parts have the environment as it was; this process must not take the device's memory from them.
    jax.config.update("jax_platforms", "cpu")
    end_when_told()
    job = Job(args.out, args.minutes, args.cache, lambda: pack(args.out, args.back))
    sizes = Sizes.of(args.shape, args.tiny, args.rounds)
    for queued, names in itertools.groupby(args.parts, QUEUED.__contains__):
        if queued:
            groups = [group for name in names for group in PARTS[name](args, sizes, job.left)]
            job.run([part for parts, _ in groups for part in parts], job.left, args.together)
        else:
            for name in names:
                for parts, seconds in PARTS[name](args, sizes, job.left):
                    job.run(parts, seconds * (_PATIENCE if args.tiny else 1))
    wrong = [name for name, part in job.parts.items() if not part["state"].startswith("ok")]
    print(f"finished; {args.out} has {len(job.parts)} parts, not ok: {', '.join(wrong) or 'none'}")


def _parser() -> argparse.ArgumentParser:
    parser = command_line.parser("scripts.accelerator", __doc__)
    parser.add_argument("--out", type=Path, help="a new or empty directory for everything (runs/accelerator-DATE)")
    parser.add_argument("--minutes", type=positive, default=8.0, help="after which all ends")
    parser.add_argument("--parts", type=listed, default=",".join(PARTS), help="comma-separated, in this order")
    parser.add_argument("--shape", default="llama3-8b", help="as of eval.speed, of what is timed")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to see that all of it works")
    parser.add_argument("--rounds", type=at_least(1), default=5, help="samples of each timing")
    parser.add_argument("--together", type=at_least(1), default=3, help="timed parts that compile side by side")
    parser.add_argument("--target", type=Path, help="of the part smollm2: a target directory with a chat template")
    parser.add_argument("--questions", type=Path, help="of the part smollm2: held-out questions")
    parser.add_argument("--cache", type=Path, help="directory of compiled programs (OUT/cache)")
    parser.add_argument("--back", type=Path, help="directory for what is worth carrying away (OUT/back)")
    return parser


if __name__ == "__main__":
    main()
