"""One table of several training runs per method: acceptance by position, acceptance length and speed, over their seeds.

    python -m eval.seeds --acceptance DIR [DIR ...] --speed DIR DIR --out DIR

Reads what `eval.acceptance` wrote of methods called LABEL#SEED on the same prompts, in one directory or several, and
what `eval.main` wrote of the same drafters, one directory per temperature. By method and temperature: alpha by
position, the share of steps that accept a draft of this depth once they accepted the depth above, pooled over seeds;
acceptance length and, of the seeds that were timed, speed-up, means over seeds. All have 95% intervals: Student's over
seeds where there are several, else over prompts.
"""

import collections
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy import stats

from eval.report.files import make_directory, write_json
from eval.report.page import REPORT, RESULTS, keep_results, print_columns, read_results
from eval.report.seeds import write_report
from models import command_line
from models.command_line import add_overwrite
from models.errors import UserError, exit_on_user_error


def summary(acceptance: Mapping[str, Any], speeds: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One entry per method and temperature, methods in their order.

    Args:
      acceptance: results of `eval.acceptance`, labels LABEL#SEED, one budget.
      speeds: results of `eval.main`, of one temperature each; the drafters that they time are found by their path.

    Raises:
      UserError: several budgets, whose rows would be mixed.
    """
    budgets = sorted({cell["budget"] for cell in acceptance["cells"]})
    if len(budgets) != 1:
        raise UserError(f"seeds are put together at one budget, but the acceptance was measured at {budgets}")
    paths = {method["label"]: method["path"] for method in acceptance["methods"]}
    rates = {
        (run["path"], speed["config"]["sampling"]["temperature"]): run for speed in speeds for run in speed["runs"]
    }
    groups: dict[tuple[str, float], list[Mapping[str, Any]]] = collections.defaultdict(list)
    for cell in acceptance["cells"]:
        groups[cell["method"].partition("#")[0], cell["temperature"]].append(cell)
    return [_entry(name, temperature, cells, paths, rates) for (name, temperature), cells in groups.items()]


def together(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Results of `eval.acceptance` as if one run had made them, its environment that of the first.

    Raises:
      UserError: they are not of the same prompts, budgets and temperatures, or share a method, which is one seed.
    """
    for name in parts[0]["config"].keys() - {"methods"}:
        values = [part["config"].get(name) for part in parts]
        if any(value != values[0] for value in values):
            raise UserError(f"results are put together of one measurement, but their {name} differ: {values}")
    joined = {key: [entry for part in parts for entry in part[key]] for key in ("methods", "cells")}
    labels = collections.Counter(method["label"] for method in joined["methods"])
    if repeated := [label for label, times in labels.items() if times > 1]:
        raise UserError(f"{repeated[0]!r} is in several of the results: a seed counts once")
    return {**parts[0], **joined}


def _entry(name: str, temperature: float, cells, paths, rates) -> dict[str, Any]:
    depths = sorted({len(cell["accepted_by_depth"]) for cell in cells})
    if len(depths) > 1:
        raise UserError(
            f"the seeds of {name!r} have trees of different depths, {depths}, whose positions do not compare"
        )
    lengths = [cell["acceptance_length"] for cell in cells]
    keys = [(paths[cell["method"]], temperature) for cell in cells]
    timed = [rates[key] for key in keys if key in rates]
    accepted = [sum(depth) for depth in zip(*(cell["accepted_by_depth"] for cell in cells), strict=True)]
    reached = [sum(cell["steps"] for cell in cells), *accepted[:-1]]
    shares = zip(*(cell["conditional_acceptance"] for cell in cells), strict=True)
    over_prompts = cells[0]["conditional_acceptance_intervals"]
    speedups = [run["speedup"] for run in timed]
    return {
        "method": name,
        "temperature": temperature,
        "seeds": len(cells),
        "labels_per_row": labels_per_row([paths[cell["method"]] for cell in cells]),
        "alpha": [hits / number if number else None for hits, number in zip(accepted, reached, strict=True)],
        "alpha_intervals": [_interval(of, own) for of, own in zip(shares, over_prompts, strict=True)],
        "acceptance_length": statistics.fmean(lengths),
        "acceptance_length_interval": _interval(lengths, cells[0]["acceptance_length_interval"]),
        "acceptance_lengths": lengths,
        "identical": None if None in (same := [cell["identical"] for cell in cells]) else all(same),
        "speedup": statistics.fmean(speedups) if speedups else None,
        "speedup_interval": _interval(speedups, timed[0]["speedup_interval"]) if timed else None,
        "speedups": speedups,
    }


def labels_per_row(paths: Sequence[str | None]) -> float | None:
    """Labels of a row of a step's batch, the mean over runs that made these drafters; None where one does not tell."""
    means = [_mean_labels(Path(path)) if path else None for path in paths]
    known = [mean for mean in means if mean is not None]
    return statistics.fmean(known) if len(known) == len(means) else None


def _mean_labels(drafter: Path) -> float | None:
    """From the metrics of a run that made this alone, or as one of several, which lie together in a directory."""
    for metrics, key in (
        (drafter.parent / "metrics.jsonl", "labels"),
        (drafter.parent.parent / "metrics.jsonl", f"{drafter.name}/labels"),
    ):
        if metrics.is_file():
            lines = map(json.loads, metrics.read_text(encoding="utf-8").splitlines())
            if told := [line[key] for line in lines if key in line]:
                return statistics.fmean(told)
    return None


def _interval(values: Sequence[float | None], alone: list[float] | None) -> list[float] | None:
    """95%, of the mean over seeds; of one seed `alone`, None where a seed has no value."""
    if len(values) == 1:
        return alone
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    half = stats.t.ppf(0.975, len(known) - 1) * statistics.stdev(known) / len(known) ** 0.5
    return [statistics.fmean(known) - half, statistics.fmean(known) + half]


def table(entries: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Rows of texts, a heading first."""
    rows = [["method", "labels", "T", "alpha by position", "acceptance length", "speed-up"]]
    for entry in entries:
        shares = zip(entry["alpha"], entry["alpha_intervals"], strict=True)
        rows.append(
            [
                entry["method"],
                _written(entry["labels_per_row"], None, 0),
                f"{entry['temperature']:g}",
                " ".join(_written(share, interval, 3) for share, interval in shares),
                _written(entry["acceptance_length"], entry["acceptance_length_interval"], 3),
                _written(entry["speedup"], entry["speedup_interval"], 2),
            ]
        )
    return rows


def _written(value: float | None, interval: Sequence[float] | None, digits: int) -> str:
    if value is None:
        return "-"
    about = "" if interval is None else " (" + "-".join(f"{end:.{digits}f}" for end in interval) + ")"
    return f"{value:.{digits}f}{about}"


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """The command; see the module's docstring."""
    parser = command_line.parser("eval.seeds", __doc__)
    parser.add_argument("--acceptance", nargs="+", required=True, help="directories that eval.acceptance wrote")
    parser.add_argument("--speed", nargs="*", default=[], help="directories that eval.main wrote")
    parser.add_argument("--out", required=True, help="directory for results.json and report.html")
    add_overwrite(parser)
    args = parser.parse_args(argv)
    keep_results(args.out, args.overwrite)
    parts = [read_results(place, "cells", "eval.acceptance") for place in args.acceptance]
    speeds = [read_results(place, "runs", "eval.main") for place in args.speed]
    try:
        acceptance = together(parts)
        entries = summary(acceptance, speeds)
    except KeyError as error:
        raise UserError(
            f"an entry {error} is missing: these results are of another version or another command"
        ) from None
    out = make_directory(args.out)
    of = {"environment": acceptance["environment"], "target": acceptance["target"], "entries": entries}
    write_json(of, out / RESULTS)
    write_report(of, table(entries), out / REPORT)
    print_columns(table(entries))
    print(f"\nwrote {out / RESULTS} and {out / REPORT}")


if __name__ == "__main__":
    main()
