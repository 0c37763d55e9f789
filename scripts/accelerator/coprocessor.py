"""What a training step of a coprocessor costs beside an ordinary one, by the clock and by count.

    python -m scripts.accelerator.coprocessor [--shape small|110m|llama3-1b|...] [--kinds full,lora,pause] [--latents 8]
        [--places 16] [--ahead 16] [--batch_size 4] [--length 256] [--rounds 5] [--remat none] --out FILE.json

The trainer's own step on random tokens and weights, of coprocessors and of a language model of the target's shape on
rows of the same length, in turns. Per kind the results have `step` and `scratch`, seconds and memory of temporaries
over the language model's, and `counted`, tokens' passes through the target over its three per token
(`CoprocessorTraining.forward_tokens`). Seconds are the clock's on an accelerator; on CPUs those of all cores, which
neighbours change less.
"""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from eval.measure import turns
from eval.measure.environment import describe_environment
from eval.report.files import write_json
from eval.speed import SHAPES
from models import command_line
from models.command_line import at_least, listed
from models.errors import UserError, exit_on_user_error
from scripts.accelerator.steps import GIB, Job, Running

ORDINARY = "language model"
KINDS = ("full", "scratch", "lora", "soft", "pause")
_SMALL = dataclasses.replace(
    SHAPES["110m"],
    vocab_size=1024,
    width=256,
    num_layers=8,
    num_heads=4,
    num_kv_heads=2,
    mlp_width=704,
    max_position=4096,
)
_SHAPES = {"small": _SMALL, **SHAPES}


def measure(args: Any) -> dict[str, dict[str, float]]:
    """Per kind, the language model first, what the module's docstring says."""
    jobs = {ORDINARY: Job(args.shape, args.batch_size, args.length, None)}
    for kind in args.kinds:
        section = {"kind": kind, "num_latents": args.latents}
        objective = {"name": "coprocessor", "coprocessor": section, "places": args.places, "ahead": args.ahead}
        jobs[kind] = Job(args.shape, args.batch_size, args.length, objective)
    runs = {
        name: Running.of(job, _SHAPES[args.shape], args.batch_size, args.length, remat=args.remat)
        for name, job in jobs.items()
    }
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    with turns.alone():
        for _ in range(args.rounds + 1):
            for name, running in runs.items():
                began = clock()
                running.run()
                seconds[name].append(clock() - began)
    found = {}
    for name, running in runs.items():
        config: Any = running.plan.config.objective
        found[name] = {
            "seconds": float(np.median(seconds[name][1:])),
            "scratch_gib": running.step.memory_analysis().temp_size_in_bytes / GIB,
            "tokens": 3 * args.length if name == ORDINARY else config.forward_tokens(args.length),
        }
    ordinary = found[ORDINARY]
    names = {"step": "seconds", "scratch": "scratch_gib", "counted": "tokens"}
    return {name: one | {key: one[of] / ordinary[of] for key, of in names.items()} for name, one in found.items()}


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """The command; see the module's docstring."""
    parser = command_line.parser("scripts.accelerator.coprocessor", __doc__)
    parser.add_argument("--shape", choices=list(_SHAPES), default="small", help="of the target")
    parser.add_argument("--kinds", type=listed, default="full,lora,pause", help="comma-separated: " + ", ".join(KINDS))
    parser.add_argument("--latents", type=at_least(1), default=8, help="latents at a place")
    parser.add_argument("--places", type=at_least(1), default=16, help="places of a row")
    parser.add_argument("--ahead", type=at_least(1), default=16, help="tokens predicted behind each")
    parser.add_argument("--batch_size", type=at_least(1), default=4, help="rows of a step")
    parser.add_argument("--length", type=at_least(2), default=256, help="tokens of a row")
    parser.add_argument("--rounds", type=at_least(1), default=5, help="steps of each that are timed")
    parser.add_argument(
        "--remat", choices=("none", "products", "layers"), default="none", help="what is computed again"
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args(argv)
    for kind in args.kinds:
        if kind not in KINDS:
            raise UserError(f"there is no kind {kind!r}, only {', '.join(KINDS)}")
    turns.join()
    found = measure(args)
    config = {name: value for name, value in vars(args).items() if name != "out"}
    write_json({"environment": describe_environment(), "config": config, "steps": found}, args.out)
    for name, one in found.items():
        print(
            f"{name}: {one['step']:.2f} times an ordinary step, {one['counted']:.2f} by count; "
            f"temporaries {one['scratch']:.2f} times, {one['scratch_gib']:.2f} GiB"
        )


if __name__ == "__main__":
    main()
