"""Charts as inline SVG strings, drawn by hand: no script, no font, no colour of their own.

Colours come from the page as CSS variables (`eval/report/report.css`), so one drawing serves light and dark, and text
stays text; hovering over a mark tells its exact value. matplotlib's SVG can do neither. Each function takes plain
numbers and returns one `<svg>` element.
"""

import dataclasses
import html
import math
from collections.abc import Callable, Sequence

from models.errors import UserError

PANEL_WIDTH = 460
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 18, 14, 44
_NAMES = 124  # Beside the right end of lines that are named there.
_LABEL = 25  # Most letters beside a bar.


@dataclasses.dataclass(frozen=True)
class Bar:
    """One horizontal bar: its label, length, printed value, range over repeats (or None) and CSS colour."""

    label: str
    value: float
    text: str
    color: str
    spread: tuple[float, float] | None = None


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

    @classmethod
    def over(cls, label: str, values: Sequence[float | None], color: str, first: int = 0) -> "Curve":
        """Values over `first`, `first` + 1, ...; None is left out."""
        points = [Point(place, value) for place, value in enumerate(values, first) if value is not None]
        return cls(label, points, color)


@dataclasses.dataclass(frozen=True)
class Level:
    """A dashed line across the chart, with its name at the left end."""

    label: str
    y: float


@dataclasses.dataclass(frozen=True)
class Axis:
    """One direction of a chart.

    Attributes:
      label: its name.
      form: how its numbers are written.
      ticks: where, by hand; None takes even numbers from zero.
      told: how a number is told where the pointer rests on a mark; None is the label, if any, and the number.
    """

    label: str
    form: Callable[[float], str] = "{:g}".format
    ticks: Sequence[float] | None = None
    told: Callable[[float], str] | None = None


def percent(share: float) -> str:
    """`0.4217` as `42%`, small shares with more digits, so that nothing but zero prints as 0%."""
    if 0 < share < 0.0005:
        return "<0.1%"
    return f"{100 * share:.1f}%" if 0 < share < 0.0995 else f"{100 * share:.0f}%"


def bar_chart(bars: Sequence[Bar], title: str, reference: float) -> str:
    """Horizontal bars from zero with their values at the end and a dashed line at `reference`."""
    row, top, left, right = 34, 14, 20 + 7.6 * max(len(_short(bar.label, _LABEL)) for bar in bars), 56
    plot = PANEL_WIDTH - left - right
    longest = max([reference, *(max(bar.value, *(bar.spread or (0.0,))) for bar in bars)])
    height = top + row * len(bars) + 22

    def x(value: float) -> float:
        return left + plot * value / longest

    marks = []
    for index, bar in enumerate(bars):
        y = top + index * row
        middle = y + row / 2
        low, high = bar.spread or (bar.value, bar.value)
        marks.append(_text(left - 10, middle, _short(bar.label, _LABEL), "end", "label", title=bar.label))
        outline = _rounded_bar(left, y + 7, x(bar.value) - left, row - 14)
        hover = html.escape(f"{bar.label}: {bar.text}")
        marks.append(f'<path class="fill" style="--c:{bar.color}" d="{outline}"><title>{hover}</title></path>')
        if high > low:
            ends = f"M{x(low):.1f} {middle - 5}V{middle + 5}M{x(low):.1f} {middle}H{x(high):.1f}"
            marks.append(f'<path class="whisker" d="{ends}M{x(high):.1f} {middle - 5}V{middle + 5}"/>')
        marks.append(_text(x(max(high, bar.value)) + 8, middle, bar.text, "start", "value"))
    bottom = top + row * len(bars)
    marks.append(f'<path class="reference" d="M{x(reference):.1f} {top - 6}V{bottom + 4}"/>')
    marks.append(_text(x(reference), bottom + 14, "plain decoding", "middle", "tick"))
    return _svg(PANEL_WIDTH, height, marks, title)


def chart(
    curves: Sequence[Curve],
    title: str,
    x: Axis,
    y: Axis,
    levels: Sequence[Level] = (),
    *,
    height: int = 238,
    named: bool = False,
) -> str:
    """Curves over two axes.

    Args:
      curves: what is drawn, the later over the earlier.
      title: read out to those who cannot see the drawing.
      x: its name stands below.
      y: its name belongs into the heading.
      levels: bounds to compare with.
      height: of the plot without what is written around it.
      named: write every curve's name beside its right end.
    """
    points = [point for curve in curves for point in curve.points]
    tops = [point.spread[1] if point.spread else point.y for point in points] + [level.y for level in levels]
    y_ticks = y.ticks or even_ticks(max(tops, default=1))
    x_ticks = x.ticks or even_ticks(max((point.x for point in points), default=1))
    right = PANEL_WIDTH - _RIGHT - (_NAMES if named else 0)
    place = _placing((_LEFT, right), (_TOP + height, _TOP), x_ticks, [*y_ticks, *tops])

    marks = []
    for tick in y_ticks:
        across = place(x_ticks[0], tick)[1]
        marks.append(f'<path class="grid" d="M{_LEFT - 6} {across:.1f}H{right + 6}"/>')
        marks.append(_text(_LEFT - 12, across, y.form(tick), "end", "tick"))
    bottom = _TOP + height
    marks += [_text(place(tick, 0)[0], bottom + 16, x.form(tick), "middle", "tick") for tick in x_ticks]
    for number, level in enumerate(levels):
        across = place(x_ticks[0], level.y)[1]
        marks.append(f'<path class="reference" d="M{_LEFT} {across:.1f}H{right}"/>')
        # At both ends in turn, for bounds often lie close together.
        end = (_LEFT + 4, "start") if number % 2 == 0 else (right - 4, "end")
        marks.append(_text(end[0], across - 8, f"{level.label} {y.form(level.y)}", end[1], "tick"))
    for curve in curves:
        marks += _curve(curve, place, x, y, right)
    marks += _names(curves, place) if named else []
    marks.append(_text((_LEFT + right) / 2, bottom + 34, x.label, "middle", "tick"))
    return _svg(PANEL_WIDTH, bottom + _BOTTOM, marks, title)


def depth_chart(curves: Sequence[Curve], title: str) -> str:
    """Shares (0..100%) over draft depths 1, 2, ..., one curve per drafter."""
    deepest = max((int(point.x) for curve in curves for point in curve.points), default=1)
    x = Axis("draft depth", "{:.0f}".format, range(1, deepest + 1), "depth {:.0f}".format)
    return chart(curves, title, x, Axis("", "{:.0%}".format, (0, 0.25, 0.5, 0.75, 1), percent), height=190)


def length_chart(curves: Sequence[Curve], ticks: Sequence[str], title: str, axis: str) -> str:
    """Numbers of 1 and more over evenly spaced `ticks` of the `axis`; names stand beside the ends of the curves."""
    x = Axis(axis, lambda place: ticks[int(place)], range(len(ticks)), lambda place: f"{ticks[int(place)]} {axis}")
    return chart(curves, title, x, length_axis(curves), height=250, named=True)


def length_axis(curves: Sequence[Curve]) -> Axis:
    """For numbers of 1 and more, such as acceptance lengths."""
    tops = [point.spread[1] if point.spread else point.y for curve in curves for point in curve.points]
    highest = max(2, math.ceil(2 * max(tops, default=1)) / 2)
    step = 0.5 if highest <= 4 else 1
    rows = [1 + step * number for number in range(int((highest - 1) / step) + 1)]
    return Axis("", "{:g}".format, rows, "{:.3f}".format)


def even_ticks(highest: float) -> list[float]:
    """Four to eight round numbers from zero, the last of them at or above `highest`."""
    if highest <= 0:
        return [0.0, 1.0]
    step = 10.0 ** math.floor(math.log10(highest / 4))
    step *= next(factor for factor in (1, 2, 2.5, 5, 10) if highest / (factor * step) <= 7)
    return [round(step * number, 10) for number in range(math.ceil(highest / step - 1e-9) + 1)]


def histogram(counts: Sequence[int], title: str, color: str) -> str:
    """Vertical bars over 0, 1, 2, ... accepted drafts per step, each with its share of all steps."""
    left, right, top, plot_height = 8, 8, 20, 110
    width = max(150, 46 * len(counts) + left + right)
    total, highest = max(1, sum(counts)), max(1, *counts)
    slot = (width - left - right) / len(counts)
    bottom = top + plot_height
    marks = [f'<path class="axis" d="M{left} {bottom}H{width - right}"/>']
    for accepted, count in enumerate(counts):
        height = plot_height * count / highest
        x = left + slot * accepted
        place = f'x="{x + slot * 0.16:.1f}" y="{bottom - height:.1f}" width="{slot * 0.68:.1f}" height="{height:.1f}"'
        hover = f"{accepted} accepted: {count} steps"
        marks.append(f'<rect class="fill" style="--c:{color}" {place} rx="2"><title>{hover}</title></rect>')
        marks.append(_text(x + slot / 2, bottom - height - 9, percent(count / total), "middle", "tick"))
        marks.append(_text(x + slot / 2, bottom + 13, str(accepted), "middle", "tick"))
    marks.append(_text(width / 2, bottom + 31, "drafts accepted in a step", "middle", "tick"))
    return _svg(width, bottom + 40, marks, title, natural=True)


def tree_chart(paths: Sequence[Sequence[int]], shares: Sequence[float], hovers: Sequence[str], title: str) -> str:
    """A draft tree: one node per path of ranks, labelled with its rank, drawn larger and fuller the likelier it is.

    Args:
      paths: per node the ranks from the root (`[0]` is the first choice at depth 1), in any order.
      shares: per node, accepted in this share of all steps, 0..1.
      hovers: per node, what hovering over it tells.
      title: read out to those who cannot see the drawing.

    Raises:
      UserError: a path without its parent.
    """
    nodes = [tuple(path) for path in paths]
    for node in nodes:
        if node[:-1] and node[:-1] not in nodes:
            raise UserError(f"the tree of the report holds the path {list(node)} but not its parent {list(node[:-1])}")
    spots = _layout(nodes)
    leaves = 1 + max(x for x, _ in spots.values())
    depth = max(y for _, y in spots.values())
    gap = min(64.0, max(20.0, 900 / leaves))
    row, margin = 62, 34
    width = max(320.0, gap * (leaves - 1) + 2 * margin)
    shift = (width - gap * (leaves - 1)) / 2
    at = {node: (shift + gap * x, 24 + row * y) for node, (x, y) in spots.items()}

    edges, marks = [], []
    for node, share, hover in zip(nodes, shares, hovers, strict=True):
        (x, y), (px, py) = at[node], at[node[:-1]]
        middle = (y + py) / 2
        strength = math.sqrt(min(1.0, max(0.0, share)))
        edges.append(
            f'<path class="edge" style="stroke-width:{0.8 + 5 * strength:.1f}" '
            f'd="M{px:.1f} {py:.1f}C{px:.1f} {middle:.1f} {x:.1f} {middle:.1f} {x:.1f} {y:.1f}"/>'
        )
        radius = 4 + 10 * strength
        marks.append(f"<g><title>{html.escape(hover)}</title>{_node(x, y, radius, strength)}")
        inside = radius >= 8.5
        style = "rank" if not inside else "onfill" if strength > 0.8 else "node"
        marks.append(_text(x, y if inside else y + radius + 9, str(node[-1]), "middle", style) + "</g>")
    x, y = at[()]
    marks.append(f'<rect class="root" x="{x - 20:.1f}" y="{y - 11:.1f}" width="40" height="22" rx="6"/>')
    marks.append(_text(x, y, "root", "middle", "node"))
    for level in range(1, depth + 1):
        marks.append(_text(4, 24 + row * level, f"{level}", "start", "tick"))
    return _svg(width, 24 + row * depth + 30, edges + marks, title, natural=True)


def _layout(nodes: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], tuple[float, int]]:
    """Column and depth of the root and every node: leaves side by side, parents above the middle of their children."""
    spots: dict[tuple[int, ...], tuple[float, int]] = {}
    next_leaf = 0

    def place(node: tuple[int, ...]) -> float:
        nonlocal next_leaf
        children = sorted(child for child in nodes if child and child[:-1] == node)
        if children:
            columns = [place(child) for child in children]
            column = (columns[0] + columns[-1]) / 2
        else:
            column = float(next_leaf)
            next_leaf += 1
        spots[node] = (column, len(node))
        return column

    place(())
    return spots


def _node(x: float, y: float, radius: float, strength: float) -> str:
    place = f'cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}"'
    opacity = 0.12 + 0.88 * strength
    return f'<circle class="blank" {place}/><circle class="leaf" style="fill-opacity:{opacity:.2f}" {place}/>'


def _rounded_bar(x: float, y: float, width: float, height: float) -> str:
    """A bar square at its base, on the axis, and rounded at its end."""
    radius = min(4.0, width)
    return (
        f"M{x:.1f} {y:.1f}h{width - radius:.1f}a{radius:.1f} {radius:.1f} 0 0 1 {radius:.1f} {radius:.1f}"
        f"v{height - 2 * radius:.1f}a{radius:.1f} {radius:.1f} 0 0 1 {-radius:.1f} {radius:.1f}h{radius - width:.1f}z"
    )


Place = Callable[[float, float], tuple[float, float]]


def _placing(across: tuple[float, float], down: tuple[float, float], xs: Sequence[float], ys: Sequence[float]) -> Place:
    """Where a pair of numbers lies in a rectangle, whose edges are the least and the largest ones."""

    def share(value: float, among: Sequence[float]) -> float:
        low, high = min(among), max(among)
        return (value - low) / (high - low) if high > low else 0.5

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            across[0] + (across[1] - across[0]) * share(x, xs),
            down[0] + (down[1] - down[0]) * share(y, ys),
        )

    return place


def _curve(curve: Curve, place: Place, x: Axis, y: Axis, right: float) -> list[str]:
    """The marks of a curve; names that would pass the `right` edge stand on the other side."""
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
        where = x.told(point.x) if x.told else f"{x.label} {x.form(point.x)}"
        value = y.told(point.y) if y.told else y.form(point.y)
        hover = html.escape(f"{curve.label}, {where}: {value}")
        spot = f'cx="{across:.1f}" cy="{down:.1f}" r="4.5"'
        marks.append(f'<circle class="dot" {style} {spot}><title>{hover}</title></circle>')
        if point.name:
            anchor, aside = ("start", 9) if across < right - 90 else ("end", -9)
            marks.append(_text(across + aside, down + (10 if point.below else -9), point.name, anchor, "tick"))
    return marks


def _names(curves: Sequence[Curve], place: Place) -> list[str]:
    """Every curve's name beside its last mark, moved up off the name below it, and back down from the upper edge."""
    ends = [(place(curve.points[-1].x, curve.points[-1].y), curve.label) for curve in curves if curve.points]
    ends.sort(key=lambda end: -end[0][1])
    free, rows = math.inf, []
    for (_, down), _ in ends:
        free = min(down, free - 13)
        rows.append(free)
    free = _TOP - 6.0
    for index in reversed(range(len(rows))):
        rows[index] = max(rows[index], free)
        free = rows[index] + 13
    return [
        _text(across + 10, row, _short(label), "start", "label", title=label)
        for ((across, _), label), row in zip(ends, rows, strict=True)
    ]


def _short(label: str, limit: int = 20) -> str:
    return label if len(label) <= limit else label[: limit - 1] + "…"


def _text(x: float, y: float, content: str, anchor: str, style: str, title: str = "") -> str:
    hover = f"<title>{html.escape(title)}</title>" if title else ""
    return (
        f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" dy="0.35em" text-anchor="{anchor}">'
        f"{html.escape(content)}{hover}</text>"
    )


def _svg(width: float, height: float, marks: Sequence[str], title: str, natural: bool = False) -> str:
    """Wraps marks; `natural` keeps the drawing at its own size (its frame scrolls), else it fills its panel."""
    size = f' width="{width:.0f}" height="{height:.0f}"' if natural else ""
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}"{size} role="img" aria-label="{html.escape(title)}">'
        f"{''.join(marks)}</svg>"
    )
