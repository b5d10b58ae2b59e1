"""Where the marks of a plot go: plain geometry in pixels, for a template to draw as inline SVG.

Two kinds of panel: scatter (one mark for each method, with the 95 % interval in both directions)
and curves over a number of edits. Labels stand beside their marks, each where it covers nothing
else; one that finds no such place is left out, and the title of the mark still tells.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 340.0, 290.0  # of a panel
LEFT, RIGHT, TOP, BOTTOM = 46.0, 14.0, 14.0, 44.0  # margins
END = 108.0  # right margin of curves, where their labels are
LETTER, LINE, RADIUS = 6.2, 13.0, 6.0  # width of a letter, height of a label, reach of a mark
LONGEST = 28  # letters of a label
HUES = 6  # colours of curves; further ones are told apart by dashes

Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Point:
    """What is plotted of one method: values with bounds, as (value, low, high) by axis."""

    label: str
    kind: str  # front, method or reference
    title: str
    values: Mapping[str, tuple[float, float, float]]


@dataclass(frozen=True)
class Curve:
    """One line: (x, y, title) of its points, in the order of x."""

    label: str
    points: Sequence[tuple[float, float, str]]


@dataclass(frozen=True)
class Mark:
    """A point as drawn; ``whiskers`` are (x1, y1, x2, y2)."""

    x: float
    y: float
    kind: str
    title: str
    whiskers: Sequence[Box]
    label: str = ""
    label_x: float = 0.0
    label_y: float = 0.0
    anchor: str = "start"


@dataclass(frozen=True)
class Line:
    """A curve as drawn: ``path`` is the SVG path, ``hue`` and ``dash`` are numbers from 0 on."""

    path: str
    dots: Sequence[tuple[float, float, str]]
    hue: int
    dash: int
    label: str
    label_x: float
    label_y: float


@dataclass(frozen=True)
class Panel:
    """One plot; ticks are (pixel, text)."""

    x_title: str
    y_title: str
    x_ticks: Sequence[tuple[float, str]]
    y_ticks: Sequence[tuple[float, str]]
    left: float
    right: float
    top: float
    bottom: float
    marks: Sequence[Mark] = ()
    lines: Sequence[Line] = ()


@dataclass(frozen=True)
class Axis:
    """Maps values in [low, high] to pixels from ``start`` to ``end``; ``log``: by ratios."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The pixel of a value, to a tenth; values outside lie at the edge."""
        low, high, value = (self._scaled(one) for one in (self.low, self.high, value))
        part = min(max((value - low) / (high - low), 0.0), 1.0)
        return round(self.start + part * (self.end - self.start), 1)

    def _scaled(self, value: float) -> float:
        return math.log(value) if self.log else value


def scatter(points: Sequence[Point], across: str, up: str) -> Panel:
    """Two of the points' values against each other, both shares shown in percent.

    The axes hold all values and begin where there are some: a difference of two points between
    methods must not vanish in a plot from 0 to 100. Whiskers end at the frame.
    """
    low, high = _domain(point.values[across][0] for point in points)
    x = Axis(low, high, LEFT, WIDTH - RIGHT)
    low, high = _domain(point.values[up][0] for point in points)
    y = Axis(low, high, HEIGHT - BOTTOM, TOP)
    at = [(x(point.values[across][0]), y(point.values[up][0])) for point in points]
    labels = _placed(points, at)
    marks = []
    for point, (px, py), label in zip(points, at, labels, strict=True):
        (_, left, right), (_, least, most) = point.values[across], point.values[up]
        whiskers = [(x(left), py, x(right), py), (px, y(least), px, y(most))]
        marks.append(Mark(px, py, point.kind, point.title, whiskers, *label))
    return Panel(
        across,
        up,
        [(x(tick), f"{100 * tick:.0f}") for tick in _ticks(x.low, x.high)],
        [(y(tick), f"{100 * tick:.0f}") for tick in _ticks(y.low, y.high)],
        LEFT,
        WIDTH - RIGHT,
        TOP,
        HEIGHT - BOTTOM,
        marks=marks,
    )


def curves(found: Sequence[Curve], title: str, across: str, log: bool = False) -> Panel:
    """Lines over a count. Shares run from 0 to 100 %; with ``log``, any positive quantity."""
    counts = [point[0] for curve in found for point in curve.points]
    last = max(counts)
    x = Axis(0.0, last, LEFT, WIDTH - END)
    if log:
        heights = [point[1] for curve in found for point in curve.points]
        low, high = min(heights) / 1.05, max(heights) * 1.05
        y = Axis(low, high, HEIGHT - BOTTOM, TOP, log=True)
        y_ticks = [(y(tick), _number(tick)) for tick in _log_ticks(low, high)]
    else:
        y = Axis(0.0, 1.0, HEIGHT - BOTTOM, TOP)
        y_ticks = [(y(tick), f"{100 * tick:.0f}") for tick in _ticks(0.0, 1.0)]
    dots = [[(x(a), y(b), text) for a, b, text in curve.points] for curve in found]
    heights = _apart([one[-1][1] for one in dots], TOP, HEIGHT - BOTTOM)
    lines = [
        Line(
            "M" + "L".join(f"{a} {b}" for a, b, _ in one),
            one,
            number % HUES,
            number // HUES,
            _short(curve.label, 16),
            one[-1][0] + 9,
            height + 4,
        )
        for number, (curve, one, height) in enumerate(zip(found, dots, heights, strict=True))
    ]
    steps = sorted(set(counts))
    kept = steps[:: max(1, math.ceil(len(steps) / 6))]
    x_ticks = [(x(count), f"{count:g}") for count in kept]
    bounds = (LEFT, WIDTH - END, TOP, HEIGHT - BOTTOM)
    return Panel(across, title, x_ticks, y_ticks, *bounds, lines=lines)


def _domain(values: Iterable[float]) -> tuple[float, float]:
    """Whole tenths around shares with some air, at least three of them apart."""
    values = list(values)
    low = max(0, math.floor(10 * min(values) - 0.3))
    high = min(10, math.ceil(10 * max(values) + 0.3))
    low = min(low, max(0, high - 3))
    high = max(high, min(10, low + 3))
    return low / 10, high / 10


def _ticks(low: float, high: float) -> list[float]:
    """Tenths, or every second of them where there are many."""
    step = 1 if high - low < 0.55 else 2
    first = math.ceil(round(10 * low) / step) * step
    return [tick / 10 for tick in range(first, round(10 * high) + 1, step)]


def _log_ticks(low: float, high: float) -> list[float]:
    """At most six round numbers between two positive ones; both ends where there is none."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1, 2, 3, 4, 5, 6, 7, 8, 9), (1, 2, 5), (1,)):
        ticks = [digit * 10.0**power for power in decades for digit in digits]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= 6:
            break
    ticks = ticks[:: max(1, math.ceil(len(ticks) / 6))]
    return ticks if len(ticks) > 1 else [low, high]


def _number(tick: float) -> str:
    return f"{tick:,.0f}" if 10 <= tick < 1e6 else f"{tick:.3g}"


def _placed(
    points: Sequence[Point], at: Sequence[tuple[float, float]]
) -> list[tuple[str, float, float, str]]:
    """Text, x, y and anchor of every label; the text is empty where nothing is free."""
    taken: list[Box] = [(x - RADIUS, y - RADIUS, x + RADIUS, y + RADIUS) for x, y in at]
    found = [("", 0.0, 0.0, "start")] * len(points)
    order = sorted(
        range(len(points)), key=lambda one: ("front", "method", "reference").index(points[one].kind)
    )
    for number in order:
        text = _short(points[number].label, LONGEST)
        for x, y, anchor, box in _beside(*at[number], LETTER * len(text)):
            inside = box[0] >= LEFT and box[2] <= WIDTH and box[1] >= 0
            if inside and box[3] <= HEIGHT - BOTTOM and not any(_meet(box, one) for one in taken):
                taken.append(box)
                found[number] = (text, round(x, 1), round(y, 1), anchor)
                break
    return found


def _beside(x: float, y: float, width: float) -> Iterable[tuple[float, float, str, Box]]:
    """Places of a label around a mark, the best first: baseline, anchor and box."""
    for gap in (0.0, LINE, 2 * LINE):
        for down in dict.fromkeys((0.0, -gap, gap)):
            if gap and not down:
                continue
            top, reach = y + down - LINE / 2, RADIUS + 3
            yield x + reach, y + down + 4, "start", (x + reach, top, x + reach + width, top + LINE)
            yield x - reach, y + down + 4, "end", (x - reach - width, top, x - reach, top + LINE)
        for down in (-gap - LINE, gap + LINE):
            top = y + down - LINE / 2
            yield x, y + down + 4, "middle", (x - width / 2, top, x + width / 2, top + LINE)


def _meet(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _apart(heights: Sequence[float], top: float, bottom: float) -> list[float]:
    """Heights moved as little as needed so that a label fits at each, in the same order; they
    come closer than a label only where there are too many."""
    order = sorted(range(len(heights)), key=lambda one: heights[one])
    step = min(LINE, (bottom - top) / max(1, len(heights) - 1))
    moved = list(heights)
    least = top
    for one in order:
        moved[one] = max(heights[one], least)
        least = moved[one] + step
    most = bottom
    for one in reversed(order):
        moved[one] = min(moved[one], most)
        most = moved[one] - step
    return [round(height, 1) for height in moved]


def _short(text: str, letters: int) -> str:
    return text if len(text) <= letters else text[: letters - 1] + "…"
