"""Several runs of a method as one row: pooled shares by depth, means and intervals over seeds, speed where known."""

import json

import pytest

from eval import seeds
from models.errors import UserError


def cell(method, length, accepted, temperature=0.0, budget=2):
    return {
        "method": method,
        "temperature": temperature,
        "budget": budget,
        "steps": 10,
        "identical": None if temperature else method != "a#1",
        "acceptance_length": length,
        "acceptance_length_interval": [length - 0.1, length + 0.1],
        "accepted_by_depth": accepted,
        "conditional_acceptance": [
            hits / tries if tries else None for hits, tries in zip(accepted, [10, *accepted[:-1]], strict=True)
        ],
        "conditional_acceptance_intervals": [[0.1, 0.2], None],
    }


def results(*cells):
    names = dict.fromkeys(cell["method"] for cell in cells)
    methods = [{"label": name, "path": f"runs/{name}"} for name in names]
    return {"methods": methods, "cells": list(cells), "environment": {}, "target": {}, "config": {"num_prompts": 3}}


SPEED = {
    "config": {"sampling": {"temperature": 0.0}},
    "runs": [{"path": None, "speedup": 1.0}, {"path": "runs/a#0", "speedup": 1.5, "speedup_interval": [1.2, 1.7]}],
}


def test_seeds_of_a_method_are_put_together(tmp_path, capsys) -> None:
    told = results(cell("a#0", 2.0, [6, 3])), results(cell("a#1", 2.4, [8, 3]), cell("b", 1.1, [0, 0]))
    for name, content in (("acceptance", told[0]), ("more", told[1]), ("speed", SPEED)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(content))
    places = [str(tmp_path / name) for name in ("acceptance", "more", "speed", "out")]
    seeds.main(["--acceptance", *places[:2], "--speed", places[2], "--out", places[3]])
    first, second = json.loads((tmp_path / "out" / "results.json").read_text())["entries"]
    assert (first["identical"], second["identical"]) == (False, True)
    assert first["method"] == "a" and first["seeds"] == 2 and first["alpha"] == [14 / 20, 6 / 14]
    assert first["acceptance_length"] == pytest.approx(2.2) and first["speedup"] == 1.5
    assert first["speedup_interval"] == [1.2, 1.7]
    # Student's t for two values: 12.706 deviations of their mean.
    assert first["acceptance_length_interval"] == pytest.approx([2.2 - 12.706 * 0.2, 2.2 + 12.706 * 0.2], rel=1e-3)
    for interval, middle, half in zip(first["alpha_intervals"], (0.7, 0.4375), (1.2706, 0.0625 * 12.706), strict=True):
        assert interval == pytest.approx([middle - half, middle + half], rel=1e-3)
    assert second["alpha_intervals"] == [[0.1, 0.2], None]
    assert second["alpha"] == [0.0, None] and second["speedup"] is None
    assert second["acceptance_length_interval"] == pytest.approx([1.0, 1.2])
    page = (tmp_path / "out" / "report.html").read_text()
    assert "1.50 (1.20-1.70)" in page and "1.50 (1.20-1.70)" in capsys.readouterr().out
    assert page.count("<svg") == 2 and "a accepts 2.20, greedy" in page, "nothing was timed at another temperature"


def test_temperatures_are_apart_and_every_seed_that_was_timed_counts() -> None:
    """At either temperature the speeds of that one alone."""
    lengths = {0.0: (2.0, 2.4), 1.0: (1.5, 1.7)}
    cells = [
        cell(f"a#{seed}", length, [round(4 * length), seed + 1], temperature)
        for temperature, of in lengths.items()
        for seed, length in enumerate(of)
    ]
    speeds = [
        {
            "config": {"sampling": {"temperature": temperature}},
            "runs": [
                {"path": f"runs/a#{seed}", "speedup": speedup, "speedup_interval": [speedup - 0.5, speedup + 0.5]}
                for seed, speedup in timed.items()
            ],
        }
        for temperature, timed in ((1.0, {1: 1.25}), (0.0, {0: 1.5, 1: 2.0}))
    ]
    cold, warm = seeds.summary(results(*cells), speeds)
    assert (cold["temperature"], warm["temperature"], cold["seeds"], warm["seeds"]) == (0.0, 1.0, 2, 2)
    assert cold["acceptance_lengths"] == [2.0, 2.4] and warm["acceptance_lengths"] == [1.5, 1.7]
    assert cold["alpha"] == [18 / 20, 3 / 18] and warm["alpha"] == [13 / 20, 3 / 13]
    assert cold["speedups"] == [1.5, 2.0] and cold["speedup"] == 1.75
    assert cold["speedup_interval"] == pytest.approx([1.75 - 12.706 * 0.25, 1.75 + 12.706 * 0.25], rel=1e-3)
    assert warm["speedups"] == [1.25] and warm["speedup_interval"] == [0.75, 1.75]


def test_labels_are_those_of_the_runs_that_made_the_drafters(tmp_path) -> None:
    """Alone or as a member of several, lines without the metric left out; a drafter from elsewhere tells nothing."""
    for name, lines in {
        "a": [{"labels": 10.0}, {"valid/loss": 1.0}, {"labels": 20.0}],
        "b": [{"jsd/labels": 7.0, "labels": 1.0, "tvd/labels": 3.0}],
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    alone, member = str(tmp_path / "a" / "drafter"), str(tmp_path / "b" / "drafters" / "jsd")
    assert seeds.labels_per_row([alone]) == 15.0 and seeds.labels_per_row([member]) == 7.0
    assert seeds.labels_per_row([alone, member]) == 11.0
    assert seeds.labels_per_row([alone, None]) is None
    assert seeds.labels_per_row([str(tmp_path / "elsewhere" / "drafter")]) is None


def test_neither_budgets_nor_measurements_are_mixed() -> None:
    one = results(cell("a", 2.0, [1, 1]))
    with pytest.raises(UserError, match=r"their num_prompts differ: \[3, 4\]"):
        seeds.together([one, {**one, "config": {"num_prompts": 4}}])
    with pytest.raises(UserError, match="one budget"):
        seeds.summary(results(cell("a", 2.0, [1, 1]), cell("a", 2.0, [1, 1], budget=4)), [])


def test_results_of_another_command_are_refused(tmp_path, capsys) -> None:
    (tmp_path / "results.json").write_text(json.dumps(SPEED))
    with pytest.raises(SystemExit):
        seeds.main(["--acceptance", str(tmp_path), "--out", str(tmp_path / "out")])
    assert "is no result of eval.acceptance: it has no 'cells'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_put_together_is_one_sentence(tmp_path) -> None:
    part = results(cell("a#0", 2.0, [6, 3]))
    with pytest.raises(UserError, match=r"'a#0' is in several of the results: a seed counts once"):
        seeds.together([part, part])
    mixed = results(cell("a#0", 2.0, [6, 3]), cell("a#1", 2.0, [6]))
    with pytest.raises(UserError, match=r"the seeds of 'a' have trees of different depths, \[1, 2\]"):
        seeds.summary(mixed, [])
    # What another command wrote has runs, too.
    for name, content in (("acceptance", part), ("speed", {"config": {}, "runs": [{"label": "x"}]})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(content))
    places = ["--acceptance", str(tmp_path / "acceptance"), "--speed", str(tmp_path / "speed")]
    with pytest.raises(UserError, match="are of another version or another command"):
        seeds.main.__wrapped__([*places, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
