"""Charts of the image report as inline SVG: anything over N, and quality against speed.

Like those of `eval/report/charts.py` they take plain numbers, leave colours to the page's style and tell the exact
value of a mark that the pointer is on.
"""

import dataclasses
import html
import math
from collections.abc import Callable, Sequence

WIDTH, HEIGHT = 460, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 18, 14, 48


@dataclasses.dataclass(frozen=True)
class Point:
    """One mark: its place, the range that a whisker spans (or None), and a name that is written beside it (or none),
    a little above or below."""

    x: float
    y: float
    spread: tuple[float, float] | None = None
    name: str = ""
    below: bool = False


@dataclasses.dataclass(frozen=True)
class Curve:
    """Marks of one colour, joined by a line from left to right if `joined`."""

    label: str
    points: Sequence[Point]
    color: str
    joined: bool = True


@dataclasses.dataclass(frozen=True)
class Level:
    """A dashed line across the chart, with its name at the left end."""

    label: str
    y: float


@dataclasses.dataclass(frozen=True)
class Axis:
    """Name of an axis, how its numbers are written, and, where it is not even numbers, its ticks by hand."""

    label: str
    form: Callable[[float], str] = "{:g}".format
    ticks: Sequence[float] | None = None


def chart(curves: Sequence[Curve], title: str, x: Axis, y: Axis, levels: Sequence[Level] = ()) -> str:
    """One `<svg>` element: curves over both axes, the vertical one from zero."""
    points = [point for curve in curves for point in curve.points]
    tops = [point.spread[1] if point.spread else point.y for point in points] + [level.y for level in levels]
    y_ticks = y.ticks or even_ticks(max(tops, default=1))
    x_ticks = x.ticks or even_ticks(max((point.x for point in points), default=1))
    x_low, x_high, y_high = min(x_ticks), max(x_ticks), max(*y_ticks, *tops)
    wide, high = WIDTH - _LEFT - _RIGHT, HEIGHT - _TOP - _BOTTOM

    def place(at: float, value: float) -> tuple[float, float]:
        share = (at - x_low) / (x_high - x_low) if x_high > x_low else 0.5
        return _LEFT + wide * share, _TOP + high * (1 - value / y_high)

    marks = []
    for tick in y_ticks:
        across = place(x_low, tick)[1]
        marks.append(f'<path class="grid" d="M{_LEFT - 6} {across:.1f}H{WIDTH - _RIGHT + 6}"/>')
        marks.append(_text(_LEFT - 10, across, y.form(tick), "end", "tick"))
    marks += [_text(place(tick, 0)[0], _TOP + high + 16, x.form(tick), "middle", "tick") for tick in x_ticks]
    for number, level in enumerate(levels):
        across = place(x_low, level.y)[1]
        marks.append(f'<path class="reference" d="M{_LEFT} {across:.1f}H{WIDTH - _RIGHT}"/>')
        label = f"{level.label} {y.form(level.y)}"
        # At both ends in turn, for bounds often lie close together.
        end = (_LEFT + 4, "start") if number % 2 == 0 else (WIDTH - _RIGHT - 4, "end")
        marks.append(_text(end[0], across - 8, label, end[1], "tick"))
    for curve in curves:
        marks += _curve(curve, place, x, y)
    marks.append(_text(_LEFT + wide / 2, HEIGHT - 10, x.label, "middle", "tick"))
    name = html.escape(title)
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}">{"".join(marks)}</svg>'


def even_ticks(highest: float) -> list[float]:
    """Four to eight round numbers from zero, the last of them at or above `highest`."""
    if highest <= 0:
        return [0.0, 1.0]
    step = 10.0 ** math.floor(math.log10(highest / 4))
    step *= next(factor for factor in (1, 2, 2.5, 5, 10) if highest / (factor * step) <= 7)
    return [round(step * number, 10) for number in range(math.ceil(highest / step - 1e-9) + 1)]


def _curve(curve: Curve, place: Callable[[float, float], tuple[float, float]], x: Axis, y: Axis) -> list[str]:
    ordered = sorted(curve.points, key=lambda point: point.x)
    spots = [place(point.x, point.y) for point in ordered]
    style = f'style="--c:{curve.color}"'
    marks = []
    if curve.joined and len(spots) > 1:
        path = "M" + "L".join(f"{across:.1f} {down:.1f}" for across, down in spots)
        marks.append(f'<path class="line" {style} d="{path}"/>')
    for point, (across, down) in zip(ordered, spots, strict=True):
        if point.spread is not None:
            low, high = (place(point.x, end)[1] for end in point.spread)
            marks.append(f'<path class="whisker" d="M{across:.1f} {low:.1f}V{high:.1f}"/>')
        hover = html.escape(f"{curve.label}, {x.label} {x.form(point.x)}: {y.form(point.y)}")
        spot = f'cx="{across:.1f}" cy="{down:.1f}" r="4.5"'
        marks.append(f'<circle class="dot" {style} {spot}><title>{hover}</title></circle>')
        if point.name:
            right = across < WIDTH - _RIGHT - 90
            anchor, aside = ("start", 9) if right else ("end", -9)
            marks.append(_text(across + aside, down + (10 if point.below else -9), point.name, anchor, "tick"))
    return marks


def _text(x: float, y: float, content: str, anchor: str, style: str) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" dy="0.35em"'
    return f'<text class="{style}" {place} text-anchor="{anchor}">{html.escape(content)}</text>'
