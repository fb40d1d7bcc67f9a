"""Line charts with Pillow alone: axes, series of points, a legend, and charts in a grid."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

SIZE = (440, 300)  # pixels of a chart unless said otherwise
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 24, 36, 50  # margins
_FINER = 3  # rendered this many times larger, then reduced: Pillow's lines have no soft edges
_INK, _GRID, _BAND, _PAPER = "#222222", "#dddddd", "#eef3e6", "#ffffff"
_LETTERS, _LEGEND_ROW = 12, 18
_ROUNDING = 1 + 1e-9  # powers of ten below 1 are not exact
_MARK = 3.5  # half the width of a mark in pixels

Point = tuple[float, float]
#: Corners of each mark in halves of its width, y pointing down; none is a round dot.
MARKS: dict[str, tuple[Point, ...]] = {
    "dot": (),
    "square": ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
    "triangle": ((0.0, -1.1), (1.1, 0.9), (-1.1, 0.9)),
    "diamond": ((0.0, -1.3), (1.3, 0.0), (0.0, 1.3), (-1.3, 0.0)),
}


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A direction of a chart.

    Attributes:
        label: The quantity, with the unit.
        ticks: Values that are written at it, ascending; it runs from the first to the last.
        logarithmic: Whether equal factors are equally far apart.
        form: How a tick is written, as for `format`.
    """

    label: str
    ticks: tuple[float, ...]
    logarithmic: bool = False
    form: str = ".3g"

    def place(self, value: float) -> float:
        """Return how far along a value lies: 0 at the first tick, 1 at the last."""
        scale = math.log if self.logarithmic else float
        low, high = scale(self.ticks[0]), scale(self.ticks[-1])
        return (scale(value) - low) / (high - low)


@dataclass(frozen=True, kw_only=True)
class Series:
    """Points that belong together.

    Attributes:
        label: Its text in the legend.
        points: (x, y), in the order that the line visits them.
        color: As Pillow writes it.
        mark: The marker of each point, one of `MARKS`; None is nothing.
        line: Whether a line joins them.
    """

    label: str
    points: Sequence[Point]
    color: str
    mark: str | None = None
    line: bool = True


def axis_over(
    label: str, values: Iterable[float], *, logarithmic: bool = False, form: str = ".3g"
) -> Axis:
    """Return an axis over all of some values (not all equal), with five ticks equally far apart."""
    known = list(values)
    low, high = min(known), max(known)
    if logarithmic:
        ticks = [low * (high / low) ** (step / 4) for step in range(5)]
    else:
        ticks = [low + (high - low) * step / 4 for step in range(5)]
    return Axis(label=label, ticks=tuple(ticks), logarithmic=logarithmic, form=form)


def logarithmic_axis(label: str, values: Iterable[float]) -> Axis:
    """Return an axis over values above 0, from one round number (1, 2, 3, 5, 10, …) to another."""
    known = list(values)
    decades = range(math.floor(math.log10(min(known))), math.ceil(math.log10(max(known))) + 1)
    rounds = [digit * 10.0**decade for decade in decades for digit in (1, 2, 3, 5)]
    first = max(each for each in rounds if each <= min(known) * _ROUNDING)
    last = min(each for each in rounds if each >= max(known) / _ROUNDING and each > first)
    ticks = tuple(each for each in rounds if first <= each <= last)
    return Axis(label=label, ticks=ticks, logarithmic=True)


def draw_chart(
    title: str,
    x: Axis,
    y: Axis,
    series: Sequence[Series],
    *,
    band: tuple[float, float] | None = None,
    size: tuple[int, int] = SIZE,
) -> Image.Image:
    """Return a chart of `size` pixels; `band` shades the heights from one value to another."""
    canvas = _Canvas(*size)
    width, height = size[0] - _LEFT - _RIGHT, size[1] - _TOP - _BOTTOM

    def place(point: Point) -> Point:
        return _LEFT + width * x.place(point[0]), _TOP + height * (1 - y.place(point[1]))

    if band is not None:
        corners = (place((x.ticks[0], band[1])), place((x.ticks[-1], band[0])))
        canvas.polygon(
            [
                corners[0],
                (corners[1][0], corners[0][1]),
                corners[1],
                (corners[0][0], corners[1][1]),
            ],
            _BAND,
        )
    for tick in y.ticks:
        left, level = place((x.ticks[0], tick))
        canvas.line([(left, level), (left + width, level)], _GRID, 1)
        canvas.text((left - 6, level), format(tick, y.form), "rm")
    for tick in x.ticks:
        column, bottom = place((tick, y.ticks[0]))
        canvas.line([(column, bottom), (column, bottom + 4)], _GRID, 1)
        canvas.text((column, bottom + 6), format(tick, x.form), "ma")
    for each in series:
        _draw_series(canvas, each, [place(point) for point in each.points])
    canvas.text((size[0] / 2, 12), title, "ma")
    canvas.text((_LEFT + width / 2, size[1] - 24), x.label, "ma")
    return canvas.reduced()


def draw_legend(series: Sequence[Series], width: int) -> Image.Image:
    """Return a list of the series, one below the other."""
    canvas = _Canvas(width, _TOP + len(series) * _LEGEND_ROW + _BOTTOM)
    for row, each in enumerate(series):
        level = _TOP + (row + 0.5) * _LEGEND_ROW
        ends = [(6.0, level), (34.0, level)]
        _draw_series(canvas, each, ends if each.line else [])
        if each.mark is not None:
            canvas.mark((20.0, level), each.mark, each.color)
        canvas.text((42, level), each.label, "lm")
    return canvas.reduced()


def grid(images: Sequence[Image.Image], columns: int) -> Image.Image:
    """Return images of one size in rows of `columns`, in reading order."""
    width, height = images[0].size
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height), _PAPER)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        sheet.paste(image, (column * width, row * height))
    return sheet


def side_by_side(left: Image.Image, right: Image.Image) -> Image.Image:
    """Return two images side by side, their tops level."""
    size = (left.width + right.width, max(left.height, right.height))
    sheet = Image.new("RGB", size, _PAPER)
    sheet.paste(left, (0, 0))
    sheet.paste(right, (left.width, 0))
    return sheet


class _Canvas:
    """White paper in pixels of the finished image, rendered finer."""

    def __init__(self, width: int, height: int) -> None:
        self._size = (width, height)
        self._image = Image.new("RGB", (width * _FINER, height * _FINER), _PAPER)
        self._canvas = ImageDraw.Draw(self._image)
        self._font = ImageFont.load_default(_LETTERS * _FINER)

    def line(self, points: Sequence[Point], color: str, width: float) -> None:
        self._canvas.line(_finer(points), fill=color, width=round(width * _FINER), joint="curve")

    def polygon(self, corners: Sequence[Point], color: str) -> None:
        self._canvas.polygon(_finer(corners), fill=color)

    def mark(self, middle: Point, shape: str, color: str) -> None:
        x, y = middle
        corners = [(x + _MARK * dx, y + _MARK * dy) for dx, dy in MARKS[shape]]
        if corners:
            self.polygon(corners, color)
        else:
            self._canvas.circle(_finer([middle])[0], _MARK * _FINER, fill=color)

    def text(self, place: Point, text: str, anchor: str) -> None:
        self._canvas.text(_finer([place])[0], text, fill=_INK, font=self._font, anchor=anchor)

    def reduced(self) -> Image.Image:
        return self._image.resize(self._size, Image.Resampling.LANCZOS)


def _draw_series(canvas: _Canvas, series: Series, places: Sequence[Point]) -> None:
    if series.line and len(places) > 1:
        canvas.line(places, series.color, 1.6)
    if series.mark is not None:
        for place in places:
            canvas.mark(place, series.mark, series.color)


def _finer(points: Sequence[Point]) -> list[Point]:
    return [(x * _FINER, y * _FINER) for x, y in points]
