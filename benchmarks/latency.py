"""Measure what an image costs on this machine, part by part, on every backend that can run here.

    python benchmarks/latency.py

This is `ldm bench` with a default bundle, that of the shapes model, which is exported on first use,
and with the commit in its rows. It prints the machine's own limits and a table;

    python benchmarks/latency.py --json >> benchmarks/results/latency.jsonl

prints one line of JSON, to keep, and the rest to standard error. Every repetition is its own
process, which generates twice; backends take turns.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

ROOT = Path(__file__).resolve().parents[1]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command: 0 on success, 1 for an error the user can act on, 2 for bad usage."""
    try:
        from ldm_runtime import LdmError
    except ModuleNotFoundError as error:
        print(
            f"error: the package {error.name!r} is not installed; "
            f"run `pip install -e '.[export,cpu]'` in {ROOT}",
            file=sys.stderr,
        )
        return 1
    args = _parse(argv)
    try:
        _run(args)
    except LdmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _parse(argv: Sequence[str] | None) -> "argparse.Namespace":
    from ldm_runtime.cli.bench import add_bench_arguments
    from ldm_runtime.cli.messages import add_message_flags
    from ldm_runtime.cli.parsing import Parser

    parser = Parser(prog="latency.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bundle", type=Path, help="folder made by ldm-export (default: shapes)")
    add_bench_arguments(parser)
    add_message_flags(parser)
    return parser.parse_args(argv)


def _run(args: "argparse.Namespace") -> None:
    from ldm_runtime.cli.bench import measure_bundle
    from measuring.rows import commit
    from measuring.shapes_bundle import shapes_bundle

    measure_bundle(args.bundle or shapes_bundle(), args, commit())


if __name__ == "__main__":
    sys.exit(main())
