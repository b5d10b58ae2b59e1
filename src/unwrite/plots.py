"""Plots for the pages: drawn by matplotlib, coloured by the page.

matplotlib lays out axes, ticks and marks and writes them as SVG. Its colours and fonts are taken
out again and class names put in their place, so that a plot follows the page's style sheet into
dark mode and onto paper, and asks for no style that the page's policy forbids. Every mark gets a
title, which shows on hover, and a reach around it, so that it need not be hit exactly.

Labels stand beside their marks, each where it covers nothing else; one that finds no such place is
left out, and the title of the mark still tells.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 340.0, 290.0  # of a panel, in the pixels of its view box
LEFT, RIGHT, TOP, BOTTOM = 46.0, 14.0, 14.0, 44.0  # margins
END = 108.0  # right margin of curves, where their labels are
LETTER, LINE, RADIUS = 6.2, 13.0, 6.0  # width of a letter, height of a label, reach of a mark
LONGEST = 28  # letters of a label
HUES = 6  # colours of curves; further ones are told apart by dashes
CLASSES = frozenset({"tick", "grid", "title", "whisker", "dot", "curve", "label"})  # in style.css

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


def scatter(points: Sequence[Point], across: str, up: str, name: str) -> Markup:
    """Two of the points' values against each other, both shares shown in percent; ``name`` says in
    words what is seen.

    The axes hold all values and begin where there are some: a difference of two points between
    methods must not vanish in a plot from 0 to 100. Whiskers end at the frame.
    """
    figure, axes = _axes(RIGHT)
    axes.set_xlim(*_domain(point.values[across][0] for point in points))
    axes.set_ylim(*_domain(point.values[up][0] for point in points))
    _shares(axes.xaxis)
    _shares(axes.yaxis)
    axes.set_xlabel(across, gid="title")
    axes.set_ylabel(up, gid="title")
    at = [_pixel(axes, point.values[across][0], point.values[up][0]) for point in points]
    for number, (point, place) in enumerate(zip(points, _placed(points, at), strict=True)):
        (x, left, right), (y, low, high) = point.values[across], point.values[up]
        axes.plot([left, right], [y, y], gid=f"whisker mark-{point.kind}")
        axes.plot([x, x], [low, high], gid=f"whisker mark-{point.kind}")
        shape = "s" if point.kind == "reference" else "o"
        size = 8 if point.kind == "reference" else 10
        axes.plot([x], [y], shape, markersize=size, clip_on=False, gid=f"dot {number}")
        if place is not None:
            _text(axes, *place, gid=f"label {number}")
    drawing = _Drawing(figure, name)
    for number, (point, (x, y)) in enumerate(zip(points, at, strict=True)):
        group = drawing.group(f"mark-{point.kind}", f"dot {number}", f"label {number}")
        drawing.reach(group, x, y, 9, point.title)
    return drawing.svg()


def curves(found: Sequence[Curve], across: str, name: str, log: bool = False) -> Markup:
    """Lines over a count. Shares run from 0 to 100 %; with ``log``, any positive quantity."""
    from matplotlib import ticker

    figure, axes = _axes(END)
    counts = sorted({point[0] for curve in found for point in curve.points})
    axes.set_xlim(0, counts[-1])
    axes.xaxis.set_major_locator(ticker.FixedLocator(counts[:: math.ceil(len(counts) / 6)]))
    axes.xaxis.set_major_formatter(lambda count, _: f"{count:g}")
    axes.set_xlabel(across, gid="title")
    if log:
        heights = [point[1] for curve in found for point in curve.points]
        axes.set_yscale("log")
        low, high = min(heights) / 1.05, max(heights) * 1.05
        axes.set_ylim(low, high)
        axes.yaxis.set_major_locator(_round_numbers(low, high))
        axes.yaxis.set_major_formatter(lambda tick, _: f"{tick:,.6g}")
        axes.yaxis.set_minor_locator(ticker.NullLocator())
    else:
        axes.set_ylim(0, 1)
        _shares(axes.yaxis)
    dots = [[_pixel(axes, x, y) for x, y, _ in curve.points] for curve in found]
    heights = _apart([one[-1][1] for one in dots], TOP, HEIGHT - BOTTOM)
    for number, (curve, one, height) in enumerate(zip(found, dots, heights, strict=True)):
        xs, ys = [x for x, _, _ in curve.points], [y for _, y, _ in curve.points]
        axes.plot(xs, ys, clip_on=False, gid=f"curve {number}")
        axes.plot(xs, ys, "o", markersize=5.2, clip_on=False, gid=f"dot {number}")
        label = _short(curve.label, 16)
        _text(axes, label, one[-1][0] + 9, height + 4, "start", gid=f"label {number}")
    drawing = _Drawing(figure, name)
    for number, (curve, one) in enumerate(zip(found, dots, strict=True)):
        words = f"hue{number % HUES} dash{min(number // HUES, 3)}"
        group = drawing.group(words, f"curve {number}", f"dot {number}", f"label {number}")
        for (x, y), (_, _, text) in zip(one, curve.points, strict=True):
            drawing.reach(group, x, y, 7, text)
    return drawing.svg()


def heat_maps(
    grids: Sequence[tuple[str, Sequence[Sequence[float] | None]]],
    rows: Sequence[str],
    across: str,
    scale: str,
) -> str:
    """A picture by itself, SVG with its own colours: grids of values of at least 0 above one
    another, each with a title and a scale; what is below 0 is as 0. A row that is None stays
    empty."""
    import matplotlib

    with _quietly(), matplotlib.rc_context({"font.size": 9, "axes.titlesize": 10}):
        from matplotlib.figure import Figure

        columns = max(len(row) for _, grid in grids for row in grid if row is not None)
        figure = Figure((3.4 + 0.2 * columns, 0.2 + 2.1 * len(grids)), layout="constrained")
        figure.patch.set_facecolor("white")
        for axes, (title, grid) in zip(
            figure.subplots(len(grids), squeeze=False)[:, 0], grids, strict=True
        ):
            values = [[math.nan] * columns if row is None else list(row) for row in grid]
            most = max((one for row in grid if row is not None for one in row), default=0.0)
            image = axes.pcolormesh(
                values, cmap="Blues", vmin=0, vmax=max(most, 1e-9), edgecolors="white", linewidth=1
            )
            axes.invert_yaxis()
            axes.set_yticks([line + 0.5 for line in range(len(rows))], rows)
            axes.set_xticks([at + 0.5 for at in range(0, columns, 5)], range(0, columns, 5))
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
            axes.set_xlabel(across)
            axes.set_title(title, loc="left", parse_math=False)
            figure.colorbar(image, label=scale).outline.set_visible(False)
        return _written(figure, across)


# ---- matplotlib, and what is left of it ----------------------------------------------------------


def _axes(right: float) -> tuple[Figure, Axes]:
    """An empty panel with a margin on the right; a point of matplotlib's is a pixel of ours."""
    with _quietly():
        from matplotlib.figure import Figure

    figure = Figure((WIDTH / 72, HEIGHT / 72), dpi=72)
    size = (WIDTH - LEFT - right) / WIDTH, (HEIGHT - TOP - BOTTOM) / HEIGHT
    axes = figure.add_axes((LEFT / WIDTH, BOTTOM / HEIGHT, *size))
    axes.spines[:].set_visible(False)
    figure.patch.set_visible(False)
    axes.patch.set_visible(False)
    axes.tick_params(length=0, pad=6)
    axes.grid(True)
    return figure, axes


def _shares(axis: Any) -> None:
    """Ticks at tenths, or every second of them where there are many, told in percent."""
    from matplotlib import ticker

    low, high = axis.get_view_interval()
    axis.set_major_locator(ticker.MultipleLocator(0.1 if high - low < 0.55 else 0.2))
    axis.set_major_formatter(lambda share, _: f"{100 * share:.0f}")


def _round_numbers(low: float, high: float) -> Any:
    """Where two to six ticks stand on a logarithmic axis."""
    from matplotlib import ticker

    for digits in ((1.0, 2.0, 5.0), (1.0,)):
        found = ticker.LogLocator(subs=digits, numticks=6)
        if 2 <= sum(low <= tick <= high for tick in found.tick_values(low, high)) <= 6:
            return found
    return ticker.MaxNLocator(4)


def _pixel(axes: Axes, x: float, y: float) -> tuple[float, float]:
    """Where a point is drawn; one outside of the frame is at its edge."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    inside = min(max(x, left), right), min(max(y, low), high)
    across, up = axes.transData.transform(inside)
    return round(float(across), 1), round(HEIGHT - float(up), 1)


def _text(axes: Axes, text: str, x: float, y: float, anchor: str, gid: str) -> None:
    """Text with its baseline at a pixel. It is text: a dollar sign begins no formula."""
    sides = {"start": "left", "middle": "center", "end": "right"}
    axes.text(
        x,
        HEIGHT - y,
        text,
        transform=None,
        ha=sides[anchor],
        va="baseline",
        gid=gid,
        parse_math=False,
        clip_on=False,
    )


class _Drawing:
    """A figure as a tree of SVG elements without colours, to be grouped and written."""

    def __init__(self, figure: Figure, name: str) -> None:
        for axis in (figure.axes[0].xaxis, figure.axes[0].yaxis):
            for artists, kind in ((axis.get_ticklabels(), "tick"), (axis.get_gridlines(), "grid")):
                for artist in artists:
                    artist.set_gid(kind)
        self.root = ElementTree.fromstring(_written(figure, name))
        self.root.attrib = {
            "class": "panel",
            "viewBox": f"0 0 {WIDTH:g} {HEIGHT:g}",
            "role": "img",
            "aria-label": name,
        }
        self.by_id: dict[str, ElementTree.Element] = {}
        self._parents = {child: parent for parent in self.root.iter() for child in parent}
        used = {
            word.strip("#")
            for element in self.root.iter()
            for key, value in element.attrib.items()
            for word in [value.removeprefix("url(").removesuffix(")")]
            if word.startswith("#")
        }
        for element in list(self.root.iter()):
            self._make_plain(element, used)

    def _make_plain(self, element: ElementTree.Element, used: set[str]) -> None:
        element.tag = element.tag.rpartition("}")[2]
        element.text = element.text if element.tag == "text" else None
        element.tail = None
        if element.tag in ("metadata", "style"):
            self._parents[element].remove(element)
        style = element.attrib.pop("style", "")
        if "text-anchor: " in style:
            element.set("text-anchor", style.partition("text-anchor: ")[2].partition(";")[0])
        for key in [key for key in element.attrib if "}" in key]:  # xlink:href
            element.set(key.rpartition("}")[2], element.attrib.pop(key))
        if element.get("id", "") not in used:
            name = element.attrib.pop("id", "")
            self.by_id[name] = element
            if name.partition(" ")[0] in CLASSES:
                element.set("class", name)

    def group(self, words: str, *names: str) -> ElementTree.Element:
        """A new group of class ``words`` on top, with the elements of these ids inside (those that
        there are); each keeps the first word of its id as its class."""
        group = ElementTree.SubElement(self.root, "g", {"class": words})
        for name in names:
            if (element := self.by_id.get(name)) is not None:
                self._parents[element].remove(element)
                element.set("class", name.partition(" ")[0])
                group.append(element)
        return group

    def reach(
        self, group: ElementTree.Element, x: float, y: float, radius: float, title: str
    ) -> None:
        """Room around a mark in which the pointer finds its title."""
        circle = {"class": "reach", "cx": f"{x:g}", "cy": f"{y:g}", "r": f"{radius:g}"}
        ElementTree.SubElement(
            ElementTree.SubElement(group, "circle", circle), "title"
        ).text = title

    def svg(self) -> Markup:
        """The whole of it."""
        return Markup(ElementTree.tostring(self.root, "unicode"))


def _written(figure: Figure, name: str) -> str:
    """What matplotlib writes: the same bytes for the same figure, ids of other figures apart."""
    import matplotlib

    out = io.StringIO()
    words: Any = {"svg.fonttype": "none", "svg.hashsalt": name}
    with matplotlib.rc_context(words), _quietly():
        figure.savefig(out, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Type")))
    return out.getvalue()


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without remarks on a cache of fonts, and on signs that no font there has: the browser draws
    the text."""
    logger = logging.getLogger("matplotlib")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


# ---- where labels go -----------------------------------------------------------------------------


def _domain(values: Iterable[float]) -> tuple[float, float]:
    """Whole tenths around shares with some air, at least three of them apart."""
    values = list(values)
    low = max(0, math.floor(10 * min(values) - 0.3))
    high = min(10, math.ceil(10 * max(values) + 0.3))
    low = min(low, max(0, high - 3))
    high = max(high, min(10, low + 3))
    return low / 10, high / 10


def _placed(
    points: Sequence[Point], at: Sequence[tuple[float, float]]
) -> list[tuple[str, float, float, str] | None]:
    """Text, x, y and anchor of every label; None where nothing is free."""
    taken: list[Box] = [(x - RADIUS, y - RADIUS, x + RADIUS, y + RADIUS) for x, y in at]
    found: list[tuple[str, float, float, str] | None] = [None] * len(points)
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
