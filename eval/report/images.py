"""From the dict behind an image benchmark's `results.json`, and its pictures, to a page and a table.

The results (keys marked ? may be absent or None):

    environment?, command?, config?     as for text
    tokenizer?, data?   anything printable
    models?             path -> anything printable
    network             str, whose features the metrics compare
    bounds?             name -> metrics, of images that no model made
    notes?              list of str, what to know when reading the metrics
    runs                list, the larger model alone first:
      name, kind        str (`eval/images/contenders.py`)
      draft_scales      int, N, the scales that the larger model makes
      makers            per scale `drafter` or `refiner`
      images_per_second           float, transformer alone, median over batches
      images_per_second_repeats?  list of float
      end_to_end_images_per_second, speedup, end_to_end_speedup     float
      metrics           name -> float; the distance is the first
      memory            {batch, stages, decoder, peak: {parameters, working, total, cache}} in bytes
                        (`eval/images/memory.py`)
"""

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

import numpy as np
from jaxtyping import UInt8

from eval.images.contenders import ALONE, TRAINING_FREE, TUNED
from eval.images.pictures import data_uri, tiled
from eval.report.charts import Axis, Curve, Level, Point, chart
from eval.report.files import write_text
from eval.report.page import Drawing, Results, frame, print_columns, render
from models.errors import UserError

MEBIBYTE = 2**20
# Above this many times the larger model's own distance a pair does not make the headline.
_EQUAL = 1.1
_COLOURS = {ALONE: "var(--s0)", TRAINING_FREE: "var(--s1)", TUNED: "var(--s2)"}

Run = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Pictures:
    """What the page shows beside numbers.

    Attributes:
      columns: names of the classes in the columns of every grid.
      grids: by run the images of its grid, row by row.
      real: images of the data in the same order.
      build_ups: by run one image after each scale.
    """

    columns: Sequence[str]
    grids: Mapping[str, UInt8[np.ndarray, "N H W 3"]]
    real: UInt8[np.ndarray, "N H W 3"]
    build_ups: Mapping[str, UInt8[np.ndarray, "K H W 3"]]


def write_report(results: Results, path: str | os.PathLike[str], pictures: Pictures) -> None:
    """Writes the page to `path`, whole or not at all.

    Raises:
      UserError: there are no runs, or the path cannot be written.
    """
    if not results.get("runs"):
        raise UserError("a report needs at least one run, and the results hold none under the key 'runs'")
    write_text(render("images.html", _view(results, pictures)), pathlib.Path(path))


def print_table(results: Results, file: TextIO | None = None) -> None:
    """Prints the runs, and what bounds them, as aligned text to `file` (default: stdout)."""
    print_columns(_table(results), file, ruled=True)


def champion(runs: Sequence[Run]) -> Run | None:
    """The fastest pair of those whose distance is at most a tenth above the larger model's; else that of the least."""
    pairs = [run for run in runs if run["kind"] != ALONE]
    equal = [run for run in pairs if _distance(run) <= _EQUAL * _distance(runs[0])]
    if equal:
        return max(equal, key=lambda run: run["speedup"])
    return min(pairs, key=_distance, default=None)


def _distance(run: Run) -> float:
    return next(iter(run["metrics"].values()))


def _table(results: Results) -> list[list[str]]:
    """The head and a row per run and per bound; the first cell is the name."""
    runs = results["runs"]
    names = list(runs[0]["metrics"])
    head = ["", "N", "images/s", "speed-up", "end to end", "peak MiB", "working MiB", *map(_plain, names)]

    def judged(metrics: Mapping[str, float]) -> list[str]:
        return [f"{metrics[name]:.3f}" if name in metrics else "-" for name in names]

    rows = []
    for run in runs:
        peak = run["memory"]["peak"]
        speed = [f"{run['images_per_second']:,.1f}", f"{run['speedup']:.2f}x", f"{run['end_to_end_speedup']:.2f}x"]
        memory = [f"{peak[name] / MEBIBYTE:,.1f}" for name in ("total", "working")]
        rows.append([run["name"], str(run["draft_scales"]), *speed, *memory, *judged(run["metrics"])])
    for name, metrics in (results.get("bounds") or {}).items():
        rows.append([name, *["-"] * 6, *judged(metrics)])
    return [head, *rows]


def _plain(name: str) -> str:
    return name.replace("_", " ")


def _view(results: Results, pictures: Pictures) -> dict[str, Any]:
    """Everything the template shows, as values that need no more thought."""
    runs = results["runs"]
    models = (results.get("models") or {}).items()
    records = [("Tokenizer", results.get("tokenizer")), *models, ("Data", results.get("data"))]
    head, *rows = _table(results)
    scales = len(runs[0]["makers"])
    return {
        **frame(results, records),
        "claim": _claim(runs),
        "tiles": _tiles(runs),
        "head": head,
        "rows": [(row, _COLOURS[run["kind"]]) for row, run in zip(rows, runs, strict=False)],
        "bounds": rows[len(runs) :],
        "network": results["network"],
        "notes": results.get("notes") or [],
        "kinds": [(kind, color) for kind, color in _COLOURS.items() if any(run["kind"] == kind for run in runs)],
        "drawings": _drawings(results, scales),
        "stages": _stages(runs),
        "batch": runs[0]["memory"]["batch"],
        "columns": pictures.columns,
        "grids": _grids(runs, pictures),
        "build_ups": _build_ups(runs, pictures),
        "side": pictures.real.shape[1],
    }


def _claim(runs: Sequence[Run]) -> str:
    best = champion(runs)
    alone = runs[0]
    if best is None:
        return f"{alone['name']} makes {alone['images_per_second']:,.1f} images per second"
    metric = _plain(next(iter(alone["metrics"])))
    numbers = f"at a {metric} distance of {_distance(best):.2f} instead of {_distance(alone):.2f}"
    return f"{best['name']} makes images {best['speedup']:.2f}x as fast as {alone['name']} alone, {numbers}"


def _tiles(runs: Sequence[Run]) -> list[tuple[str, str]]:
    best = champion(runs) or runs[0]
    peaks = [run["memory"]["peak"] for run in (best, runs[0])]
    tiles = [
        (f"{best['speedup']:.2f}x", f"speed-up of {best['name']}, decoder apart"),
        (f"{best['end_to_end_speedup']:.2f}x", "with the decoder of the VQ-VAE"),
        (f"{peaks[0]['working'] / peaks[1]['working']:.0%}", "of the working memory"),
        (f"{_distance(best):.2f}", _plain(next(iter(best["metrics"])))),
    ]
    return tiles


def _drawings(results: Results, scales: int) -> list[Drawing]:
    runs = results["runs"]
    over_n = Axis("scales by the larger model, N", "{:.0f}".format, list(range(scales + 1)))
    bounds = results.get("bounds") or {}
    speed = chart(_curves(runs, _speed), "Speed over N", over_n, Axis(""))
    drawings = [Drawing.of("Speed: images/s, decoder apart", speed)]
    for name in runs[0]["metrics"]:
        levels = [Level(bound, metrics[name]) for bound, metrics in bounds.items() if name in metrics]
        axis = Axis("", lambda value: f"{value:.3g}")
        curves = _curves(runs, lambda run, name=name: Point(run["draft_scales"], run["metrics"][name]))
        drawing = chart(curves, f"{_plain(name)} over N", over_n, axis, levels)
        drawings.append(Drawing.of(_plain(name).capitalize(), drawing))
    drawings.insert(1, _quality_and_speed(runs))
    drawings.insert(2, _memory_chart(runs, over_n))
    return drawings


def _speed(run: Run) -> Point:
    repeats = run.get("images_per_second_repeats") or []
    spread = (min(repeats), max(repeats)) if len(repeats) > 1 else None
    return Point(run["draft_scales"], run["images_per_second"], spread)


def _curves(runs: Sequence[Run], point: Any) -> list[Curve]:
    """One per kind of pair; models alone are the ends of the training-free one, and dots of their own colour."""
    alone = [run for run in runs if run["kind"] == ALONE]
    free = [run for run in runs if run["kind"] == TRAINING_FREE]
    tuned = [run for run in runs if run["kind"] == TUNED]
    curves = [Curve(TRAINING_FREE, [point(run) for run in [*alone, *free]], _COLOURS[TRAINING_FREE])] if free else []
    curves += [Curve(TUNED, [point(run) for run in tuned], _COLOURS[TUNED])] if tuned else []
    return [*curves, Curve(ALONE, [point(run) for run in alone], _COLOURS[ALONE], joined=False)]


def _quality_and_speed(runs: Sequence[Run]) -> Drawing:
    metric = _plain(next(iter(runs[0]["metrics"])))
    curves = [
        Curve(
            run["name"],
            [Point(run["images_per_second"], _distance(run), name=_short(run), below=run["kind"] == TUNED)],
            _COLOURS[run["kind"]],
            joined=False,
        )
        for run in runs
    ]
    drawing = chart(curves, "Quality against speed", Axis("images/s"), Axis("", lambda value: f"{value:.3g}"))
    return Drawing.of(f"{metric.capitalize()} against speed (down and right is better)", drawing)


def _short(run: Run) -> str:
    return run["name"] if run["kind"] == ALONE else f"N={run['draft_scales']}"


def _memory_chart(runs: Sequence[Run], over_n: Axis) -> Drawing:
    # Tuning changes no shape, so an N appears once.
    shown = {run["draft_scales"]: run for run in reversed(runs)}.values()
    lines = {"peak": ("total", "var(--s1)"), "beside parameters": ("working", "var(--s3)")}
    lines["largest cache, by formula"] = ("cache", "var(--s4)")
    curves = []
    for label, (key, color) in lines.items():
        points = [Point(run["draft_scales"], run["memory"]["peak"][key] / MEBIBYTE) for run in shown]
        curves.append(Curve(label, points, color))
    drawing = chart(curves, "Memory over N", over_n, Axis("", lambda value: f"{value:,.4g}"))
    return Drawing.of("Memory in MiB", drawing, [(label, color) for label, (_, color) in lines.items()])


def _stages(runs: Sequence[Run]) -> list[list[str]]:
    """A row per program of every run: whose it is, and its bytes in MiB."""
    keys = ("parameters", "arguments", "temporaries", "outputs", "total", "cache")
    rows = []
    for run in runs:
        for stage in run["memory"]["stages"]:
            rows.append([run["name"], stage["role"], *(f"{stage[key] / MEBIBYTE:,.1f}" for key in keys)])
    decoder = runs[0]["memory"]["decoder"]
    return [*rows, ["all", "decoder", *(f"{decoder[key] / MEBIBYTE:,.1f}" for key in keys[:-1]), "–"]]


def _grids(runs: Sequence[Run], pictures: Pictures) -> list[dict[str, Any]]:
    columns = len(pictures.columns)
    shown: list[tuple[str, str, str, np.ndarray]] = [("images of the data", "", "", pictures.real)]
    for run in runs:
        told = f"{run['speedup']:.2f}x, distance {_distance(run):.2f}"
        shown.append((run["name"], told, _COLOURS[run["kind"]], pictures.grids[run["name"]]))
    return [
        {"name": name, "told": told, "color": color, "uri": data_uri(tiled(images, columns))}
        for name, told, color, images in shown
    ]


def _build_ups(runs: Sequence[Run], pictures: Pictures) -> list[dict[str, Any]]:
    return [
        {
            "name": run["name"],
            "cells": [
                {"uri": data_uri(image), "maker": maker, "hover": f"after scale {scale}, made by the {maker}"}
                for scale, (image, maker) in enumerate(zip(pictures.build_ups[run["name"]], run["makers"], strict=True))
            ],
        }
        for run in runs
        if run["name"] in pictures.build_ups
    ]
