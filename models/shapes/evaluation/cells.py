"""Cells of the sampler sweep: one row per combination of sampler, schedule, steps and guidance."""

from dataclasses import dataclass
from pathlib import Path

from measuring.rows import Row, append_line
from models.shapes.evaluation import scoring
from models.shapes.evaluation.results import read_rows

#: Samplers for models that were distilled for them, which the bundle's need not be.
FOR_OTHER_MODELS = frozenset({"lcm", "tcd"})


@dataclass(frozen=True, kw_only=True)
class Cell(Row):
    """One sampler with one number of steps, measured; `seconds` are those of each image.

    Attributes:
        calls: Denoiser calls of an image.
        counts: How much of the prompts the images show.
        distance: Fréchet distance between the images and renders of the same captions.
        floor: The same for as many renders in place of the images: the distance of perfect ones.
    """

    calls: int
    counts: scoring.Tally
    distance: float
    floor: float

    @property
    def sampler(self) -> str:
        """Name of the sampler."""
        return str(self.settings["sampler"])

    @property
    def steps(self) -> int:
        """Steps that were asked for."""
        return int(self.settings["num_inference_steps"])


def read_cells(path: Path) -> list[Cell]:
    """Return the cells of a results file, oldest first; none if there is no file.

    Raises:
        LdmError: A line is not a cell.
    """
    return list(read_rows(path, Cell, "cell of a sweep"))


def append_cell(path: Path, cell: Cell) -> None:
    """Add a cell to a results file."""
    append_line(path, cell.as_dict())
