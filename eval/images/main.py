"""Judges image models: VAR alone, and pairs that collaborate (CoDe), by quality, speed and memory.

    python -m eval.images.main --tokenizer DIR --var DIR --refiner DIR --draft_scales 2,3,4 --data DIR \
        (--features CLASSIFIER_DIR | --weights pt_inception-2015-12-05-6726825d.pth) --out DIR
        [--refiners 3=DIR ...] [--drafters 3=DIR ...] [--images 1000] [--batch_size 50] [--grid 12x4]

`--var` is the larger model, `--refiner` the smaller one; `--draft_scales` are the numbers N of scales that the larger
one makes when the two collaborate as they are. Models tuned for some N go to `--drafters` and `--refiners`. Writes
`results.json`, `report.html`, `samples.png` and `samples/*.npz` to `--out`.
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from decoding.images.generate import DECODED_AT_ONCE, Tokenizer
from decoding.images.scales import Drawing
from eval.images import memory
from eval.images.benchmark import Made, Requests, benchmark, rates, speedups
from eval.images.contenders import Contender, Model, contenders, load_tokenizer, tokenizer_record
from eval.images.features import load_classifier, load_inception
from eval.images.flags import add_drawing, drawings
from eval.images.pictures import build_up, png, tiled
from eval.images.quality import Judge
from eval.measure.progress import Progress
from eval.report.files import make_directory, write_bytes
from eval.report.images import Pictures, print_table, write_report
from eval.report.page import keep_results, write_results
from models import command_line, processes
from models.command_line import add_distributed, add_overwrite, at_least, like, numbers
from models.errors import UserError, exit_on_user_error
from train.data.images import Images, open_images


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The whole evaluation.

    Returns:
      What it wrote to `results.json`.

    Raises:
      UserError: something that the arguments name is missing or does not fit.
    """
    keep_results(args.out, args.overwrite)
    with Progress() as progress:
        progress("loading")
        tokenizer, models, field = _load(args)
        side = tokenizer.config.image_size
        splits = [open_images(args.data, split, size=side) for split in (args.split, args.valid_split)]
        classes = _class_names(splits[0], models)
        extractor = load_inception(args.weights) if args.weights else load_classifier(args.features)
        out = make_directory(args.out)
        make_directory(out / "samples")
        requests, shown = _requests(args, len(classes))
        parts = _memory(tokenizer, field, args, progress)
        judge = Judge(extractor, splits[0], args.reference_images, args.batch_size, progress)
        made = benchmark(tokenizer, field, requests, out / "samples", progress)
        runs, notes = processes.on_first(lambda: _runs(field, made, parts, judge, requests))
        results = {
            "config": {
                name: value
                for name, value in vars(args).items()
                if value not in (None, []) and name not in _NOT_RECORDED
            },
            "tokenizer": tokenizer_record(tokenizer, args.tokenizer),
            "models": {model.path: model.record() for model in models},
            "data": {"path": args.data, "split": args.split, "classes": len(classes), "reference": len(judge.chosen)},
            "network": extractor.network,
            "bounds": judge.bounds(tokenizer, splits[1], args.images),
            "runs": runs,
            "notes": notes,
        }
        progress("writing the report")
        pictures = _pictures(tokenizer, field, made, requests, shown, classes, splits[1])
        results = write_results(results, functools.partial(write_report, pictures=pictures), out)
        whole = np.concatenate([pictures.real, *pictures.grids.values()])
        write_bytes(png(tiled(whole, len(shown[0]))), out / "samples.png")
    print_table(results)
    print(f"\nwrote {out}/results.json, {out}/report.html and {out}/samples.png")
    return results


def _load(args: argparse.Namespace) -> tuple[Tokenizer, list[Model], list[Contender]]:
    loaded: dict[str, Model] = {}

    def model(path: str) -> Model:
        if path not in loaded:
            loaded[path] = Model.load(path)
        return loaded[path]

    tokenizer = load_tokenizer(args.tokenizer)
    var, refiner = model(args.var), model(args.refiner) if args.refiner else None
    drafters, refiners = ({n: model(path) for n, path in pairs} for pairs in (args.drafters, args.refiners))
    field = contenders(var, refiner, args.draft_scales, drafters, refiners, *drawings(args))
    return tokenizer, list(loaded.values()), field


def _class_names(data: Images, models: Sequence[Model]) -> tuple[str, ...]:
    for model in models:
        if model.config.num_classes != len(data.classes):
            raise UserError(
                f"{model.path} makes {model.config.num_classes} classes, the data set has {len(data.classes)}"
            )
    return data.classes


def _requests(args: argparse.Namespace, classes: int) -> tuple[Requests, tuple[list[int], int]]:
    """What is made, and of what is shown the classes and how many rows."""
    columns, rows = args.grid
    if args.images < classes:
        columns = min(columns, args.images)
    chosen = np.linspace(0, min(classes, args.images), min(columns, classes), endpoint=False).astype(int).tolist()
    rows = min(rows, max(1, args.images // classes))
    shown = tuple(row * classes + label for row in range(rows) for label in chosen)
    requests = Requests(args.images, args.batch_size, classes, args.seed, args.decoded_at_once, shown)
    return requests, (chosen, rows)


def _memory(
    tokenizer: Tokenizer, field: Sequence[Contender], args: argparse.Namespace, progress: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """By contender the entry `memory`."""
    decoder = memory.decoder_memory(tokenizer, min(args.decoded_at_once, args.batch_size))
    found = {}
    for contender in field:
        progress(f"compiling {contender.name}")
        parts = memory.stage_memory(tokenizer, contender.stages, args.batch_size)
        stages = [
            {"role": role, "cache": part.cache, **dataclasses.asdict(part.program), "total": part.program.total}
            for role, part in zip(contender.roles, parts, strict=True)
        ]
        found[contender.name] = {
            "batch": args.batch_size,
            "stages": stages,
            "decoder": {**dataclasses.asdict(decoder), "total": decoder.total},
            "peak": dataclasses.asdict(memory.peak(tokenizer, contender.stages, parts, decoder)),
        }
    return found


def _runs(
    field: Sequence[Contender],
    made: dict[str, Made],
    parts: dict[str, dict[str, Any]],
    judge: Judge,
    requests: Requests,
) -> tuple[list[dict[str, Any]], list[str]]:
    """The entries `runs` and `notes`."""
    speeds = {contender.name: rates(made[contender.name], requests.batch) for contender in field}
    labels = [number % requests.classes for number in range(requests.count)]
    runs, notes = [], []
    for contender in field:
        judged = judge.samples(made[contender.name].samples, labels)
        notes += judged["notes"]
        speed = speeds[contender.name]
        runs.append(
            {
                "name": contender.name,
                "kind": contender.kind,
                "draft_scales": contender.draft_scales,
                "makers": contender.makers(),
                "models": list(contender.paths),
                **speed,
                **speedups(speed, speeds[field[0].name]),
                "metrics": judged["metrics"],
                "memory": parts[contender.name],
            }
        )
    return runs, list(dict.fromkeys(notes))


def _pictures(
    tokenizer: Tokenizer,
    field: Sequence[Contender],
    made: dict[str, Made],
    requests: Requests,
    shown: tuple[list[int], int],
    classes: Sequence[str],
    data: Images,
) -> Pictures:
    labels, rows = shown
    return Pictures(
        columns=[classes[label] for label in labels],
        grids={one.name: np.stack([made[one.name].shown[number] for number in requests.shown]) for one in field},
        real=_real(data, labels, rows),
        build_ups={one.name: build_up(tokenizer, made[one.name].first, requests.decoded_at_once)[0] for one in field},
    )


def _real(data: Images, labels: Sequence[int], rows: int) -> np.ndarray:
    """Images of the data in the order of the grids; white where a class has too few."""
    left = {label: rows for label in labels}
    found: dict[int, list[np.ndarray]] = {label: [] for label in labels}
    for index in range(len(data)):
        image, label = data[index]["image"], int(data[index]["label"])
        if left.get(label):
            found[label].append(image)
            left[label] -= 1
        if not any(left.values()):
            break
    white = np.full((data.size, data.size, 3), 255, np.uint8)
    filled = {label: [*images, *[white] * (rows - len(images))] for label, images in found.items()}
    return np.stack([filled[label][row] for row in range(rows) for label in labels])


_NOT_RECORDED = ("overwrite", "distributed")
_PAIR = like(r"(\d+)=(.+)", "N=DIR, such as 3=runs/refiner", lambda found: (int(found[0]), found[1]))
_SCALES = like(r"(\d+(?:,\d+)*)", "numbers separated by commas, such as 2,3,4", lambda found: numbers(int)(found[0]))
_GRID = like(r"([1-9]\d*)x([1-9]\d*)", "CLASSESxIMAGES, such as 12x4", lambda found: tuple(map(int, found)))


def _parser() -> argparse.ArgumentParser:
    parser = command_line.parser("eval.images.main", __doc__)
    models = parser.add_argument_group("models")
    models.add_argument("--tokenizer", required=True, help="the VQ-VAE's directory")
    models.add_argument("--var", required=True, help="directory of the larger VAR model, which drafts")
    models.add_argument("--refiner", help="directory of the smaller one, which refines")
    models.add_argument("--draft_scales", type=_SCALES, default=[], help="Ns at which the two collaborate as they are")
    tuned: dict[str, Any] = {"type": _PAIR, "nargs": "+", "default": [], "metavar": "N=DIR"}
    models.add_argument("--drafters", **tuned, help="models tuned to draft N scales")
    models.add_argument("--refiners", **tuned, help="models tuned to refine after N scales")
    drawing = parser.add_argument_group("drawing")
    add_drawing(drawing, Drawing(top_k=600))
    drawing.add_argument("--seed", type=int, default=0, help="of the first image; the others count up from it")
    judging = parser.add_argument_group("judging")
    network = judging.add_mutually_exclusive_group(required=True)
    network.add_argument("--features", help="directory of a classifier trained here; no metric is then called FID")
    network.add_argument("--weights", help="Inception weights of 2015-12-05, as the torch port has them")
    judging.add_argument("--data", required=True, help="the data set: a directory, or tfds:NAME")
    judging.add_argument("--split", default="train", help="images to compare with")
    judging.add_argument("--valid_split", default="valid", help="held-out images, for the bounds")
    judging.add_argument("--reference_images", type=at_least(1), default=10_000, help="how many of the split")
    judging.add_argument("--images", type=at_least(1), default=1000, help="how many are made by each")
    judging.add_argument("--batch_size", type=at_least(1), default=50, help="how many at once")
    judging.add_argument("--decoded_at_once", type=at_least(1), default=DECODED_AT_ONCE, help="by the decoder")
    judging.add_argument("--grid", type=_GRID, default="12x4", help="CLASSESxIMAGES that the report shows")
    parser.add_argument("--out", required=True, help="directory for the results")
    add_overwrite(parser)
    add_distributed(parser)
    return parser


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """The command; see the module's docstring."""
    args = _parser().parse_args(argv)
    processes.start(args.distributed)
    run(args)


if __name__ == "__main__":
    main()
