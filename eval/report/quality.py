"""What `eval.quality` measured: tables on the terminal, and a page with plots.

The results; of the last three at least one is there:

    environment, command        as in every results file
    config, target              plain dicts
    contenders  list of {label, path?, kind?, num_latents?, positions?, parameters?}, the target as it is first
    perplexity? {offsets, tokens (per offset), runs: list of {label, perplexity (per offset, or None), change? (less 1,
                over the target's), change_interval?, over? (list of {label, change, change_interval}: over that of the
                coprocessors before it)}}
    problems?   {file, questions, shots, runs: list of {label, marked, last, augmentation_ms?}, samples: list of
                {question, number, answers: list of [label, text]}}
    choices?    list of {file, questions, shots, chance, runs: list of {label, plain, normalised}}

where `marked` and the like are {correct, share, interval, gain?, gain_interval?}; gains are over the target as it is.
"""

import dataclasses
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any, TextIO

from eval.report.charts import Axis, Curve, Level, Point, chart, even_ticks
from eval.report.files import write_text
from eval.report.page import Drawing, Results, frame, print_columns, render
from eval.report.text import NUM_COLORS
from models.coprocessor import CoprocessorConfig

SHOWN = (1, 2, 4, 8, 16, 32)  # Offsets of the tables.


def write_report(results: Results, path: str | os.PathLike[str]) -> None:
    """Writes the page to `path`, whole or not at all. Raises UserError where it cannot be written."""
    write_text(render("quality.html", _view(results)), pathlib.Path(path))


def print_tables(results: Results, file: TextIO | None = None) -> None:
    """Every table that the page has."""
    for number, table in enumerate(_tables(results)):
        print(("\n" if number else "") + table["title"], file=file)
        print_columns([table["heads"], *table["rows"]], file, ruled=True)


def _tables(results: Results) -> list[dict[str, Any]]:
    """Title, heads and rows of text, the first cell of a row its label."""
    tables = []
    if found := results.get("perplexity"):
        shown = [place for place, offset in enumerate(found["offsets"]) if offset in SHOWN]
        rows = [[run["label"], *(_perplexity(run, place) for place in shown)] for run in found["runs"]]
        heads = ["perplexity at offset", *(str(found["offsets"][place]) for place in shown)]
        tables.append({"title": "Perplexity behind latents", "heads": heads, "rows": rows})
        pairs = [
            [run["label"], than["label"], *(_change(than, place) for place in shown)]
            for run in found["runs"]
            for than in run.get("over") or []
        ]
        if pairs:
            heads = ["perplexity with", "over that with", *heads[1:]]
            tables.append({"title": "Latents against each other", "heads": heads, "rows": pairs})
    entries = [("problems", ("marked", "last"))] if results.get("problems") else []
    groups = [(results[name], names) for name, names in entries]
    groups += [(entry, ("plain", "normalised")) for entry in results.get("choices") or []]
    for entry, names in groups:
        rows = []
        for run in entry["runs"]:
            cells = [cell for name in names for cell in (_share(run[name]), _gain(run[name]))]
            rows.append([run["label"], *cells, *([_ms(run)] if "samples" in entry else [])])
        heads = [f"{entry['questions']} questions, {entry['shots']} shots"]
        heads += [head for name in names for head in (name, "gain")] + (["ms of latents"] if "samples" in entry else [])
        tables.append({"title": pathlib.PurePath(entry["file"]).name, "heads": heads, "rows": rows})
    return tables


def _perplexity(run: Mapping[str, Any], place: int) -> str:
    value = run["perplexity"][place]
    if value is None:
        return "-"
    return f"{value:.2f}" + (f" {100 * run['change'][place]:+.1f}%" if run.get("change") else "")


def _change(than: Mapping[str, Any], place: int) -> str:
    if than["change"][place] is None:
        return "-"
    low, high = than["change_interval"][place]
    return f"{100 * than['change'][place]:+.1f}% ({100 * low:+.1f} to {100 * high:+.1f})"


def _share(counted: Mapping[str, Any]) -> str:
    low, high = counted["interval"]
    return f"{100 * counted['share']:.1f}% ({100 * low:.1f}-{100 * high:.1f})"


def _gain(counted: Mapping[str, Any]) -> str:
    if "gain" not in counted:
        return "-"
    low, high = counted["gain_interval"]
    return f"{100 * counted['gain']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def _ms(run: Mapping[str, Any]) -> str:
    return f"{run['augmentation_ms']:.1f}" if run.get("augmentation_ms") else "-"


def _view(results: Results) -> dict[str, Any]:
    """Everything the template shows."""
    labels = [one["label"] for one in results["contenders"]]
    colors = {label: f"var(--s{1 + (i - 1) % NUM_COLORS if i else 0})" for i, label in enumerate(labels)}
    problems = results.get("problems") or {}
    return {
        **frame(results, [("Target", results["target"]), *((c["label"], c) for c in results["contenders"][1:])]),
        "claim": _claim(results),
        "tiles": _tiles(results),
        "legend": [(label, colors[label]) for label in labels],
        "tables": [(table, [(colors[row[0]], row) for row in table["rows"]]) for table in _tables(results)],
        "charts": _charts(results, colors),
        "samples": problems.get("samples") or [],
    }


def _claim(results: Results) -> str:
    if found := results.get("perplexity"):
        changed = [run for run in found["runs"] if run.get("change") and run["change"][0] is not None]
        if changed:
            best = min(changed, key=lambda run: run["change"][0])
            return f"With {best['label']}, the next token's perplexity changes by {100 * best['change'][0]:+.1f}%"
        return f"The target's perplexity is {found['runs'][0]['perplexity'][0]:.2f}"
    entry, name = _headline(results)
    best = max(entry["runs"], key=lambda run: run[name]["share"])
    right = best[name]["correct"]
    return f"{best['label']} answers {right} of {entry['questions']} questions right"


def _headline(results: Results) -> tuple[Mapping[str, Any], str]:
    return (results["problems"], "last") if results.get("problems") else (results["choices"][0], "normalised")


def _tiles(results: Results) -> list[tuple[str, str]]:
    tiles = []
    if found := results.get("perplexity"):
        value = found["runs"][0]["perplexity"][0]
        tiles.append(("–" if value is None else f"{value:.2f}", "perplexity of the target as it is, at offset 1"))
        tiles.append((f"{sum(found['tokens']):,}", "tokens predicted by each"))
    if results.get("problems") or results.get("choices"):
        entry, name = _headline(results)
        tiles.append((f"{100 * entry['runs'][0][name]['share']:.1f}%", f"of the target's answers right ({name})"))
    return tiles


def _charts(results: Results, colors: Mapping[str, str]) -> list[Drawing]:
    drawings = []
    found = results.get("perplexity")
    if found and any(run.get("change") for run in found["runs"]):
        title = "Change of perplexity by offset behind the latents"
        curves = []
        for run in found["runs"]:
            if not run.get("change"):
                continue
            every = zip(found["offsets"], run["change"], run["change_interval"], strict=True)
            points = [Point(at, value, (low, high)) for at, value, (low, high) in every if value is not None]
            curves.append(Curve(run["label"], points, colors[run["label"]]))
        ends = [end for curve in curves for point in curve.points for end in (point.spread or ())]
        ticks = signed_ticks(min(ends, default=0), max(ends, default=0))
        y = Axis("", ("{:+.0%}" if ticks[-1] - ticks[0] > 0.1 else "{:+.1%}").format, ticks, "{:+.2%}".format)
        x = Axis("offset", "{:g}".format, [at for at in SHOWN if at <= found["offsets"][-1]])
        drawings.append(Drawing.of(title, chart(curves, title, x, y)))
    asked = [(results["problems"], "last")] if results.get("problems") else []
    for entry, name in [*asked, *((one, "normalised") for one in results.get("choices") or [])]:
        if len(entry["runs"]) > 1:
            drawings.append(_by_latents(results, entry, name, colors))
    return drawings


def _by_latents(results: Results, entry: Mapping[str, Any], name: str, colors: Mapping[str, str]) -> Drawing:
    """Right answers over the number of latents, a curve of every form, the target as it is a line across."""
    known = {one["label"]: one for one in results["contenders"]}
    kinds: dict[str, list[tuple[Point, str]]] = {}
    for run in entry["runs"][1:]:
        low, high = run[name]["interval"]
        one = known[run["label"]]
        point = Point(one["num_latents"], run[name]["share"], (low, high))
        kinds.setdefault(form(one), []).append((point, colors[run["label"]]))
    curves = [Curve(kind, [point for point, _ in points], points[0][1]) for kind, points in kinds.items()]
    title = f"{pathlib.PurePath(entry['file']).name}: right answers ({name}) by latents"
    ticks = sorted({point.x for curve in curves for point in curve.points})
    base = Level("target as it is", entry["runs"][0][name]["share"])
    x, y = Axis("latents", "{:g}".format, [0, *ticks]), Axis("", "{:.0%}".format)
    return Drawing.of(title, chart(curves, title, x, y, [base]), [(curve.label, curve.color) for curve in curves])


def form(one: Mapping[str, Any]) -> str:
    """A coprocessor's kind, and what else tells it from the default of that kind, but for its number of latents."""
    apart = [
        f"{field.name}={value}" if field.name.endswith("_attn") or not isinstance(value, str) else value
        for field in dataclasses.fields(CoprocessorConfig)
        if field.name not in ("kind", "num_latents") and (value := one.get(field.name, field.default)) != field.default
    ]
    return ", ".join([one["kind"], *apart])


def signed_ticks(low: float, high: float) -> list[float]:
    """Round numbers from at most `low` to at least `high`, zero among them."""
    step = even_ticks(max(high - min(low, 0), 1e-3))[1]
    first, last = math.floor(min(low, 0) / step), math.ceil(max(high, 0) / step)
    return [round(step * number, 10) for number in range(first, last + 1)]
