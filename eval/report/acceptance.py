"""The table of acceptance lengths: on the terminal, as `results.json`, and as a page with plots.

The results (written by `eval/acceptance.py`):

    environment, command        as in every results file
    config, target              plain dicts
    methods     list of {label, drafter, growth (its tree policy), path, parameters}
    cells       list, one per method, temperature and budget that fit together:
      method, temperature, budget
      candidates, depth         of the tree; candidates equal the budget
      acceptance_length, acceptance_length_interval (95%, over prompts), steps, committed
      accepted_by_depth         steps that accepted depth 1, 2, ...
      conditional_acceptance    the share of those that accepted the depth above, or None where none did
      conditional_acceptance_intervals   of each, 95%, over texts, or None
      texts, differing_texts    decoded, and those unlike plain decoding's
      distinct_token_share?     distinct over all tokens of a text, mean over texts: low where text repeats
      identical                 no text differs; None where equal texts are not promised (sampled rules)
      tree                      rank paths, where the topology is static
"""

import collections
import dataclasses
import os
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from eval.report.charts import Curve, depth_chart, length_chart, percent
from eval.report.files import write_text
from eval.report.page import Drawing, Results, frame, print_columns, render, setting
from eval.report.text import NUM_COLORS

DEPTHS = 8  # That are shown; a copied chain may be much deeper, and its few long hits say little.
GROUPS = {
    "trained": "Heads and draft networks trained on the target",
    "policies": "One network, by policy",
    "free": "Without training",
}


@dataclasses.dataclass(frozen=True)
class Row:
    """A method with its group, its colour there, and its cells by (temperature, budget)."""

    method: Mapping[str, Any]
    group: str
    color: str
    cells: dict[tuple[float, int], Mapping[str, Any]]

    @property
    def label(self) -> str:
        """What people call it."""
        return self.method["label"]

    def curve(self, temperature: float, budgets: Sequence[int]) -> Curve:
        """Acceptance length over budgets."""
        found = [self.cells.get((temperature, budget)) for budget in budgets]
        return Curve.over(self.label, [cell["acceptance_length"] if cell else None for cell in found], self.color)

    def distinct(self, temperature: float) -> str:
        """How many of a text's tokens are distinct, over budgets, or nothing where it did not run."""
        shares = [cell.get("distinct_token_share") for (at, _), cell in self.cells.items() if at == temperature]
        known = [share for share in shares if share is not None]
        return percent(statistics.fmean(known)) if known else ""

    def identical(self, temperature: float) -> str:
        """`yes`, `no`, `in distribution`, or nothing where it did not run."""
        said = [cell["identical"] for (at, _), cell in self.cells.items() if at == temperature]
        if not said:
            return ""
        return "in distribution" if None in said else "yes" if all(said) else "no"


def write_report(results: Results, path: str | os.PathLike[str]) -> None:
    """Writes the page to `path`, whole or not at all. Raises UserError where it cannot be written."""
    write_text(render("acceptance.html", _view(results)), pathlib.Path(path))


def print_table(results: Results, file: TextIO | None = None) -> None:
    """Acceptance length by method (rows), temperature and budget (columns), with what was compared."""
    rows, temperatures, budgets = _rows(results), *_axes(results)
    texts = [["acceptance length", *(row.label for row in rows)]]
    for temperature in temperatures:
        for budget in budgets:
            cells = [row.cells.get((temperature, budget)) for row in rows]
            head = f"T={temperature:g} n={budget}"
            texts.append([head, *(f"{cell['acceptance_length']:.2f}" if cell else "-" for cell in cells)])
        texts.append(["distinct", *(row.distinct(temperature) or "-" for row in rows)])
        texts.append(["identical", *(row.identical(temperature) or "-" for row in rows)])
    print_columns(list(zip(*texts, strict=True)), file)


def _axes(results: Results) -> tuple[list[float], list[int]]:
    """Temperatures and budgets, in order."""
    cells = results["cells"]
    return sorted({cell["temperature"] for cell in cells}), sorted({cell["budget"] for cell in cells})


def _rows(results: Results) -> list[Row]:
    rows: list[Row] = []
    users = collections.Counter(method["path"] for method in results["methods"])
    for method in results["methods"]:
        # A network that several methods make trees with is shown apart, to compare their policies.
        group = "free" if not method["parameters"] else "policies" if users[method["path"]] > 2 else "trained"
        number = sum(row.group == group for row in rows)
        cells = {(c["temperature"], c["budget"]): c for c in results["cells"] if c["method"] == method["label"]}
        rows.append(Row(method, group, f"var(--s{1 + number % NUM_COLORS})", cells))
    return rows


def _best(rows: Sequence[Row], temperature: float, budget: int) -> Row | None:
    present = [row for row in rows if (temperature, budget) in row.cells]
    return max(present, key=lambda row: row.cells[temperature, budget]["acceptance_length"], default=None)


def _view(results: Results) -> dict[str, Any]:
    """Everything the template shows."""
    rows, temperatures, budgets = _rows(results), *_axes(results)
    widest = budgets[-1]
    champion = _best(rows, temperatures[0], widest)
    assert champion is not None
    tau = champion.cells[temperatures[0], widest]["acceptance_length"]
    compared = [cell["identical"] for cell in results["cells"] if cell["identical"] is not None]
    return {
        **frame(results, [("Target", results["target"])]),
        "claim": f"{champion.label} commits {tau:.2f} tokens per target forward with {widest} candidates",
        "tiles": [
            (f"{tau:.2f}", f"acceptance length of {champion.label}, {setting(temperatures[0])}, {widest} candidates"),
            (f"{len(rows)}", "methods at equal budgets"),
            (f"{sum(compared)} of {len(compared)}", "decodes with every text identical to plain decoding"),
        ],
        "settings": [setting(temperature) for temperature in temperatures],
        "budgets": budgets,
        "rows": [_table_row(row, rows, temperatures, budgets) for row in rows],
        "groups": [
            group for name, title in GROUPS.items() if (group := _group(name, title, rows, temperatures, budgets))
        ],
        "by_depth": [_by_depth(rows, temperature, widest) for temperature in temperatures],
        "depth_note": (
            f"With {widest} candidates: how often a step accepts a draft of this depth once it accepted the depth "
            "above; in grey, the share of all steps that get so far."
        ),
    }


def _table_row(row: Row, rows: Sequence[Row], temperatures: Sequence[float], budgets: Sequence[int]) -> dict[str, Any]:
    groups = []
    for temperature in temperatures:
        cells = []
        for budget in budgets:
            cell = row.cells.get((temperature, budget))
            if cell is None:
                cells.append({"text": "–", "hover": "", "best": False})
                continue
            interval = cell["acceptance_length_interval"]
            spread = f"{interval[0]:.2f} to {interval[1]:.2f} over prompts; " if interval else ""
            hover = f"{spread}depth {cell['depth']}, {cell['committed']} tokens in {cell['steps']} forwards"
            best = _best(rows, temperature, budget) is row
            cells.append({"text": f"{cell['acceptance_length']:.2f}", "hover": hover, "best": best})
        said = {"distinct": row.distinct(temperature), "identical": row.identical(temperature)}
        groups.append({"cells": cells, **said})
    return {"label": row.label, "color": row.color, "groups": groups}


def _group(
    name: str, title: str, rows: Sequence[Row], temperatures: Sequence[float], budgets: Sequence[int]
) -> dict[str, Any] | None:
    """Charts of one group: acceptance length over budgets and conditional acceptance, at each temperature."""
    members = [row for row in rows if row.group == name]
    if not members:
        return None
    charts = []
    for temperature in temperatures:
        curves = [row.curve(temperature, budgets) for row in members]
        label = f"Acceptance length, {setting(temperature)}"
        drawing = length_chart(curves, [str(budget) for budget in budgets], label, "candidates")
        charts.append(Drawing.of(label, drawing))
    for temperature in temperatures:
        curves = [
            Curve.over(row.label, row.cells[temperature, budgets[-1]]["conditional_acceptance"][:DEPTHS], row.color, 1)
            for row in members
            if (temperature, budgets[-1]) in row.cells
        ]
        if curves:
            label = f"Acceptance once the depth above was accepted, {setting(temperature)}, {budgets[-1]} candidates"
            charts.append(Drawing.of(label, depth_chart(curves, label)))
    return {"title": title, "legend": [(row.label, row.color) for row in members], "charts": charts}


def _by_depth(rows: Sequence[Row], temperature: float, budget: int) -> tuple[str, list[int], list[Any]]:
    present = [(row, row.cells[temperature, budget]) for row in rows if (temperature, budget) in row.cells]
    deepest = min(DEPTHS, max((cell["depth"] for _, cell in present), default=0))
    lines = []
    for row, cell in present:
        cells = []
        for depth in range(deepest):
            given = cell["conditional_acceptance"][depth] if depth < cell["depth"] else None
            share = cell["accepted_by_depth"][depth] / cell["steps"] if given is not None else None
            cells.append({"given": "–" if given is None else percent(given), "reached": share and percent(share)})
        lines.append((row.label, row.color, cells))
    return setting(temperature), list(range(1, deepest + 1)), lines
