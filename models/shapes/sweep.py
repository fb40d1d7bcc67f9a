"""Quality against speed: every sampler at several numbers of steps, on the same captions and noise.

    python models/shapes/evaluate.py --sweep --bundle engines/     # measures what is not yet there
    python models/shapes/evaluate.py --report                      # writes docs/quality.*

Each sampler with a number of steps is a cell: one line of JSON, appended when it is done. A sweep
that was stopped goes on where it was; whoever changes a sampler starts with another `--results`.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

import evaluate
import exams
import judging
from ldm_runtime import Generator
from ldm_runtime.errors import LdmError
from ldm_runtime.manifest import MANIFEST_NAME, ModelSpec, sha256_of
from ldm_runtime.request import GenerationRequest
from ldm_runtime.resolution import resolve, sampler_of, sigmas_of
from ldm_runtime.samplers import SAMPLERS
from rows import ROOT, Row, as_line, commit, machine

RESULTS = ROOT / "benchmarks/results/shapes_sweep.jsonl"
CAPTIONS = 64
#: Samplers for models that were distilled for them, which the bundle's need not be.
FOR_OTHER_MODELS = frozenset({"lcm"})
STEPS = (5, 8, 12, 16, 25, 50)
#: Cells with more denoiser calls are left out unless `--steps` asks for them.
MOST_CALLS = 60
_SETTINGS = ("sampler", "num_inference_steps", "schedule", "eta", "guidance_scale")
_STOPPED = 130  # what a shell reports of a program that Ctrl-C ended


@dataclass(frozen=True, kw_only=True)
class Cell(Row):
    """One sampler with one number of steps, measured; `seconds` are those of each picture.

    Attributes:
        calls: Denoiser calls of a picture.
        counts: What the pictures show of what was asked for.
        distance: Fréchet distance between the pictures and renders of the same captions.
        floor: The same for as many renders in place of the pictures: what perfect ones get.
    """

    calls: int
    counts: judging.Tally
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


def run_sweep(
    generator: Generator, todo: Sequence[GenerationRequest], captions: int
) -> Iterator[Cell]:
    """Measure a cell for each request, in order, and yield it.

    Raises:
        LdmError: A cell cannot be drawn.
    """
    exam = exams.prepare_exam(captions)
    evaluate.draw(generator, exam.wanted[0], evaluate.SEED, {"num_inference_steps": 1})  # warms up
    for request in todo:
        yield measure(generator, request, exam)


def measure(generator: Generator, request: GenerationRequest, exam: exams.Exam) -> Cell:
    """Draw and judge every caption as a resolved request says."""
    fields = {name: getattr(request, name) for name in ("sampler", "num_inference_steps")}
    pictures, seconds = evaluate.draw_all(generator, exam.wanted, fields)
    return Cell(
        name="shapes_sweep",
        system=generator.backend,
        commit=commit(),
        bundle_sha256=bundle_hash(generator),
        device=machine(),
        settings=settings_of(request, len(exam.wanted)),
        seconds=tuple(seconds),
        calls=count_calls(request, generator.spec),
        counts=judging.judge_all(exam.wanted, pictures),
        distance=exams.distance_from(exam.reference, np.stack(pictures)),
        floor=exam.floor,
    )


def plan(spec: ModelSpec, samplers: Sequence[str], steps: Sequence[int]) -> list[GenerationRequest]:
    """Return a resolved request for each cell of the grid.

    Args:
        spec: The model.
        samplers: Names; none is all there are.
        steps: Numbers of steps; none is `STEPS` up to `MOST_CALLS`.

    Raises:
        RequestError: There is no such sampler, or it cannot take so many steps.
    """
    requests = [
        resolve(
            GenerationRequest(prompt="", sampler=sampler, num_inference_steps=count, seed=0), spec
        )
        for sampler in samplers or SAMPLERS
        for count in steps or STEPS
    ]
    if steps:
        return requests
    return [request for request in requests if count_calls(request, spec) <= MOST_CALLS]


def count_calls(request: GenerationRequest, spec: ModelSpec) -> int:
    """Return how often a resolved request's sampler calls the denoiser for one picture.

    Counted by running it over the request's sigmas, because first and last steps may differ.
    """
    calls = 0
    nothing = np.zeros((1, 1, 1, 1), np.float32)

    def denoise(latents: npt.NDArray[np.float32], _: float) -> npt.NDArray[np.float32]:
        nonlocal calls
        calls += 1
        return latents

    assert request.eta is not None, "the request is not resolved"
    run = sampler_of(request).function
    sigmas = sigmas_of(request, spec)
    for _ in run(denoise, nothing, sigmas, eta=request.eta, draw=lambda *_: nothing):
        pass
    return calls


def settings_of(request: GenerationRequest, captions: int) -> dict[str, str | int | float]:
    """Return all that tells a cell of one bundle from the others."""
    drawn = {name: getattr(request, name) for name in _SETTINGS}
    return drawn | {"captions": captions, "layouts": exams.LAYOUTS, "seed": evaluate.SEED}


def bundle_hash(generator: Generator) -> str:
    """Return the hash of the manifest of an open bundle."""
    return sha256_of(generator.bundle / MANIFEST_NAME)


def read_cells(path: Path) -> list[Cell]:
    """Return the cells of a results file, oldest first; none if there is no file.

    Raises:
        LdmError: A line is not a cell.
    """
    cells = []
    lines = path.read_text().splitlines() if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            cells.append(msgspec.json.decode(line, type=Cell))
        except msgspec.MsgspecError as error:
            raise LdmError(f"{path}:{number} is no cell of a sweep ({error}); remove it") from error
    return cells


def append_cell(path: Path, cell: Cell) -> None:
    """Add a cell to a results file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(as_line(cell.as_dict()) + "\n")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `evaluate.py --sweep` and `evaluate.py --report`."""
    parser = argparse.ArgumentParser(
        prog="evaluate.py --sweep",
        description="Measure samplers at several numbers of steps; Ctrl-C stops, the same "
        "command goes on.",
    )
    parser.add_argument("--sweep", action="store_true", help="measure the cells not yet there")
    parser.add_argument("--report", action="store_true", help="write quality.md and quality.png")
    parser.add_argument("--bundle", type=Path, default=Path("engines"))
    parser.add_argument(
        "--captions",
        type=_two_or_more,
        default=CAPTIONS,
        metavar="N",
        help="pictures a cell (default: %(default)s)",
    )
    parser.add_argument(
        "--samplers",
        nargs="+",
        default=(),
        metavar="NAME",
        help="only these (default: all there are)",
    )
    parser.add_argument(
        "--steps",
        nargs="+",
        type=int,
        default=(),
        metavar="N",
        help=f"only these (default: {', '.join(map(str, STEPS))}; of those, up "
        f"to {MOST_CALLS} denoiser calls)",
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="default: %(default)s")
    parser.add_argument(
        "--docs",
        type=Path,
        default=ROOT / "docs",
        help="folder of the report (default: %(default)s)",
    )
    return parser


def main(argv: Sequence[str]) -> int:
    """Sweep, report, or both: 0 on success, 1 for an error, 130 if stopped by Ctrl-C."""
    args = build_parser().parse_args(argv)
    try:
        if args.sweep:
            _sweep(args)
        if args.report:
            import quality  # which imports this module

            print(quality.write_report(args.results, args.docs))
    except LdmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"stopped; {args.results} keeps the cells that are done", file=sys.stderr)
        return _STOPPED
    return 0


def _sweep(args: argparse.Namespace) -> None:
    with Generator(args.bundle) as generator:
        done = [(each.bundle_sha256, each.settings) for each in read_cells(args.results)]
        grid = plan(generator.spec, args.samplers, args.steps)
        todo = [
            request
            for request in grid
            if (bundle_hash(generator), settings_of(request, args.captions)) not in done
        ]
        print(f"{len(grid) - len(todo)} of {len(grid)} cells are there", file=sys.stderr)
        left = sum(count_calls(request, generator.spec) for request in todo)
        for cell in run_sweep(generator, todo, args.captions):
            append_cell(args.results, cell)
            left -= cell.calls
            print(progress(cell, left), file=sys.stderr, flush=True)


def progress(cell: Cell, calls_left: int) -> str:
    """Return a line on a cell, and how long the rest takes if a call takes what it took there."""
    shares = cell.counts.shares()
    minutes = sum(cell.seconds) / cell.calls * calls_left / 60
    return (
        f"{cell.sampler}, {cell.steps} steps, {cell.calls} calls: "
        f"objects {shares['objects']:.0%}, whole pictures {shares['whole_pictures']:.0%}, "
        f"distance {cell.distance:.3f}, {cell.median_seconds:.2f} s a picture; "
        f"about {minutes:.0f} min left"
    )


def _two_or_more(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"must be a whole number from 2, got {text!r}")
    return int(text)
