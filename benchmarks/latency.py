"""Measure what an image costs on this machine, part by part, on every backend that can run here.

    python benchmarks/latency.py

This is `ldm bench` with a default bundle, that of the shapes model, which is exported on first use,
and with the commit in its rows. It prints the machine's own limits and a table;

    python benchmarks/latency.py --json >> benchmarks/results/latency.jsonl

prints one line of JSON, to keep, and the rest to standard error. Every repetition is its own
process, which generates twice; backends take turns.

    python benchmarks/latency.py --model sd15

measures a released model with random weights, whose checkpoint and bundle are kept in
`.cache/full-size/`, and

    python benchmarks/latency.py --peers

measures other programs next to this one, with the same weights; `make peers` installs them.
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
        return _run(args)
    except LdmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _parse(argv: Sequence[str] | None) -> "argparse.Namespace":
    from ldm_runtime.cli.bench import add_bench_arguments
    from ldm_runtime.cli.messages import add_message_flags
    from ldm_runtime.cli.parsing import Parser
    from peers.flags import ROUNDS, add_peer_arguments
    from released.cached_models import SHORT_NAMES

    parser = Parser(prog="latency.py", description=(__doc__ or "").splitlines()[0])
    subject = parser.add_mutually_exclusive_group()
    subject.add_argument("--bundle", type=Path, help="folder made by ldm-export (default: shapes)")
    subject.add_argument(
        "--model", choices=tuple(SHORT_NAMES), help="a released model with random weights"
    )
    parser.add_argument(
        "--narrow",
        action="store_true",
        help="narrow layers in place of those of --model and --peers, to try the command out",
    )
    add_bench_arguments(parser, other_repetitions=f"; with --peers {ROUNDS}")
    add_peer_arguments(parser)
    add_message_flags(parser)
    return parser.parse_args(argv)


def _run(args: "argparse.Namespace") -> int:
    from ldm_runtime.cli.bench import measure_bundle
    from measuring.rows import commit
    from measuring.shapes_bundle import shapes_bundle
    from peers.flags import compare
    from released.cached_models import random_bundle, with_int8

    if args.peers:
        return compare(args)
    if args.model:
        bundle = random_bundle(args.model, narrow=args.narrow)
        if "int8" in (args.precision or []):
            bundle = with_int8(bundle)
    else:
        bundle = args.bundle or shapes_bundle()
    measure_bundle(bundle, args, commit())
    return 0


if __name__ == "__main__":
    sys.exit(main())
