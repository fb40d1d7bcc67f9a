"""Measure what requests gain from sharing UNet calls: `run_many` against one by one.

    python benchmarks/batching.py
    python benchmarks/batching.py --guidance 1 --backend cuda

Without arguments: the shapes model, exported on first use. Prints one line of JSON. The two ways
take turns, either being first, so that a disturbance of the machine does not hit one alone; seconds
are taken on the wall clock and, for a machine that has other work too, on the process's own.
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from ldm_runtime import GenerationRequest, Generator, LdmError, Result
from ldm_runtime.benchmark.subject import PROMPT
from measuring.opened import add_generator_arguments, generator_row, open_generator
from measuring.rows import Row, as_line

#: Ways to generate the requests, and clocks to measure them with.
WAYS, CLOCKS = ("alone", "together"), ("wall", "process")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_generator_arguments(parser)
    parser.add_argument("--requests", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--max-batch", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=10, help="default: %(default)s")
    parser.add_argument("--guidance", type=float, help="guidance scale (default: the bundle's)")
    parser.add_argument("--repetitions", type=int, default=10, help="default: %(default)s")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command: 0 on success, 1 for an error the user can act on, 2 for bad usage."""
    args = build_parser().parse_args(argv)
    try:
        with open_generator(args) as generator:
            print(as_line(record(generator, args)))
    except LdmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def record(generator: Generator, args: argparse.Namespace) -> dict[str, Any]:
    """Measure and return the JSON line as a mapping."""
    requests = [
        GenerationRequest(
            prompt=PROMPT,
            seed=seed,
            num_inference_steps=args.steps,
            guidance_scale=args.guidance,
        )
        for seed in range(args.requests)
    ]
    ways: dict[str, Callable[[], list[Result]]] = {
        "alone": lambda: [generator.generate(request) for request in requests],
        "together": lambda: list(generator.run_many(requests, max_batch=args.max_batch)),
    }
    results = {name: run() for name, run in ways.items()}  # warm, and to compare
    seconds = measure(ways, args.repetitions)
    settings = {name: getattr(args, name) for name in ("requests", "max_batch", "steps")}
    settings["guidance_scale"] = results["alone"][0].request.guidance_scale
    rows = as_rows(generator, settings, seconds)
    return {
        "benchmark": "batching",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "identical": pixels(results["alone"]) == pixels(results["together"]),
        "speedup": {
            clock: rows["alone", clock].median_seconds / rows["together", clock].median_seconds
            for clock in CLOCKS
        },
        "rows": [row.as_dict() for row in rows.values()],
    }


def measure(
    ways: Mapping[str, Callable[[], object]], repetitions: int
) -> dict[tuple[str, str], list[float]]:
    """Return the seconds of every repetition by way and clock."""
    seconds: dict[tuple[str, str], list[float]] = {
        (way, clock): [] for way in WAYS for clock in CLOCKS
    }
    for repetition in range(repetitions):
        for way in WAYS if repetition % 2 == 0 else WAYS[::-1]:
            wall, process = time.perf_counter(), time.process_time()
            ways[way]()
            seconds[way, "wall"].append(time.perf_counter() - wall)
            seconds[way, "process"].append(time.process_time() - process)
    return seconds


def as_rows(
    generator: Generator,
    settings: Mapping[str, Any],
    seconds: Mapping[tuple[str, str], Sequence[float]],
) -> dict[tuple[str, str], Row]:
    """Return one row per way and clock."""
    return {
        (way, clock): generator_row(generator, way, {**settings, "clock": clock}, each)
        for (way, clock), each in seconds.items()
    }


def pixels(results: Sequence[Result]) -> list[bytes]:
    """Return the images of results in a form that can be compared."""
    return [image.tobytes() for result in results for image in result.images]


if __name__ == "__main__":
    sys.exit(main())
