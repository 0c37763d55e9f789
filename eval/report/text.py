"""From the dict behind a decode benchmark's `results.json` to a page (`eval/report/page.py`) and a table for people.

The results (keys marked ? may be absent or None; what needs them is then left out):

    environment?      what eval.measure.environment.describe_environment returns
    command?          str, what to type to run this again
    config?           plain nested dict
    target?           {path, parameters, layers, width, vocab_size, perplexity?, ...}: anything printable
    runs              list, the baseline (drafter `none`) among them:
      drafter         str, the method's name
      path?           str, the drafter's directory
      settings?       dict, as `drafter.json` has them: the tree's too
      tokens_per_second           float, median of repeats, prefill excluded
      tokens_per_second_repeats?  list of float
      speedup         float, over the baseline of the same run
      acceptance_length           float, tokens committed per target forward, bonus included
      acceptance_length_per_turn? float, mean over texts of each one's own
      identical_to_baseline?      bool
      first_difference?           dict of anything printable: where the output first left the baseline's
      lossy?          bool, the drafter or its acceptance rule does not promise the target's output
      new_tokens?, steps?         int, over all prompts of one repeat
      candidates?, steps_by_candidates?   int, usual number of candidates, and steps by that number
      distinct_token_share?       float, distinct over all tokens of a text, mean over texts: low where text repeats
                      itself, which makes it easy to draft
      accepted_by_depth?          per depth 1, 2, ...: int, steps that accepted a draft of this depth
      accepted_histogram?         per 0, 1, 2, ... accepted drafts: int, steps that accepted so many
      prefill_seconds?, draft_share?, loop_efficiency?    float
      head_accuracy?  per depth, [top-1, top-2, ...] accuracy in 0..1, teacher-forced
      tree?           {paths: list of lists of ranks, accepted: int per path (steps that accepted this node),
                       visits?: int per path (steps that accepted its parent)}
      categories?     name -> {speedup, acceptance_length, acceptance_length_per_turn?, tokens_per_second?, turns?,
                               steps?, accepted_by_depth?, accepted_histogram?}, as of the run
    augmented?        {kind, num_latents, runs: as above, the same drafters in the same order where latents of a
                      coprocessor lay in the cache of all, with augmentations and augmentation_ms (of each)}
    samples?          list of {prompt: str, drafter: str, path?: str, pieces: list of [text, writer]} with one piece per
                      token; its writer is 0 for the target, d >= 1 for an accepted draft of depth d
"""

import dataclasses
import itertools
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from markupsafe import Markup

from eval.report.charts import Bar, Curve, bar_chart, depth_chart, histogram, percent, tree_chart
from eval.report.files import make_directory, write_text
from eval.report.page import Drawing, Results, facts, frame, print_columns, render
from models.errors import UserError

BASELINE = "none"
NUM_COLORS = 6  # --s1 to --s6 in report.css; --s0 is the baseline's
PROMPT_TAIL = 320  # characters of a prompt shown in front of its continuation

Run = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Column:
    """One column of the table of runs: a cell per run, a small note per run or none, and the row that leads."""

    head: str
    cells: list[str]
    notes: list[str] | None = None
    best: int | None = None


@dataclasses.dataclass(frozen=True)
class Entry:
    """One run with the name and the colour it has everywhere on the page."""

    run: Run
    label: str
    color: str

    @property
    def baseline(self) -> bool:
        """Plain decoding, which has no drafts to show."""
        return self.run["drafter"] == BASELINE

    @property
    def lossy(self) -> bool:
        """The run does not promise the target's output."""
        return bool(self.run.get("lossy"))


def write_report(results: Results, path: str | os.PathLike[str]) -> None:
    """Writes the HTML report of `results` (the module's docstring gives their shape) to `path`, atomically.

    Raises:
      UserError: no runs, or a draft tree with a node whose parent is missing.
    """
    path = pathlib.Path(path)
    page = render("text.html", _view(results))
    make_directory(path.parent)
    write_text(page, path)


def print_table(results: Results, file: TextIO | None = None) -> None:
    """Prints the table of runs as aligned text to `file` (default: stdout), with or without a terminal."""
    entries = _entries(results)
    texts = [["drafter", *(f"{entry.label} (lossy)" if entry.lossy else entry.label for entry in entries)]]
    for column in _columns(entries)[1:]:
        texts.append([column.head, *(cell or "-" for cell in column.cells)])
        if column.notes and any(column.notes):
            texts.append(["range", *(note.replace("–", "-") for note in column.notes)])
    print_columns(list(zip(*texts, strict=True)), file, ruled=True)


def print_categories(results: Results, file: TextIO | None = None) -> None:
    """Prints speed-up and acceptance length by category, below an empty line; nothing where prompts have none."""
    table = _categories([entry for entry in _entries(results) if not entry.baseline])
    if table is not None:
        rows = [
            [name, *(f"{cell['speedup']} {cell['acceptance']}".rstrip() for cell in row)] for name, row in table["rows"]
        ]
        print(file=file)
        print_columns([["category", *table["labels"]], *rows], file, ruled=True)


def print_augmented(results: Results, file: TextIO | None = None) -> None:
    """Prints what latents change, below an empty line; nothing where there were none."""
    if table := _augmented(results, _entries(results)):
        print(f"\n{table['title']}", file=file)
        print_columns([table["heads"], *(cells for _, cells in table["rows"])], file, ruled=True)


def _augmented(results: Results, entries: Sequence[Entry]) -> dict[str, Any] | None:
    """Every drafter without and with latents of a coprocessor in the cache."""
    made = results.get("augmented")
    if not made:
        return None
    rows = []
    for entry, run in zip(entries, made["runs"], strict=True):
        before = entry.run["acceptance_length"]
        cells = [
            entry.label,
            f"{run['tokens_per_second']:,.1f}",
            f"{run['speedup']:.2f}x",
            f"{before:.2f}",
            f"{run['acceptance_length']:.2f}",
            {True: "yes", False: "no"}[run["identical_to_baseline"]],
            str(run.get("augmentations", 0)),
            f"{run['augmentation_ms']:.1f}" if run.get("augmentation_ms") else "",
        ]
        rows.append((entry, cells))
    heads = ["drafter", "tokens/s", "speed-up", "without", "acceptance length", "identical", "augmentations", "ms each"]
    return {"title": f"with {made['num_latents']} latents ({made['kind']})", "heads": heads, "rows": rows}


def _entries(results: Results) -> list[Entry]:
    """Runs with distinct labels: the method's name, and its run directory's where the method does not tell it apart."""
    runs = results.get("runs") or []
    if not runs:
        raise UserError("a report needs at least one run, and the results hold none under the key 'runs'")
    names = [run["drafter"] for run in runs]
    entries: list[Entry] = []
    colored = 0
    for run, name, label in zip(runs, names, _labels(runs), strict=True):
        if name == BASELINE:
            color = "var(--s0)"
        else:
            color, colored = f"var(--s{1 + colored % NUM_COLORS})", colored + 1
        entries.append(Entry(run, label, color))
    return entries


def _labels(runs: Sequence[Run]) -> list[str]:
    """As few of the last parts of each path as tell the runs apart; several methods in one are named by their paths."""
    names = [run["drafter"] for run in runs]

    def label(run: Run, name: str, parts: int) -> str:
        place = "+".join(_run_directory(piece, parts) for piece in str(run.get("path") or "").split("+"))
        if "+" in place:
            return place
        return f"{name} ({place})" if place and names.count(name) > 1 else name

    every = [[label(run, name, parts) for run, name in zip(runs, names, strict=True)] for parts in range(1, 8)]
    labels = max(every, key=lambda labels: len(set(labels)))  # The first of equals.
    # What has no path, or one path, is told apart by its place alone.
    return [f"{x} {labels[: i + 1].count(x)}" if x in labels[:i] else x for i, x in enumerate(labels)]


def _run_directory(path: str, parts: int) -> str:
    """The end of a drafter's path; a training run leaves it as `RUN/drafter`, where only RUN says anything."""
    pieces = [piece for piece in pathlib.PurePath(path).parts if piece not in ("/", ".")]
    if len(pieces) > 1 and pieces[-1] == "drafter":
        pieces.pop()
    return "/".join(pieces[-parts:])


def _columns(entries: Sequence[Entry]) -> list[Column]:
    """The table of runs; a column that no run has a value for is left out."""
    runs = [entry.run for entry in entries]

    def cells(key: str, form: str) -> list[str]:
        return ["" if run.get(key) is None else format(run[key], form) for run in runs]

    def leader(key: str) -> int | None:
        rivals = [index for index, entry in enumerate(entries) if not entry.baseline and not entry.lossy]
        return max(rivals, key=lambda index: runs[index][key], default=None)

    spreads = []
    for run in runs:
        repeats = run.get("tokens_per_second_repeats") or []
        spreads.append(f"{min(repeats):,.0f}–{max(repeats):,.0f}" if len(repeats) > 1 else "")
    identical = {True: "yes", False: "no", None: ""}
    columns = [
        Column("drafter", [entry.label for entry in entries]),
        Column("tokens/s", cells("tokens_per_second", ",.1f"), spreads, leader("tokens_per_second")),
        Column("speed-up", [f"{run['speedup']:.2f}x" for run in runs], best=leader("speedup")),
        Column("acceptance length", cells("acceptance_length", ".2f"), best=leader("acceptance_length")),
        Column("per turn", cells("acceptance_length_per_turn", ".2f")),
        Column("identical", [identical[run.get("identical_to_baseline")] for run in runs]),
        Column("draft share", cells("draft_share", ".0%")),
        Column("loop efficiency", cells("loop_efficiency", ".0%")),
        Column("prefill s", cells("prefill_seconds", ".3f")),
        Column("new tokens", cells("new_tokens", ",d")),
        Column("distinct", cells("distinct_token_share", ".0%")),
    ]
    return [column for column in columns if any(column.cells)]


def _champion(entries: Sequence[Entry]) -> Entry | None:
    """The fastest drafter, among the lossless ones if there is any; None where only the baseline ran."""
    rivals = [entry for entry in entries if not entry.baseline]
    lossless = [entry for entry in rivals if not entry.lossy]
    return max(lossless or rivals, key=lambda entry: entry.run["speedup"], default=None)


def _claim(entries: Sequence[Entry]) -> str:
    """The headline in one sentence, true also when the drafter is slow or its output differs."""
    champion = _champion(entries)
    if champion is None:
        return f"Plain decoding makes {entries[0].run['tokens_per_second']:,.0f} tokens per second"
    identical = champion.run.get("identical_to_baseline")
    ending = {True: "with identical output", False: "but its output differs", None: "output not compared"}[identical]
    if champion.lossy:
        ending = "with lossy acceptance"
    return f"{champion.label} decodes {champion.run['speedup']:.2f}x as fast as plain decoding, {ending}"


def _tiles(entries: Sequence[Entry]) -> list[tuple[str, str]]:
    champion = _champion(entries) or entries[0]
    tiles = [
        (f"{champion.run['speedup']:.2f}x", f"speed-up of {champion.label}"),
        (f"{champion.run['acceptance_length']:.2f}", "tokens per target forward"),
        (f"{champion.run['tokens_per_second']:,.0f}", "tokens per second"),
    ]
    compared = [entry.run["identical_to_baseline"] for entry in entries if _is_compared(entry)]
    if compared:
        tiles.append((f"{sum(compared)} of {len(compared)}", "drafters identical to plain decoding"))
    return tiles


def _is_compared(entry: Entry) -> bool:
    return not entry.baseline and not entry.lossy and entry.run.get("identical_to_baseline") is not None


def _view(results: Results) -> dict[str, Any]:
    """Everything the template shows, as values that need no more thought."""
    entries = _entries(results)
    drafting = [entry for entry in entries if not entry.baseline]
    return {
        **frame(results, [("Target", results.get("target"))]),
        "claim": _claim(entries),
        "tiles": _tiles(entries),
        "runs": entries,
        "drafters": [(entry.label, entry.color) for entry in drafting],
        "columns": _columns(entries),
        "differences": _differences(entries),
        "bars": _bars(entries) if drafting else [],
        "depths": _depths(drafting),
        "histograms": [
            (entry, Markup(histogram(counts, f"Drafts accepted per step, {entry.label}", entry.color)))
            for entry in drafting
            if (counts := entry.run.get("accepted_histogram"))
        ],
        "trees": [_tree(entry) for entry in drafting if entry.run.get("tree") and entry.run.get("steps")],
        "heads": [
            (entry, [[(min(1.0, share), percent(share)) for share in row] for row in accuracy])
            for entry in drafting
            if (accuracy := entry.run.get("head_accuracy"))
        ],
        "categories": _categories(drafting),
        "augmented": _augmented(results, entries),
        "lengths": [_lengths(entry) for entry in drafting if _has_steps(entry)],
        **_samples(results.get("samples") or [], {(e.run["drafter"], e.run.get("path")): e.label for e in entries}),
    }


def _differences(entries: Sequence[Entry]) -> list[str]:
    lines = []
    for entry in entries:
        if entry.run.get("identical_to_baseline") is False:
            where = ", ".join(f"{name} {value}" for name, value in facts(entry.run.get("first_difference") or {}))
            lines.append(f"{entry.label} differs from plain decoding" + (f", first at {where}" if where else ""))
    return lines


def _bars(entries: Sequence[Entry]) -> list[Drawing]:
    speed, length = [], []
    for entry in entries:
        run = entry.run
        unit = run["speedup"] / run["tokens_per_second"]
        repeats = run.get("tokens_per_second_repeats") or []
        spread = (unit * min(repeats), unit * max(repeats)) if len(repeats) > 1 else None
        speed.append(Bar(entry.label, run["speedup"], f"{run['speedup']:.2f}x", entry.color, spread))
        length.append(Bar(entry.label, run["acceptance_length"], f"{run['acceptance_length']:.2f}", entry.color))
    return [
        Drawing.of("Speed-up", bar_chart(speed, "Speed-up by drafter", 1.0)),
        Drawing.of("Acceptance length", bar_chart(length, "Acceptance length by drafter", 1.0)),
    ]


def _depths(entries: Sequence[Entry]) -> list[Drawing]:
    reached, conditional = [], []
    for entry in entries:
        accepted, steps = entry.run.get("accepted_by_depth"), entry.run.get("steps")
        if not accepted or not steps:
            continue
        before = [steps, *accepted[:-1]]
        reached.append(Curve.over(entry.label, [count / steps for count in accepted], entry.color, 1))
        given = [count / chances if chances else None for count, chances in zip(accepted, before, strict=True)]
        conditional.append(Curve.over(entry.label, given, entry.color, 1))
    if not reached:
        return []
    return [
        Drawing.of("Share of steps that accept this depth", depth_chart(reached, "Share of steps by draft depth")),
        Drawing.of(
            "Share once the depth above was accepted", depth_chart(conditional, "Conditional acceptance by depth")
        ),
    ]


def _tree(entry: Entry) -> tuple[Entry, int, Markup]:
    tree, steps = entry.run["tree"], entry.run["steps"]
    paths, accepted = tree["paths"], tree["accepted"]
    hovers = []
    for index, (path, count) in enumerate(zip(paths, accepted, strict=True)):
        hover = f"ranks {' '.join(map(str, path))}: accepted in {percent(count / steps)} of steps ({count} of {steps})"
        visits = (tree.get("visits") or {index: 0})[index]
        hovers.append(hover + (f", {percent(count / visits)} of those that accepted its parent" if visits else ""))
    shares = [count / steps for count in accepted]
    return entry, len(paths), Markup(tree_chart(paths, shares, hovers, f"Draft tree of {entry.label}"))


def _categories(entries: Sequence[Entry]) -> dict[str, Any] | None:
    """A row per category, a cell per drafter that has categories, the fastest of a row marked."""
    tables = {entry.label: entry.run["categories"] for entry in entries if entry.run.get("categories")}
    if not tables:
        return None
    rows = []
    for name in dict.fromkeys(name for table in tables.values() for name in table):
        speeds = [table[name]["speedup"] for table in tables.values() if name in table]
        cells = []
        for table in tables.values():
            cell = table.get(name)
            cells.append(
                {
                    "speedup": f"{cell['speedup']:.2f}x" if cell else "–",
                    "acceptance": _acceptance(cell) if cell else "",
                    "best": bool(cell) and len(speeds) > 1 and cell["speedup"] == max(speeds),
                }
            )
        rows.append((name, cells))
    return {"labels": list(tables), "rows": rows}


def _acceptance(cell: Mapping[str, Any]) -> str:
    per_turn = cell.get("acceptance_length_per_turn")
    return f"{cell['acceptance_length']:.2f}" + ("" if per_turn is None else f", {per_turn:.2f} per turn")


def _has_steps(entry: Entry) -> bool:
    return any(
        cell.get("accepted_by_depth") and cell.get("steps") for cell in (entry.run.get("categories") or {}).values()
    )


def _lengths(entry: Entry) -> tuple[Entry, list[int], list[tuple[str, Markup, list[tuple[float, str]]]]]:
    """Step lengths by category: their histogram, and how often a step of length k - 1 or more reaches k = 2, 3, ..."""
    cells = {name: cell for name, cell in entry.run["categories"].items() if cell.get("accepted_by_depth")}
    deepest = max(len(cell["accepted_by_depth"]) for cell in cells.values())
    rows = []
    for name, cell in cells.items():
        reached = [cell["steps"], *cell["accepted_by_depth"]]
        given = [(min(1.0, b / a), percent(b / a)) if a else (0.0, "") for a, b in itertools.pairwise(reached)]
        drawing = histogram(cell["accepted_histogram"], f"Drafts accepted per step, {name}, {entry.label}", entry.color)
        rows.append((name, Markup(drawing), given + [(0.0, "")] * (deepest - len(given))))
    return entry, list(range(2, deepest + 2)), rows


def _samples(samples: Sequence[Mapping[str, Any]], labels: Mapping[tuple[str, str | None], str]) -> dict[str, Any]:
    """Generated texts by prompt, cut at line ends so that an accepted newline shows; the shade of each draft depth."""
    deepest = max((writer for sample in samples for _, writer in sample["pieces"]), default=0)
    alphas = {depth: round(0.14 + 0.42 * (depth - 1) / max(1, deepest - 1), 3) for depth in range(1, deepest + 1)}
    shown: dict[str, dict[str, Any]] = {}
    for sample in samples:
        prompt, total = sample["prompt"], max(1, len(sample["pieces"]))
        drafted = sum(writer > 0 for _, writer in sample["pieces"])
        pieces = [
            {
                "lines": text.split("\n"),
                "writer": writer,
                "alpha": alphas.get(writer),
                "hover": f"draft of depth {writer}" if writer else "target",
            }
            for text, writer in sample["pieces"]
        ]
        cut = len(prompt) > PROMPT_TAIL
        tail = "…" + prompt[-PROMPT_TAIL:] if cut else prompt
        same = shown.setdefault(prompt, {"prompt": prompt, "prompt_tail": tail, "cut": cut, "texts": []})
        same["texts"].append(
            {
                "drafter": labels.get((sample["drafter"], sample.get("path")), sample["drafter"]),
                "summary": f"{drafted} of {len(sample['pieces'])} tokens drafted ({percent(drafted / total)})",
                "pieces": pieces,
            }
        )
    return {"samples": list(shown.values()), "shades": list(alphas.items())}
