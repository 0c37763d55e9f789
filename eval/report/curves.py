"""Acceptance length over an axis: a table, and a page with one plot per temperature.

The results: `environment`, `command` and `config` as in every results file, `axis`, and `curves`, a list of {method,
temperature, points: list of {at, acceptance_length, acceptance_length_interval}}.
"""

import os
import pathlib
from collections.abc import Mapping
from typing import Any, TextIO

from eval.report.charts import Axis, Curve, Point, chart, length_axis
from eval.report.files import write_text
from eval.report.page import Drawing, Results, frame, print_columns, render, setting
from eval.report.text import NUM_COLORS


def write_report(results: Results, path: str | os.PathLike[str]) -> None:
    """Writes the page to `path`, whole or not at all. Raises UserError where it cannot be written."""
    write_text(render("curves.html", _view(results)), pathlib.Path(path))


def print_table(results: Results, file: TextIO | None = None) -> None:
    """Acceptance length by method and temperature (rows) and place (columns)."""
    print_columns(_table(results), file)


def _table(results: Results) -> list[list[str]]:
    places = _places(results)
    rows = [[results["axis"], "T", *(f"{place:g}" for place in places)]]
    for curve in results["curves"]:
        found = {point["at"]: f"{point['acceptance_length']:.2f}" for point in curve["points"]}
        rows.append([curve["method"], f"{curve['temperature']:g}", *(found.get(place, "-") for place in places)])
    return rows


def _places(results: Results) -> list[float]:
    return sorted({point["at"] for curve in results["curves"] for point in curve["points"]})


def _view(results: Results) -> dict[str, Any]:
    """Everything the template shows."""
    names = dict.fromkeys(curve["method"] for curve in results["curves"])
    colors = {name: f"var(--s{1 + number % NUM_COLORS})" for number, name in enumerate(names)}
    best = max(results["curves"], key=lambda curve: curve["points"][-1]["acceptance_length"])
    end = best["points"][-1]
    length, place = f"{end['acceptance_length']:.2f}", f"{end['at']:g} {results['axis']}"
    head, *rows = _table(results)
    return {
        **frame(results, []),
        "claim": f"{best['method']}: acceptance length {length} at {place}",
        "tiles": [
            (
                f"{point['acceptance_length']:.2f}",
                f"{curve['method']}, {setting(curve['temperature'])}, at {point['at']:g}",
            )
            for curve in results["curves"]
            for point in curve["points"][-1:]
        ],
        "legend": list(colors.items()),
        "head": head,
        "rows": [(colors[row[0]], row) for row in rows],
        "charts": [_chart(results, at, colors) for at in sorted({curve["temperature"] for curve in results["curves"]})],
    }


def _chart(results: Results, temperature: float, colors: Mapping[str, str]) -> Drawing:
    curves = []
    for curve in results["curves"]:
        if curve["temperature"] == temperature:
            points = [
                Point(point["at"], point["acceptance_length"], tuple(point["acceptance_length_interval"]))
                for point in curve["points"]
            ]
            curves.append(Curve(curve["method"], points, colors[curve["method"]]))
    title = setting(temperature)
    return Drawing.of(title, chart(curves, title, Axis(results["axis"], ticks=_places(results)), length_axis(curves)))
