"""What all reports share: one page, its beginning and end, and the table for the terminal.

A page is one HTML file with no outside assets: style and drawings are inside it, and it follows the reader's light or
dark setting. The same file may be mailed, committed or opened from disk. `base.html` is its frame; the template of a
report fills in what is its own.
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import jinja2
from markupsafe import Markup

from eval.measure.environment import describe_environment
from eval.report.files import make_directory, write_json
from models.command_line import keep_files
from models.errors import UserError
from models.formats.text_files import read_json

Results = Mapping[str, Any]

FOLDER = Path(__file__).parent
RESULTS, REPORT = "results.json", "report.html"


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A chart on a page.

    Attributes:
      title: its heading.
      svg: one element, made by `eval/report/charts.py`.
      names: of its colours, where the page does not explain them elsewhere.
    """

    title: str
    svg: Markup
    names: Sequence[tuple[str, str]] = ()

    @classmethod
    def of(cls, title: str, svg: str, names: Sequence[tuple[str, str]] = ()) -> "Drawing":
        """From an element as text."""
        return cls(title, Markup(svg), names)


def render(template: str, view: Mapping[str, Any]) -> str:
    """The page that `template`, a file beside this one, makes of `view`.

    Args:
      template: extends `base.html`.
      view: every name that the two read: `frame`'s, `claim`, `tiles` and the template's own.
    """
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        loader=jinja2.FileSystemLoader(FOLDER),
    )
    css = Markup((FOLDER / "report.css").read_text(encoding="utf-8"))
    return environment.get_template(template).render(css=css, **view)


def frame(results: Results, records: Sequence[tuple[str, Mapping[str, Any] | None]]) -> dict[str, Any]:
    """Beginning and end of every page: when and where it was measured, how, and what is known of its subjects.

    Args:
      results: with `environment`, `command` and `config`, each of which may be absent.
      records: titles and contents of the cards at the end; the environment is added, and empty ones are left out.
    """
    environment = results.get("environment") or {}
    config = results.get("config")
    return {
        "date": environment.get("date", ""),
        "machine": " · ".join(str(environment[key]) for key in ("device", "cpu", "platform") if environment.get(key)),
        "command": results.get("command") or environment.get("command", ""),
        "records": [(title, facts(told)) for title, told in [*records, ("Environment", environment)] if told],
        "config": json.dumps(config, indent=2, default=str) if config else "",
    }


def facts(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and values as text, without those that are None and the command, which has a place of its own."""
    told = []
    for name, value in record.items():
        if value is None or name == "command":
            continue
        if isinstance(value, int) and not isinstance(value, bool):
            value = f"{value:,}"
        elif isinstance(value, float):
            value = f"{value:,.4g}"
        told.append((name.replace("_", " "), str(value)))
    return told


def keep_results(directory: str | Path, overwrite: bool, option: str = "--overwrite") -> None:
    """Refuses, before any work, what `write_results` would replace; as `command_line.keep_files`."""
    keep_files([Path(directory) / name for name in (RESULTS, REPORT)], overwrite, option)


def write_results(
    results: Results, write_report: Callable[[Results, Path], None], directory: str | Path
) -> dict[str, Any]:
    """Writes `results.json` and `report.html` into `directory`, each whole or not at all.

    Args:
      results: what was measured; the present environment and the command are put in front.
      write_report: makes the page.
      directory: made where it does not exist.

    Returns:
      What it wrote.

    Raises:
      UserError: the directory cannot be made or written to.
    """
    directory = make_directory(directory)
    environment = describe_environment()
    full = {"environment": environment, "command": environment["command"], **results}
    write_json(full, directory / RESULTS)
    write_report(full, directory / REPORT)
    return full


def setting(temperature: float) -> str:
    """How a temperature is called."""
    return "greedy" if temperature == 0 else f"temperature {temperature:g}"


def read_results(directory: str | Path, key: str, command: str) -> dict[str, Any]:
    """What `command` wrote into `directory`, with at least the entry `key`. Raises UserError where it is not that."""
    found = read_json(path := Path(directory) / RESULTS)
    if key not in found:
        raise UserError(f"{path} is no result of {command}: it has no {key!r}")
    return found


def print_columns(rows: Sequence[Sequence[str]], file: TextIO | None = None, ruled: bool = False) -> None:
    """Prints rows, the head first, with the first column to the left and the others to the right.

    Args:
      rows: of equal lengths.
      file: default: stdout.
      ruled: a line below the head.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rule = [["-" * width for width in widths]] if ruled else []
    for name, *cells in [rows[0], *rule, *rows[1:]]:
        aligned = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        print("  ".join([name.ljust(widths[0]), *aligned]).rstrip(), file=file or sys.stdout)
