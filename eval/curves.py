"""Acceptance length over what several measurements differ in, such as steps of training: one plot per temperature.

    python -m eval.curves --acceptance DIR DIR ... --at 0,60,120,180 --axis "steps of fine-tuning" --out DIR

Reads what `eval.acceptance` wrote of methods with the same labels, a directory per place on the axis, at one budget. A
method need not be at every place.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from eval.report.curves import print_table, write_report
from eval.report.page import RESULTS, keep_results, read_results, write_results
from models import command_line
from models.command_line import add_overwrite, numbers
from models.errors import UserError, exit_on_user_error


def curves(measured: Sequence[Mapping[str, Any]], at: Sequence[float]) -> list[dict[str, Any]]:
    """One entry per method and temperature, methods in the order in which they first appear.

    Args:
      measured: results of `eval.acceptance`.
      at: where each stands on the axis, increasing.

    Raises:
      UserError: places are not as many as results, or do not increase; there are several budgets.
    """
    if len(at) != len(measured) or list(at) != sorted(set(at)):
        raise UserError(f"--at: expected {len(measured)} increasing places, one for each result, got {list(at)}")
    budgets = sorted({cell["budget"] for one in measured for cell in one["cells"]})
    if len(budgets) != 1:
        raise UserError(f"a curve is of one budget, but the acceptance was measured at {budgets}")
    entries: dict[tuple[str, float], dict[str, Any]] = {}
    for place, one in zip(at, measured, strict=True):
        for cell in one["cells"]:
            key = {"method": cell["method"], "temperature": cell["temperature"]}
            entry = entries.setdefault(tuple(key.values()), {**key, "points": []})
            point = {name: cell[name] for name in ("acceptance_length", "acceptance_length_interval")}
            entry["points"].append({"at": place, **point})
    return list(entries.values())


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """The command; see the module's docstring."""
    parser = command_line.parser("eval.curves", __doc__)
    parser.add_argument("--acceptance", nargs="+", required=True, help="directories that eval.acceptance wrote")
    parser.add_argument("--at", type=numbers(float), required=True, help="where each stands on the axis")
    parser.add_argument("--axis", default="steps", help="the axis's name")
    parser.add_argument("--out", required=True, help="directory for results.json and report.html")
    add_overwrite(parser)
    args = parser.parse_args(argv)
    keep_results(args.out, args.overwrite)
    measured = [read_results(place, "cells", "eval.acceptance") for place in args.acceptance]
    results = {"config": vars(args), "axis": args.axis, "curves": curves(measured, args.at)}
    write_results(results, write_report, args.out)
    print_table(results)
    print(f"\nwrote {args.out}/{RESULTS} and report.html")


if __name__ == "__main__":
    main()
