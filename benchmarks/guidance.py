"""Measure what guidance costs: everywhere, between two noise levels, and nowhere.

    python benchmarks/guidance.py

Without arguments: the shapes model, exported on first use. Prints one line of JSON. Where guidance
is off the UNet gets one row per image and not two, which should be half the work. The three take
turns, so that a disturbance of the machine does not hit one alone.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from ldm_runtime import GenerationRequest, Generator, LdmError
from ldm_runtime.benchmark.subject import PROMPT
from ldm_runtime.requests.resolution import resolve
from ldm_runtime.requests.resolved import ResolvedRequest
from measuring.opened import add_generator_arguments, generator_row, open_generator
from measuring.rows import as_line


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_generator_arguments(parser)
    parser.add_argument("--steps", type=int, default=20, help="default: %(default)s")
    parser.add_argument("--repetitions", type=int, default=10, help="default: %(default)s")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command: 0 on success, 1 for an error the user can act on, 2 for bad usage."""
    args = build_parser().parse_args(argv)
    try:
        with open_generator(args) as generator:
            print(as_line(record(generator, args.steps, args.repetitions)))
    except LdmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def record(generator: Generator, steps: int, repetitions: int) -> dict[str, Any]:
    """Measure and return the JSON line as a mapping."""
    everywhere = resolve(
        GenerationRequest(prompt=PROMPT, seed=0, num_inference_steps=steps, guidance_scale=7.5),
        generator.spec,
    )
    half = (
        everywhere.sigmas[steps - 1],
        everywhere.sigmas[steps // 2],
    )  # the later half of the steps
    ways = {
        "everywhere": everywhere,
        "half of the steps": replace(everywhere, guidance_interval=half),
        "nowhere": replace(everywhere, guidance_scale=1.0),
    }
    seconds = measure(
        {name: _unet_seconds(generator, way) for name, way in ways.items()}, repetitions
    )
    rows = [
        generator_row(generator, f"unet, guidance {name}", {"num_inference_steps": steps}, each)
        for name, each in seconds.items()
    ]
    whole = rows[0].median_seconds
    return {
        "benchmark": "guidance",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "share_of_everywhere": {row.name: row.median_seconds / whole for row in rows},
        "rows": [row.as_dict() for row in rows],
    }


def measure(ways: Mapping[str, Callable[[], float]], repetitions: int) -> dict[str, list[float]]:
    """Return the seconds of every repetition by way, after one of each to warm up."""
    for way in ways.values():
        way()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repetitions):
        for name, way in ways.items():
            seconds[name].append(way())
    return seconds


def _unet_seconds(generator: Generator, request: ResolvedRequest) -> Callable[[], float]:
    return lambda: generator.generate(request).timings["unet"]


if __name__ == "__main__":
    sys.exit(main())
