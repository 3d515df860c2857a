"""Curves as inline SVG, made of nothing but numbers: for a page that needs no script and no plotter.

Colours are classes (`c0` ...), so that the page's style chooses them for light, dark and paper. Needs no
torch.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import Literal, NamedTuple

Point = tuple[float, float]
WIDTH, HEIGHT = 460, 280
LEFT, RIGHT, TOP, BOTTOM = 64, 12, 10, 44
"""Margins, in units of the drawing."""
MOST_POINTS = 300
"""Points of a curve that are drawn: more than there are pixels to show them."""
LOG_FROM = 10.0
"""Ratio of largest to smallest value from which a log axis shows more."""
LEGEND_LINE = 15
STYLE_ALONE = """<style>
.page { fill: #fff; } text { fill: #1c2024; font: 12.5px system-ui, sans-serif; }
path { fill: none; stroke: #1c2024; } .grid { stroke: #8885; stroke-width: .6; }
.line, .marked { stroke-width: 2; } .faint { opacity: .4; } .dashed { stroke-dasharray: 6 4; }
.c0 { stroke: #2563c9; } .c1 { stroke: #c2570c; } .c2 { stroke: #15803d; } .c3 { stroke: #9333a8; }
.dot, .bar { stroke: none; } .dot.c0, .bar.c0 { fill: #2563c9; } .dot.c1, .bar.c1 { fill: #c2570c; }
.dot.c2, .bar.c2 { fill: #15803d; } .dot.c3, .bar.c3 { fill: #9333a8; }
</style>
"""


class Curve(NamedTuple):
    """One line or cloud of points."""

    label: str
    """In the legend; "" for none."""
    points: Sequence[Point]
    drawn: Literal["line", "faint", "dashed", "marked"]
    colour: str
    """A CSS class."""


class Axes(NamedTuple):
    """What the axes say, and how the vertical one goes."""

    x: str
    y: str
    """Quantity and unit."""
    log: bool = False
    until: float = 0.0
    """Where the x axis ends if it begins at 0, so that several plots share it; 0 = as the points need."""


class _Frame(NamedTuple):
    """From numbers to places in the drawing."""

    x: Callable[[float], float]
    y: Callable[[float], float]


def finite(points: Iterable[Point]) -> list[Point]:
    """The points whose both numbers are finite, by rising x."""
    return sorted(point for point in points if math.isfinite(point[0]) and math.isfinite(point[1]))


def smoothed(points: Sequence[Point], window: int) -> list[Point]:
    """Running mean over `window` neighbours, centred; fewer, but as many to each side, towards the ends.

    A straight line stays what it is. Where less than a third of a window is left, there is no point. Of very many points it is taken at about `MOST_POINTS` places.
    """
    values = [value for _, value in points]
    result = []
    for place in range(0, len(points), max(1, len(points) // MOST_POINTS)):
        half = min(window // 2, place, len(points) - 1 - place)
        if half < window // 6:
            continue
        # summed anew at each place: with running sums one spike would drown all that comes after it
        total = math.fsum(values[place - half : place + half + 1])
        result.append((points[place][0], total / (2 * half + 1)))
    return result


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most `most` (an even number) points: of each stretch the lowest and the highest, so no peak is lost."""
    if len(points) <= most:
        return list(points)
    kept: list[Point] = []
    stretches = most // 2
    for number in range(stretches):
        part = points[number * len(points) // stretches : (number + 1) * len(points) // stretches]
        kept += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return kept


def log_helps(values: Sequence[float]) -> bool:
    """Whether a log axis shows more: all values are positive, and span a factor of ten or more."""
    return bool(values) and min(values) > 0 and max(values) / min(values) >= LOG_FROM


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) from `low` to `high`, about `count`."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten from `low` to `high`, both positive; with their 2 and 5 if there are few."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(decades) <= 4 else (1,)
    stride = max(1, len(decades) // 7)
    found = [
        float(f"{factor * 10.0**decade:.12g}") for decade in decades[::stride] for factor in factors
    ]
    return [value for value in found if low * 0.999 <= value <= high * 1.001]


def short_number(value: float) -> str:
    """A number in a few characters: 1e-4, 0.05, 1.5, 20k, 3M."""
    if value == 0:
        return "0"
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.9995:
            return f"{value / size:.4g}{letter}"
    text = f"{value:.4g}"
    return (
        f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-")
        if abs(value) < 0.01 and len(text) > 5
        else text
    )


def line_plot(title: str, curves: Sequence[Curve], axes: Axes) -> str:
    """An `svg` element of some curves; "" if none has a point.

    Args:
        title: read out by screen readers.
        curves: drawn one over the other; points that are no finite numbers are left out, as are those
            a log axis cannot show.
        axes: their labels.
    """
    drawn = [curve._replace(points=_showable(curve.points, axes)) for curve in curves]
    drawn = [curve for curve in drawn if curve.points]
    if not drawn:
        return ""
    xs = [x for curve in drawn for x, _ in curve.points]
    ys = [y for curve in drawn for _, y in curve.points]
    across = (0.0, 1.03 * max(axes.until, *xs)) if axes.until else _widened(min(xs), max(xs))
    upright = _span(ys, axes.log)
    frame = _frame(across, upright, axes.log)
    labels = [curve for curve in drawn if curve.label]
    height = _height(labels)
    parts = [
        f'<svg class="plot" viewBox="0 0 {WIDTH} {height}" role="img">',
        f"<title>{escape(title)}</title>",
        *_grid_lines(frame, across, upright, axes),
        *(_curve(curve, frame) for curve in drawn),
        *(_legend(labels) if len(labels) > 1 else ()),
        "</svg>",
    ]
    return "\n".join(part for part in parts if part)


def bar_plot(title: str, groups: Sequence[tuple[str, Sequence[float]]], axes: Axes) -> str:
    """An `svg` element of bars, one for each value; "" without any. Zero is always in view.

    Args:
        title: read out by screen readers.
        groups: labels with their values, the same number of each; a place on the x axis for each number.
        axes: their labels; the vertical one is linear.
    """
    values = [value for _, group in groups for value in group if math.isfinite(value)]
    if not values:
        return ""
    places = len(groups[0][1])
    across, upright = (-0.5, places - 0.5), _widened(min(0.0, *values), max(0.0, *values))
    frame = _frame(across, upright, log=False)
    labels = [Curve(label, (), "line", f"c{number}") for number, (label, _) in enumerate(groups)]
    height = _height(labels)
    wide = 0.8 / len(groups)
    bars = [
        _bar(frame, place - 0.4 + number * wide, wide, value, f"c{number}")
        for number, (_, group) in enumerate(groups)
        for place, value in enumerate(group)
        if math.isfinite(value)
    ]
    return "\n".join(
        [
            f'<svg class="plot" viewBox="0 0 {WIDTH} {height}" role="img">',
            f"<title>{escape(title)}</title>",
            *_grid_lines(frame, (0.0, places - 1.0), upright, axes),
            *bars,
            *(_legend(labels) if len(labels) > 1 else ()),
            "</svg>",
        ]
    )


def _showable(points: Sequence[Point], axes: Axes) -> list[Point]:
    shown = [point for point in finite(points) if point[1] > 0 or not axes.log]
    return thinned(shown)


def _span(values: Sequence[float], log: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    if not log:
        return _widened(low, high)
    return (low / 1.1, high * 1.1) if high > low else (low / 2, high * 2)


def _widened(low: float, high: float) -> tuple[float, float]:
    if high > low:
        edge = 0.04 * (high - low)
        return (low - edge if low else 0.0, high + edge if high else 0.0)
    edge = abs(low) * 0.1 or 1.0
    return low - edge, high + edge


def _frame(across: tuple[float, float], upright: tuple[float, float], log: bool) -> _Frame:
    scale: Callable[[float], float] = math.log10 if log else float
    low, high = scale(upright[0]), scale(upright[1])
    wide, tall = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    return _Frame(
        lambda x: LEFT + wide * (x - across[0]) / (across[1] - across[0]),
        lambda y: TOP + tall * (high - scale(y)) / (high - low),
    )


def _grid_lines(
    frame: _Frame, across: tuple[float, float], upright: tuple[float, float], axes: Axes
) -> list[str]:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = []
    for value in (log_ticks if axes.log else ticks)(*upright):
        y = frame.y(value)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{right}"/>')
        parts.append(
            f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{short_number(value)}</text>'
        )
    for value in ticks(*across):
        x = frame.x(value)
        parts.append(f'<path class="grid" d="M{x:.1f} {TOP}V{bottom}"/>')
        parts.append(
            f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{short_number(value)}</text>'
        )
    middle = (TOP + bottom) / 2
    word = f"{axes.y} (log)" if axes.log else axes.y
    return [
        *parts,
        f'<text x="{(LEFT + right) / 2}" y="{bottom + 35}" text-anchor="middle">{escape(axes.x)}</text>',
        f'<text transform="translate(13 {middle}) rotate(-90)" text-anchor="middle">'
        f"{escape(word)}</text>",
    ]


def _curve(curve: Curve, frame: _Frame) -> str:
    places = [f"{frame.x(x):.1f} {frame.y(y):.1f}" for x, y in curve.points]
    style = f"{curve.drawn} {curve.colour}"
    line = f'<path class="{style}" d="M{"L".join(places)}"/>' if len(places) > 1 else ""
    if curve.drawn != "marked" and line:
        return line
    dots = "".join(
        f'<circle class="dot {curve.colour}" cx="{place.split()[0]}" cy="{place.split()[1]}" r="2.5"/>'
        for place in places
    )
    return line + dots


def _bar(frame: _Frame, left: float, wide: float, value: float, colour: str) -> str:
    top, base = sorted((frame.y(value), frame.y(0.0)))
    x, width = frame.x(left), frame.x(left + wide) - frame.x(left)
    return (
        f'<rect class="bar {colour}" x="{x:.1f}" y="{top:.1f}" width="{width:.1f}" '
        f'height="{base - top:.1f}"/>'
    )


def _height(labels: Sequence[Curve]) -> int:
    """Of the drawing; a legend is below where there is more than one label."""
    return HEIGHT + (LEGEND_LINE * -(-len(labels) // 2) + 4) * (len(labels) > 1)


def _legend(curves: Sequence[Curve]) -> list[str]:
    parts = []
    for number, curve in enumerate(curves):
        x = LEFT + (number % 2) * (WIDTH - LEFT - RIGHT) / 2
        y = HEIGHT + LEGEND_LINE * (number // 2 + 1) - 4
        parts.append(f'<path class="{curve.drawn} {curve.colour}" d="M{x:.1f} {y - 4}h18"/>')
        parts.append(f'<text x="{x + 24:.1f}" y="{y}">{escape(curve.label)}</text>')
    return parts


def standing_alone(plot: str) -> str:
    """A plot as an SVG file of its own, dark on white.

    Args:
        plot: what `line_plot` or `bar_plot` gives.
    """
    start = '<svg class="plot"'
    return (
        plot.replace(start, f'{start} xmlns="http://www.w3.org/2000/svg"', 1).replace(
            "<title>", f'{STYLE_ALONE}<rect class="page" width="100%" height="100%"/>\n<title>', 1
        )
        + "\n"
    )
