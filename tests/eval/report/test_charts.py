"""Marks lie where their numbers say, hovering tells them, and ticks are round."""

import re

import pytest

from eval.report.charts import Axis, Curve, Level, Point, chart, depth_chart, even_ticks, length_chart
from tests.eval.report.page import Page


def spots(svg: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r'<circle class="dot"[^>]*cx="([\d.]+)" cy="([\d.]+)"', svg)]


def test_marks_lie_where_their_numbers_say() -> None:
    points = [Point(2, 10.0), Point(0, 0.0), Point(1, 5.0, (4.0, 6.0), "middle")]
    svg = chart([Curve("c", points, "red")], "title", Axis("n"), Axis(""), [Level("bound", 10.0)])
    (x0, y0), (x1, y1), (x2, y2) = spots(svg)
    assert x0 < x1 < x2 and x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2) and y0 > y2
    bound = re.search(r'class="reference" d="M[\d.]+ ([\d.]+)H', svg)
    assert bound is not None and float(bound[1]) == pytest.approx(y2)
    page = Page(svg)
    assert "c, n 1: 5" in page.texts and "bound 10" in page.texts and "middle" in page.texts


def test_shares_over_depths() -> None:
    svg = depth_chart([Curve.over("a", [1.0, None, 0.25], "red", 1), Curve.over("b", [0.5], "blue", 1)], "title")
    (x0, top), (x1, low), (x2, middle) = spots(svg)
    assert x0 == x2 < x1 and middle - top == pytest.approx((low - top) * 2 / 3, abs=0.2)
    texts = Page(svg).texts
    assert {"a, depth 1: 100%", "a, depth 3: 25%", "b, depth 1: 50%", "0%", "75%"} <= set(texts)


def test_lengths_begin_at_one_and_names_keep_apart() -> None:
    curves = [Curve.over("first", [1.0, 2.5], "red"), Curve.over("second", [1.5, 2.5], "blue")]
    svg = length_chart(curves, ["8", "64"], "title", "candidates")
    marks = spots(svg)
    rows = re.findall(r'class="grid" d="M[\d.]+ ([\d.]+)H', svg)
    assert marks[0][1] == max(float(row) for row in rows) and marks[1] == marks[3]
    names = [float(y) for y in re.findall(r'class="label"[^>]* y="([\d.]+)"', svg)]
    assert abs(names[0] - names[1]) >= 13
    assert {"first, 8 candidates: 1.000", "second, 64 candidates: 2.500"} <= set(Page(svg).texts)


@pytest.mark.parametrize("highest", [0.0004, 0.9, 1, 7, 13.2, 850, 123456.0])
def test_ticks_are_round_and_reach_the_top(highest: float) -> None:
    ticks = even_ticks(highest)
    assert ticks[0] == 0 and ticks[-1] >= highest > ticks[-2] and 4 <= len(ticks) <= 9
    digits = {f"{tick:e}".split("e")[0].rstrip("0").rstrip(".") for tick in ticks[1:2]}
    assert digits <= {"1", "2", "2.5", "5"}
