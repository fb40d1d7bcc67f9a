"""Conclusions from a sweep: which cells are as good as many steps, as a chart and as a page."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence

from models.shapes.evaluation.cells import FOR_OTHER_MODELS, Cell

#: Measures, each by its name in `Tally.shares`, and how many of it a cell is asked for.
MEASURES: Mapping[str, Callable[[Cell], int]] = {
    "objects": lambda cell: cell.counts.objects,
    "relations": lambda cell: cell.counts.relations,
    "whole_images": lambda cell: cell.counts.images,
}
#: How far below a share is as good, in addition to the binomial error.
ONE_POINT = 0.01
#: How much farther from right images is as good; distances of as good sets differ by a tenth.
FARTHER = 1.25


def latest_cells(cells: Sequence[Cell]) -> list[Cell]:
    """Return the cells asked the same of the same bundle as the last; of two alike, the later."""

    def setup(cell: Cell) -> tuple[object, ...]:
        return cell.bundle_sha256, cell.settings["captions"], cell.settings["guidance_scale"]

    asked = [cell for cell in cells if setup(cell) == setup(cells[-1])]
    return list({(cell.sampler, cell.steps): cell for cell in asked}.values())


def by_sampler(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """Return the cells of each sampler, those with fewer steps first."""
    ordered = sorted(cells, key=lambda cell: cell.steps)
    names = dict.fromkeys(cell.sampler for cell in cells)
    return {name: [cell for cell in ordered if cell.sampler == name] for name in names}


def share_of(cell: Cell, measure: str) -> float:
    """Return the share of a measure that is right; 0 where nothing was asked for."""
    return cell.counts.shares()[measure] or 0.0


def plateau(cells: Sequence[Cell]) -> list[Cell]:
    """Return the cell with the most steps of every sampler, but those for other models.

    What many steps give is the median of these. The best of all cells would be the luckiest: of a
    hundred alike, one lies more than two standard errors above the others.
    """
    last = [own[-1] for own in by_sampler(cells).values()]
    return [cell for cell in last if cell.sampler not in FOR_OTHER_MODELS] or last


def lowest_as_good(cells: Sequence[Cell], measure: str) -> float:
    """Return the share from which a cell is as good as the plateau.

    It is one percentage point and the binomial standard error below the plateau's share.
    """
    last = plateau(cells)
    share = statistics.median(share_of(cell, measure) for cell in last)
    error = math.sqrt(share * (1 - share) / max(MEASURES[measure](last[0]), 1))
    return max(share - ONE_POINT - error, 0.0)


def farthest_as_good(cells: Sequence[Cell]) -> float:
    """Return the distance up to which a cell is as good as the plateau."""
    return FARTHER * statistics.median(cell.distance for cell in plateau(cells))


def as_good_as_many_steps(cells: Sequence[Cell]) -> list[Cell]:
    """Return the cells as good as the plateau in everything, those with the fewest calls first.

    Of as many calls, those with the most whole images right come first, and of as many of these,
    those whose images are nearest to right ones. Samplers for other models are left out.
    """
    farthest = farthest_as_good(cells)
    lowest = {measure: lowest_as_good(cells, measure) for measure in MEASURES}
    good = [
        cell
        for cell in cells
        if cell.sampler not in FOR_OTHER_MODELS
        and cell.distance <= farthest
        and all(share_of(cell, measure) >= share for measure, share in lowest.items())
    ]
    return sorted(
        good, key=lambda cell: (cell.calls, -share_of(cell, "whole_images"), cell.distance)
    )


def label(sampler: str) -> str:
    """Return the name of a sampler, and whether it is for other models."""
    return f"{sampler} (other models)" if sampler in FOR_OTHER_MODELS else sampler
