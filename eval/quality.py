"""How good a target is, alone and with coprocessors: perplexity behind latents, answers that match, right choices.

    python -m eval.quality --target DIR --out DIR [--coprocessors DIR,DIR] [--data DIR [--split valid] | --text FILE]
        [--problems FILE [--shots 8] [--examples FILE]] [--choices FILE ...]

What is asked for is measured, of the target as it is first and then with each coprocessor; the baselines (`pause`,
`soft`) are directories like the others. Nothing here needs a coprocessor.

- `--data` or `--text`: perplexity by offset, 1 to `--ahead` tokens behind points spread evenly over rows of text. At
  every point latents stand and true tokens follow; what is reported is the change against the target as it is, on the
  same tokens, of chats with `--labels assistant` on those of the answers; and of each coprocessor against those before
  it, so that what a further latent does has an interval of its own.
- `--problems`: GSM8K's form, questions whose answers end with `#### N`. Answers are written greedily behind solved
  examples; right is the number behind `####` (*marked*), or, where an answer has no such mark, the last one (*last*).
- `--choices`: multiple choice. The likeliest choice is taken, by the sum of its tokens' log-likelihoods (*plain*) and
  by that over its bytes (*normalised*).

With `--augment_lag N` the coprocessor has not read the last N tokens before its latents, everywhere; with
`--augment_every N` answers have latents again after N tokens each, where the other two have them once.

Intervals are 95%: Wilson's of shares, bootstrap over rows of text of perplexity. Writes `results.json` and
`report.html`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from decoding.augment import Augment, refuse_times_without
from decoding.coprocessors import Coprocessor, load_coprocessor
from decoding.generate import check_context
from eval.measure.intervals import mean_interval
from eval.measure.progress import Progress
from eval.report.page import keep_results, write_results
from eval.report.quality import form, print_tables, write_report
from eval.text.behind import ByOffset, by_offset
from eval.text.metrics import rows_of_text
from eval.text.results import describe_target
from eval.text.tasks import (
    NEXT,
    choice_pairs,
    choice_scores,
    exact_match,
    likeliest,
    problem_prompts,
    read_choices,
    read_problems,
    split_shots,
)
from models import command_line, processes, schema
from models.command_line import add_distributed, add_mesh, add_overwrite, at_least, listed
from models.coprocessor import init_params
from models.errors import UserError, exit_on_user_error
from models.formats.target import Target, load_target
from models.sharding import parse_mesh

BASE = "target"
SAMPLES = 3  # Answers that the report shows.
_NOT_RECORDED = ("out", "overwrite", "distributed")


class Contender(NamedTuple):
    """The target as it is, or with a coprocessor, and what people call it."""

    label: str
    network: Coprocessor | None = None
    path: str | None = None


def contenders(target: Target, directories: Sequence[str]) -> list[Contender]:
    """The target as it is, then with each coprocessor.

    Raises:
      UserError: no such directory, one that is named twice, or a coprocessor of another target.
    """
    loaded = [load_coprocessor(directory, target) for directory in directories]
    for network in loaded:
        network.config.check_target(target.config)
    labels = []
    for network in loaded:
        kind, *apart = form(dataclasses.asdict(network.config)).split(", ")
        labels.append(", ".join([f"{kind} {network.config.num_latents}", *apart]))
    places = [[part for part in Path(path).parts if part != "coprocessor"] for path in directories]
    told, parts = labels, 0
    while len(set(told)) < len(told) and parts < max(map(len, places)):
        parts += 1
        told = [
            f"{label} ({'/'.join(place[-parts:])})" if labels.count(label) > 1 else label
            for label, place in zip(labels, places, strict=True)
        ]
    if twice := [path for label, path in zip(told, directories, strict=True) if told.count(label) > 1]:
        raise UserError(f"--coprocessors names {twice[0]} twice")
    return [Contender(BASE), *map(Contender, told, loaded, directories)]


def wilson(right: Sequence[bool]) -> dict[str, Any]:
    """Right answers, their share, and its 95% interval (Wilson 1927)."""
    total, correct, z = len(right), int(sum(right)), 1.959964
    share = correct / total
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z * (share * (1 - share) / total + z * z / (4 * total * total)) ** 0.5 / (1 + z * z / total)
    return {"correct": correct, "share": share, "interval": [max(0.0, middle - half), min(1.0, middle + half)]}


def against(right: Sequence[bool], base: Sequence[bool]) -> dict[str, Any]:
    """How much larger a share is than the base's on the same questions, with its 95% bootstrap interval."""
    gain = np.asarray(right, float) - np.asarray(base, float)
    return {"gain": float(gain.mean()), "gain_interval": mean_interval(gain)}


# What is asked for is checked first, all of it, and measured then: each of these checks its part and returns the
# function that measures it.


def perplexity(args, target: Target, field: Sequence[Contender], progress) -> Callable[[], dict[str, Any]]:
    """The entry `perplexity` of the results (`eval/report/quality.py` gives the keys)."""
    if args.ahead >= args.length:
        raise UserError(f"--ahead must be less than --length, {args.length}, got {args.ahead}")
    room = target.config.max_position - max(_shift(one) for one in field)
    if args.length > room:
        raise UserError(f"--length must be at most {room}, which latents leave of the context, got {args.length}")
    if args.text and args.labels != "all":
        raise UserError("--labels assistant asks for tokens that a data set marks: give --data, not --text")
    batches = rows_of_text(target, args.data, args.split, args.text, args.length, args.rows)

    def measure() -> dict[str, Any]:
        made: list[dict[str, Any]] = []
        before: list[tuple[str, ByOffset]] = []
        for one in field:
            progress(f"perplexity, {one.label}")
            found = by_offset(target, one.network, batches, args.points, args.ahead, args.labels, args.augment_lag)
            run: dict[str, Any] = {"label": one.label, "perplexity": _plain(found.perplexity)}
            if before:
                base, *others = [{"label": label} | _change(found, than) for label, than in before]
                run |= {key: base[key] for key in ("change", "change_interval")} | {"over": others}
            before.append((one.label, found))
            made.append(run)
        tokens = before[0][1].count.sum(axis=0).tolist()
        return {"offsets": list(range(1, args.ahead + 1)), "tokens": tokens, "runs": made}

    return measure


def _change(found: ByOffset, than: ByOffset) -> dict[str, list]:
    change, interval = found.change(than)
    return {"change": _plain(change), "change_interval": _plain(interval)}


def _plain(values: np.ndarray) -> list:
    """As JSON has them; None where there is no number."""
    plain = values.astype(object)
    plain[np.isnan(values)] = None
    return plain.tolist()


def shares(
    field: Sequence[Contender], ask: Callable[[Contender], Mapping[str, Any]], names: Sequence[str]
) -> list[dict]:
    """Per contender, what was right by each of several counts; and whatever else it answered."""
    made, base = [], None
    for one in field:
        found = ask(one)
        base = base or found
        run: dict[str, Any] = {"label": one.label}
        for name in names:
            run[name] = wilson(found[name]) | ({} if one.network is None else against(found[name], base[name]))
        made.append(run | {name: value for name, value in found.items() if name not in names})
    return made


def problems(args, target: Target, field: Sequence[Contender], progress) -> Callable[[], dict[str, Any]]:
    """The entry `problems`."""
    assert target.tokenizer is not None
    augments: dict[str | None, Augment | None] = {}
    for one in field:
        augment = None if one.network is None else Augment(one.network, args.augment_every, args.augment_lag)
        if augment is not None:
            augment.check(target.config, None)
        augments[one.path] = augment
    examples = read_problems(args.examples) if args.examples else None
    shots, asked = split_shots(read_problems(args.problems), examples, args.shots, args.num)
    prompts = problem_prompts(target.tokenizer, asked, shots, args.chat)
    openings, limits = [target.opening(prompt) for prompt in prompts], [args.max_new_tokens] * len(prompts)
    for augment in augments.values():
        check_context(target.config, openings, limits, augment)

    def ask(one: Contender) -> dict[str, Any]:
        return exact_match(
            target,
            asked,
            prompts,
            augments[one.path],
            stop_texts=() if args.chat else (NEXT,),
            max_new_tokens=args.max_new_tokens,
            batch=args.batch,
            progress=lambda line: progress(f"{one.label}, {line}"),
        )

    def measure() -> dict[str, Any]:
        runs = shares(field, ask, ("marked", "last"))
        samples = [
            {
                "question": problem.question,
                "number": problem.number,
                "answers": [[run["label"], run["answers"][i]] for run in runs],
            }
            for i, problem in enumerate(asked[:SAMPLES])
        ]
        kept = [{name: value for name, value in run.items() if name != "answers"} for run in runs]
        return {"file": args.problems, "questions": len(asked), "shots": len(shots), "runs": kept, "samples": samples}

    return measure


def choices(args, path: str, target: Target, field: Sequence[Contender], progress) -> Callable[[], dict[str, Any]]:
    """An entry of `choices`."""
    shots, asked = split_shots(read_choices(path), None, args.choice_shots, args.num)
    pairs = choice_pairs(target, asked, shots, max(_shift(one) for one in field))

    def ask(one: Contender) -> dict[str, Any]:
        told = lambda line: progress(f"{Path(path).name}, {one.label}, {line}")  # noqa: E731
        scores = choice_scores(target, pairs, one.network, lag=args.augment_lag, batch=args.batch, progress=told)
        return likeliest(asked, scores)

    def measure() -> dict[str, Any]:
        chance = float(np.mean([1 / len(one.choices) for one in asked]))
        runs = shares(field, ask, ("plain", "normalised"))
        return {"file": path, "questions": len(asked), "shots": len(shots), "chance": chance, "runs": runs}

    return measure


def _shift(one: Contender) -> int:
    return one.network.config.shift if one.network else 0


def _describe(one: Contender, target: Target) -> dict[str, Any]:
    if one.network is None:
        return {"label": one.label}
    config = one.network.config
    # As they are learnt: beside joined kernels adapters hold zeros as well.
    learnt = jax.eval_shape(functools.partial(init_params, config, target.config), target.params, jax.random.key(0))
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(learnt))
    return {"label": one.label, "path": one.path, **schema.resolved(config), "parameters": count}


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """The command; see the module's docstring."""
    args = _parser().parse_args(argv)
    if not (args.data or args.text or args.problems or args.choices):
        raise UserError("what to measure? Give --data or --text, --problems, or --choices")
    refuse_times_without(bool(args.coprocessors), args.augment_every, args.augment_lag, "--coprocessors")
    if args.augment_every is not None and not args.problems:
        raise UserError("--augment_every says when latents come again in answers: give --problems too")
    processes.start(args.distributed)
    keep_results(args.out, args.overwrite)
    with Progress() as progress:
        progress(f"loading {args.target}")
        target = load_target(args.target, mesh=parse_mesh(args.mesh) if args.mesh else None)
        if target.tokenizer is None and (args.problems or args.choices):
            raise UserError(f"{args.target} has no tokenizer, which questions need")
        if args.choices:
            target.refuse_encoder("answers --problems alone")
        field = contenders(target, args.coprocessors)
        results: dict[str, Any] = {
            "config": {name: value for name, value in vars(args).items() if name not in _NOT_RECORDED},
            "target": describe_target(target),
            "contenders": [_describe(one, target) for one in field],
        }
        measured: dict[str, Callable[[], dict[str, Any]]] = {}
        if args.problems:
            measured["problems"] = problems(args, target, field, progress)
        multiple = [choices(args, path, target, field, progress) for path in args.choices]
        if args.data or args.text:
            measured["perplexity"] = perplexity(args, target, field, progress)
        results |= {name: measure() for name, measure in measured.items()}
        if multiple:
            results["choices"] = [measure() for measure in multiple]
        write_results(results, write_report, args.out)
    print_tables(results)
    print(f"\nwrote {args.out}/results.json and {args.out}/report.html")


def _parser():
    parser = command_line.parser("eval.quality", __doc__)
    parser.add_argument("--target", required=True, help="target directory")
    parser.add_argument("--coprocessors", type=listed, default=[], metavar="DIR,...", help="coprocessor directories")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--data", help="data set directory, or tfds:NAME, for perplexity")
    source.add_argument("--text", help="text file to measure perplexity on instead")
    parser.add_argument("--split", default="valid", help="its split")
    parser.add_argument("--length", type=at_least(2), default=256, help="tokens per row of text")
    parser.add_argument("--rows", type=at_least(1), default=64, help="rows of text")
    parser.add_argument("--points", type=at_least(1), default=32, help="points per row, spread evenly")
    parser.add_argument("--ahead", type=at_least(1), default=32, help="offsets behind a point")
    parser.add_argument("--labels", choices=("all", "assistant"), default="all", help="tokens of --data that count")
    parser.add_argument("--problems", metavar="FILE", help="questions whose answers end with '#### N' (GSM8K)")
    parser.add_argument("--examples", metavar="FILE", help="solved ones to show (default: the first of --problems)")
    parser.add_argument("--shots", type=at_least(0), default=8, help="how many of them")
    parser.add_argument("--chat", action="store_true", help="put problems in the tokenizer's chat template")
    parser.add_argument("--max_new_tokens", type=at_least(1), default=256, help="most tokens of an answer")
    parser.add_argument("--choices", type=listed, default=[], metavar="FILE,...", help="multiple-choice questions")
    parser.add_argument("--choice_shots", type=at_least(0), default=0, help="the first so many of a file are shown")
    parser.add_argument("--num", type=at_least(1), help="questions of each file, spread evenly (default: all)")
    parser.add_argument("--batch", type=at_least(1), default=8, help="questions or choices at a time")
    parser.add_argument(
        "--augment_every", type=at_least(1), help="in answers, latents again after so many tokens (default: once)"
    )
    parser.add_argument("--augment_lag", type=at_least(0), default=0, help="so many tokens before latents are unread")
    parser.add_argument("--out", required=True, help="directory for results.json and report.html")
    add_overwrite(parser)
    add_mesh(parser)
    add_distributed(parser)
    return parser


if __name__ == "__main__":
    main()
