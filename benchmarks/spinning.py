"""Measure whether threads of the CPU should spin while they wait for work.

    python benchmarks/spinning.py

Without arguments: the shapes model, exported on first use. The UNet runs with threads that spin and
with threads that sleep, while nothing else runs and while as many processes as there are processors
keep them busy. Prints a table in Markdown: milliseconds of a step, the median and the fastest. All
ways take turns, so that a disturbance of the machine does not hit one alone.
"""

import argparse
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import product
from pathlib import Path

from guidance import measure
from ldm_runtime import Generator, LdmError
from ldm_runtime.backends.contract import RunOptions
from ldm_runtime.backends.processors import usable_processors
from ldm_runtime.benchmark.subject import PROMPT
from measuring.rows import machine
from measuring.shapes_bundle import shapes_bundle

_STEPS = 5
_SIDES = (64, 128)  # pixels
_BUSY = "while True: pass"


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bundle", type=Path, help="folder made by ldm-export (default: shapes)")
    parser.add_argument("--repetitions", type=int, default=5, help="default: %(default)s")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command: 0 on success, 1 for an error the user can act on, 2 for bad usage."""
    args = build_parser().parse_args(argv)
    processors = usable_processors()
    try:
        with open_generators(args.bundle or shapes_bundle(), (processors, 2 * processors)) as ways:
            print("\n".join([*table(ways, processors, args.repetitions), "", f"({machine()})"]))
    except LdmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


@contextmanager
def open_generators(bundle: Path, threads: Sequence[int]) -> Iterator[Mapping[str, Generator]]:
    """Open a generator for each number of threads and each way of waiting, by its name."""
    with ExitStack() as opened:
        yield {
            f"{count} threads, {'spinning' if spinning else 'sleeping'}": opened.enter_context(
                Generator(
                    bundle,
                    backend="onnxruntime",
                    threads=count,
                    options=RunOptions(spinning=spinning),
                )
            )
            for count in threads
            for spinning in (True, False)
        }


def table(ways: Mapping[str, Generator], processors: int, repetitions: int) -> Iterator[str]:
    """Yield the lines of a table: milliseconds of a step by size, load and way."""
    yield " | ".join(("| a step of", *ways)) + " |"
    yield "|---" * (1 + len(ways)) + "|"
    for side, load in product(_SIDES, (0, processors)):
        steps = {name: partial(unet_seconds, each, side) for name, each in ways.items()}
        with busy_processes(load):
            seconds = measure(steps, repetitions)
        cells = (
            f"{1000 * statistics.median(each):.1f} ({1000 * min(each):.1f})"
            for each in seconds.values()
        )
        yield " | ".join((f"| {side}x{side} pixels, {load} busy processes", *cells)) + " |"


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Keep that many processors busy within the block."""
    processes = [subprocess.Popen([sys.executable, "-c", _BUSY]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def unet_seconds(generator: Generator, side: int) -> float:
    """Return the seconds of one step of the UNet."""
    result = generator(PROMPT, seed=0, height=side, width=side, num_inference_steps=_STEPS)
    return result.timings["unet"] / _STEPS


if __name__ == "__main__":
    sys.exit(main())
