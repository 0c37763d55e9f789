"""The page of `eval.seeds`: acceptance length and speed-up of every method as bars with their intervals, and the table.

environment, target         as in every results file
entries     list of {method, temperature, seeds, acceptance_length, acceptance_length_interval, speedup,
            speedup_interval, ...} (`eval/seeds.py`)
"""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from eval.report.charts import Bar, bar_chart
from eval.report.files import write_text
from eval.report.page import Drawing, Results, frame, render, setting

_MEASURES = (("Acceptance length", "acceptance_length", "{:.2f}"), ("Speed-up", "speedup", "{:.2f}x"))


def write_report(results: Results, rows: Sequence[Sequence[str]], path: str | os.PathLike[str]) -> None:
    """Writes the page to `path`, whole or not at all.

    Args:
      results: see the module.
      rows: of the table, as texts, the head first.
      path: where.

    Raises:
      UserError: it cannot be written.
    """
    entries = results["entries"]
    seeds = sorted({entry["seeds"] for entry in entries})
    view = {
        **frame(results, [("Target", results["target"])]),
        "claim": _claim(entries),
        "tiles": [
            (f"{len({entry['method'] for entry in entries})}", "methods"),
            (" or ".join(map(str, seeds)), "training runs of each"),
        ],
        "table": rows,
        "charts": _charts(entries),
    }
    write_text(render("seeds.html", view), pathlib.Path(path))


def _claim(entries: Sequence[Mapping[str, Any]]) -> str:
    found = []
    for temperature in _temperatures(entries):
        best = max(_at(entries, temperature), key=lambda entry: entry["acceptance_length"])
        found.append(f"{best['method']} accepts {best['acceptance_length']:.2f}, {setting(temperature)}")
    return "; ".join(found)


def _charts(entries: Sequence[Mapping[str, Any]]) -> list[Drawing]:
    drawings = []
    for title, key, form in _MEASURES:
        for temperature in _temperatures(entries):
            known = [entry for entry in _at(entries, temperature) if entry[key] is not None]
            bars = [_bar(entry["method"], entry[key], entry[f"{key}_interval"], form) for entry in known]
            if bars:
                name = f"{title}, {setting(temperature)}"
                drawings.append(Drawing.of(name, bar_chart(bars, name, 1.0)))
    return drawings


def _bar(method: str, value: float, interval: Sequence[float] | None, form: str) -> Bar:
    spread = None if interval is None else (interval[0], interval[1])
    return Bar(method, value, form.format(value), "var(--s1)", spread)


def _temperatures(entries: Sequence[Mapping[str, Any]]) -> list[float]:
    return list(dict.fromkeys(entry["temperature"] for entry in entries))


def _at(entries: Sequence[Mapping[str, Any]], temperature: float) -> list[Mapping[str, Any]]:
    return [entry for entry in entries if entry["temperature"] == temperature]
