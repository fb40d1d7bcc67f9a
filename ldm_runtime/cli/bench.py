"""`ldm bench`: what an image costs on this machine, part by part, on every backend."""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from ldm_runtime.backends.contract import Precision
from ldm_runtime.cli.backend_flags import add_threads_argument, backend_name
from ldm_runtime.cli.messages import reporting
from ldm_runtime.cli.parsing import add_json_flag, image_size, positive
from ldm_runtime.cli.trust_flags import add_trust_arguments
from ldm_runtime.escaping import printable_lines
from ldm_runtime.progress import Progress, Silent
from ldm_runtime.version import version

if TYPE_CHECKING:
    from ldm_runtime.benchmark.process import Findings
    from ldm_runtime.benchmark.runs import Configuration
    from ldm_runtime.benchmark.subject import Subject

_REPETITIONS = 10


def add_bench_arguments(parser: argparse.ArgumentParser, *, other_repetitions: str = "") -> None:
    """Add the flags of `ldm bench`, but for the bundle.

    Args:
        parser: The parser of a command.
        other_repetitions: What the help says of repetitions that are others by default.
    """
    parser.add_argument(
        "--steps", type=positive, metavar="N", help="steps of the sampler (default: the bundle's)"
    )
    parser.add_argument(
        "--size",
        type=image_size,
        metavar="WIDTHxHEIGHT",
        help="pixels of an image (default: the bundle's)",
    )
    parser.add_argument(
        "--batch", type=positive, default=1, metavar="N", help="images in one call (default: 1)"
    )
    parser.add_argument(
        *("-b", "--backend", "--device"),
        action="append",
        type=backend_name,
        metavar="NAME",
        help="only this one; may be repeated (default: all that can run here)",
    )
    parser.add_argument(
        "--precision",
        action="append",
        choices=get_args(Precision),
        help="precision that networks compute in; may be repeated, and backends without it are "
        "left out with a sentence (default: each backend's fastest)",
    )
    add_threads_argument(parser)
    parser.add_argument(
        *("--repetitions", "--repeat"),
        type=positive,
        metavar="N",
        help="processes per backend and precision, each of which generates twice (default: "
        f"{_REPETITIONS}{other_repetitions})",
    )
    add_trust_arguments(parser)
    add_json_flag(parser, "print one line of JSON, and the report to standard error")


def bench(args: argparse.Namespace) -> int:
    """Run `ldm bench`."""
    measure_bundle(args.bundle, args, f"ldm-deploy {version()}")
    return 0


def measure_bundle(bundle: Path, args: argparse.Namespace, commit: str) -> None:
    """Measure a bundle and print the report.

    Args:
        bundle: The bundle's folder.
        args: The flags of `add_bench_arguments`.
        commit: The code that is measured, as a row of the report says it.

    Raises:
        LdmError: There is no such bundle, it cannot do what the flags ask for, or a process failed.
    """
    from ldm_runtime.benchmark import report, runs
    from ldm_runtime.benchmark.ceilings import measure_apart
    from ldm_runtime.benchmark.rows import as_line
    from ldm_runtime.benchmark.subject import open_subject

    started = time.monotonic()
    width, height = args.size or (None, None)
    fields = {"height": height, "width": width, "num_inference_steps": args.steps}
    if args.batch > 1:
        fields["num_images"] = args.batch
    subject = open_subject(bundle, fields, sha256=args.sha256, trust_engines=args.trust_engines)
    configurations, reasons = runs.runnable_configurations(
        args.backend or [], subject, precisions=args.precision or [], threads=args.threads
    )
    ceilings = measure_apart()
    show = _shown(args)
    show("\n".join(report.heading(subject, ceilings, reasons)))
    found = _find(subject, configurations, args)
    rows = []
    for each in configurations:
        findings = [findings for configuration, findings in found if configuration == each]
        of_one = runs.as_rows(subject, each, findings, commit)
        show("\n".join(report.table(of_one, subject, ceilings)))
        rows += of_one
    show("\n! slowest repetition more than 10 % above the median: something else was running")
    show(f"measured in {time.monotonic() - started:.0f} s")
    if args.json:
        print(as_line(report.record(rows, subject, ceilings)))


def _find(
    subject: "Subject", configurations: Sequence["Configuration"], args: argparse.Namespace
) -> list[tuple["Configuration", "Findings"]]:
    """Measure, with a bar on a terminal alone."""
    from ldm_runtime.benchmark.runs import find

    found = []
    repetitions = args.repetitions or _REPETITIONS
    names = [f"process {number + 1}" for number in range(len(configurations) * repetitions)]
    silent: nullcontext[Progress] = nullcontext(Silent())
    on_terminal = sys.stderr is not None and sys.stderr.isatty()
    with reporting(args) if on_terminal else silent as progress:
        progress.plan(dict.fromkeys(names))
        measured = find(subject, configurations, repetitions)
        for name in names:
            progress.begin(name)
            found.append(next(measured))
            progress.end(name, "measured")
    return found


def _shown(args: argparse.Namespace) -> Callable[[str], None]:
    """Return what shows a part of the report: on standard output, unless that is for JSON."""
    if args.json and args.quiet:
        return lambda _: None
    stream = sys.stderr if args.json else sys.stdout
    return lambda text: print(printable_lines(text), file=stream, flush=True)
