"""The page and the charts of the sampler sweep."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from PIL import Image

from ldm_runtime.errors import LdmError
from models.shapes.evaluation import charts
from models.shapes.evaluation.cells import Cell, read_cells
from models.shapes.evaluation.quality import (
    MEASURES,
    by_sampler,
    farthest_as_good,
    label,
    latest_cells,
    lowest_as_good,
    share_of,
)
from models.shapes.evaluation.quality_page import page

_COLORS = (
    *("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#e07b00"),
    *("#17a2b8", "#8c564b", "#d154a8", "#7f7f7f", "#a3a31a"),
)
_PANEL, _LEGEND_WIDTH = (540, 400), 190  # pixels


def write_report(results: Path, docs: Path) -> Path:
    """Write quality.md and quality.png into a folder and return the path of the first.

    Args:
        results: A results file; shown are the cells that asked the same of the same bundle as its
            last line.
        docs: The folder.

    Raises:
        LdmError: There are no cells, or a line is not one.
    """
    cells = latest_cells(read_cells(results))
    if not cells:
        raise LdmError(f"there is nothing to report in {results}; run evaluate.py --sweep first")
    docs.mkdir(parents=True, exist_ok=True)
    draw_charts(cells).save(docs / "quality.png", optimize=True)
    path = docs / "quality.md"
    path.write_text(page(cells))
    return path


def draw_charts(cells: Sequence[Cell]) -> Image.Image:
    """Return four charts over denoiser calls, a line per sampler, and the legend next to them.

    The shaded band is as good as many steps.
    """
    calls = charts.logarithmic_axis("denoiser calls per image", [cell.calls for cell in cells])
    shares = charts.Axis(label="", ticks=(0, 0.2, 0.4, 0.6, 0.8, 1), form=".0%")
    distances = charts.logarithmic_axis(
        "", [value for cell in cells for value in (cell.distance, cell.floor)]
    )
    panels = [
        charts.draw_chart(
            f"{measure.replace('_', ' ')} right",
            calls,
            shares,
            _lines(cells, partial(share_of, measure=measure)),
            band=(lowest_as_good(cells, measure), 1),
            size=_PANEL,
        )
        for measure in MEASURES
    ]
    lines = _lines(cells, lambda cell: cell.distance)
    near = (distances.ticks[0], min(farthest_as_good(cells), distances.ticks[-1]))
    panels.append(
        charts.draw_chart(
            "distance from right images", calls, distances, lines, band=near, size=_PANEL
        )
    )
    return charts.side_by_side(
        charts.grid(panels, columns=2), charts.draw_legend(lines, _LEGEND_WIDTH)
    )


def _lines(cells: Sequence[Cell], value: Callable[[Cell], float]) -> list[charts.Series]:
    """Return a line over denoiser calls for each sampler, all unlike each other up to 20."""
    marks = list(charts.MARKS)
    return [
        charts.Series(
            label=label(sampler),
            points=[(cell.calls, value(cell)) for cell in own],
            color=_COLORS[index % len(_COLORS)],
            mark=marks[index % len(marks)],
        )
        for index, (sampler, own) in enumerate(by_sampler(cells).items())
    ]
