"""Results that were committed, some by earlier versions, still make pages."""

import json
import pathlib

import numpy as np
import pytest

from eval.report import acceptance, images, text
from tests.eval.report.page import Page

RESULTS = pathlib.Path(__file__).resolve().parents[3] / "docs" / "results"


def results(name: str) -> dict:
    return json.loads((RESULTS / name / "results.json").read_text())


@pytest.mark.parametrize(("name", "charts"), [("quickstart", 8), ("combination", 8)])
def test_decoding(name: str, charts: int, tmp_path: pathlib.Path) -> None:
    text.write_report(results(name), tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text())
    assert page.tags.count("svg") == charts
    assert f"{results(name)['runs'][-1]['speedup']:.2f}x" in page.texts


def test_acceptance(tmp_path: pathlib.Path) -> None:
    acceptance.write_report(results("stories"), tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text())
    assert page.tags.count("svg") == 12 and "EAGLE-3, 64 candidates: 2.937" in page.texts


@pytest.mark.parametrize("name", ["glyphs", "emoji"])
def test_images(name: str, tmp_path: pathlib.Path) -> None:
    found = results(name)
    grid = np.zeros((2, 4, 4, 3), np.uint8)
    names = [run["name"] for run in found["runs"]]
    images.write_report(found, tmp_path / "report.html", images.Pictures(["A"], dict.fromkeys(names, grid), grid, {}))
    page = Page((tmp_path / "report.html").read_text())
    assert page.tags.count("svg") == 3 + len(found["runs"][0]["metrics"])
