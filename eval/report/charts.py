"""Charts as inline SVG strings, drawn by hand: no script, no font, no colour of their own.

Colours come from the page as CSS variables (`eval/report/report.css`), so one drawing serves light and dark. Each
function takes plain numbers and returns one `<svg>` element; hovering over a mark shows its exact value.
"""

import dataclasses
import html
import math
from collections.abc import Sequence

from models.errors import UserError

PANEL_WIDTH = 460


@dataclasses.dataclass(frozen=True)
class Bar:
    """One horizontal bar: its label, length, printed value, range over repeats (or None) and CSS colour."""

    label: str
    value: float
    text: str
    color: str
    spread: tuple[float, float] | None = None


@dataclasses.dataclass(frozen=True)
class Line:
    """One line over depths 1, 2, ... (values in 0..1) or over other ticks; None is left out."""

    label: str
    values: Sequence[float | None]
    color: str


def percent(share: float) -> str:
    """`0.4217` as `42%`, small shares with more digits, so that nothing but zero prints as 0%."""
    if 0 < share < 0.0005:
        return "<0.1%"
    return f"{100 * share:.1f}%" if 0 < share < 0.0995 else f"{100 * share:.0f}%"


def bar_chart(bars: Sequence[Bar], title: str, reference: float) -> str:
    """Horizontal bars from zero with their values at the end and a dashed line at `reference`."""
    row, top, left, right = 34, 14, 20 + 7.6 * max(len(_short(bar.label)) for bar in bars), 56
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
        marks.append(_text(left - 10, middle, _short(bar.label), "end", "label", title=bar.label))
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


def line_chart(lines: Sequence[Line], title: str) -> str:
    """Shares (0..100%) by draft depth, one line per drafter."""
    left, right, top, plot_height = 44, 18, 10, 190
    depths = max(len(line.values) for line in lines)
    plot = PANEL_WIDTH - left - right

    def point(index: int, value: float) -> tuple[float, float]:
        return left + plot * (0.5 if depths == 1 else index / (depths - 1)), top + plot_height * (1 - value)

    marks = []
    for share in (0, 0.25, 0.5, 0.75, 1):
        y = top + plot_height * (1 - share)
        marks.append(f'<path class="grid" d="M{left - 6} {y:.1f}H{PANEL_WIDTH - right + 6}"/>')
        marks.append(_text(left - 12, y, f"{100 * share:.0f}%", "end", "tick"))
    for index in range(depths):
        marks.append(_text(point(index, 0)[0], top + plot_height + 16, str(index + 1), "middle", "tick"))
    for line in lines:
        points = [(*point(index, value), index, value) for index, value in enumerate(line.values) if value is not None]
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y, _, _ in points) if points else ""
        marks.append(f'<path class="line" style="--c:{line.color}" d="{path}"/>')
        for x, y, index, value in points:
            hover = html.escape(f"{line.label}, depth {index + 1}: {percent(value)}")
            place = f'cx="{x:.1f}" cy="{y:.1f}" r="4.5"'
            marks.append(f'<circle class="dot" style="--c:{line.color}" {place}><title>{hover}</title></circle>')
    marks.append(_text(left + plot / 2, top + plot_height + 34, "draft depth", "middle", "tick"))
    return _svg(PANEL_WIDTH, top + plot_height + 44, marks, title)


def value_chart(lines: Sequence[Line], ticks: Sequence[str], title: str, axis: str) -> str:
    """Numbers of 1 and more, one line per method, over evenly spaced `ticks` of the `axis`; names stand at the ends."""
    left, right, top, plot_height = 34, 142, 10, 250
    plot = PANEL_WIDTH - left - right
    values = [value for line in lines for value in line.values if value is not None]
    highest = max(2, math.ceil(2 * max(values, default=1)) / 2)

    def point(index: int, value: float) -> tuple[float, float]:
        share = (value - 1) / (highest - 1)
        return left + plot * (0.5 if len(ticks) == 1 else index / (len(ticks) - 1)), top + plot_height * (1 - share)

    marks = []
    step = 0.5 if highest <= 4 else 1
    for number in range(int((highest - 1) / step) + 1):
        y = point(0, 1 + step * number)[1]
        marks.append(f'<path class="grid" d="M{left - 6} {y:.1f}H{PANEL_WIDTH - right + 6}"/>')
        marks.append(_text(left - 12, y, f"{1 + step * number:g}", "end", "tick"))
    for index, tick in enumerate(ticks):
        marks.append(_text(point(index, 1)[0], top + plot_height + 16, tick, "middle", "tick"))
    ends = []
    for line in lines:
        points = [(*point(index, value), index, value) for index, value in enumerate(line.values) if value is not None]
        if not points:
            continue
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y, _, _ in points)
        marks.append(f'<path class="line" style="--c:{line.color}" d="{path}"/>')
        for x, y, index, value in points:
            hover = html.escape(f"{line.label}, {ticks[index]} {axis}: {value:.3f}")
            place = f'cx="{x:.1f}" cy="{y:.1f}" r="4"'
            marks.append(f'<circle class="dot" style="--c:{line.color}" {place}><title>{hover}</title></circle>')
        ends.append((points[-1][1], points[-1][0], line))
    # From the lowest up, a name moves off the one below it.
    free = math.inf
    for y, x, line in sorted(ends, key=lambda end: -end[0]):
        free = min(y, free - 13)
        marks.append(_text(x + 10, free, _short(line.label), "start", "label", title=line.label))
    marks.append(_text(left + plot / 2, top + plot_height + 34, axis, "middle", "tick"))
    return _svg(PANEL_WIDTH, top + plot_height + 44, marks, title)


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
