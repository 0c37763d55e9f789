"""Several measurements as one curve per method and temperature: what stands where, what is refused."""

import json

import pytest

from eval import curves


def write(directory, *cells) -> str:
    keys = ("method", "temperature", "acceptance_length", "acceptance_length_interval")
    entries = [{"budget": 4, **dict(zip(keys, (*cell, [cell[2] - 0.1, cell[2] + 0.1]), strict=True))} for cell in cells]
    directory.mkdir()
    (directory / "results.json").write_text(json.dumps({"cells": entries}))
    return str(directory)


@pytest.fixture
def measured(tmp_path) -> list[str]:
    first = write(tmp_path / "a", ("stale", 0, 2.0), ("stale", 1, 1.9))
    second = write(tmp_path / "b", ("stale", 0, 1.3), ("stale", 1, 1.4), ("adapted", 0, 1.75))
    return [first, second]


def test_points_stand_at_their_places(measured, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    curves.main(["--acceptance", *measured, "--at", "0,60", "--axis", "steps of it", "--out", str(out)])
    told = json.loads((out / "results.json").read_text())
    assert told["axis"] == "steps of it"
    found = {
        (c["method"], c["temperature"]): [(p["at"], p["acceptance_length"]) for p in c["points"]]
        for c in told["curves"]
    }
    assert found == {
        ("stale", 0): [(0, 2.0), (60, 1.3)],
        ("stale", 1): [(0, 1.9), (60, 1.4)],
        ("adapted", 0): [(60, 1.75)],
    }
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[:4]] == [
        ["steps", "of", "it", "T", "0", "60"],
        ["stale", "0", "2.00", "1.30"],
        ["stale", "1", "1.90", "1.40"],
        ["adapted", "0", "-", "1.75"],
    ]
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 2 and "adapted: acceptance length 1.75 at 60 steps of it" in page


@pytest.mark.parametrize("at", ["0", "0,0", "60,0", "0,60,120"])
def test_places_are_as_many_as_results_and_increase(at, measured, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit):
        curves.main(["--acceptance", *measured, "--at", at, "--out", str(tmp_path / "out")])
    assert "expected 2 increasing places" in capsys.readouterr().err


def test_a_curve_is_of_one_budget(measured, tmp_path, capsys) -> None:
    path = tmp_path / "b" / "results.json"
    path.write_text(path.read_text().replace('"budget": 4', '"budget": 8'))
    with pytest.raises(SystemExit):
        curves.main(["--acceptance", *measured, "--at", "0,60", "--out", str(tmp_path / "out")])
    assert "[4, 8]" in capsys.readouterr().err
