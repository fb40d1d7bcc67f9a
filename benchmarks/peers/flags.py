"""The flags of `latency.py --peers`, and the run that they ask for."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from ldm_runtime.errors import LdmError
from ldm_runtime.suggestions import did_you_mean
from measuring.rows import ROOT, append_line, as_line, usable_cpus
from peers.entrants import OWN, PEERS, Entrant, starts
from peers.race import Race, Task
from peers.report import failures, table
from peers.weights import MODEL, Weights

RESULTS = ROOT / "benchmarks/results/peers.jsonl"
_STEPS, _SIDE = 20, 512
#: Repetitions unless `--repetitions` says otherwise.
ROUNDS = 2


def peer_names(text: str) -> list[str]:
    """Read names with commas between them, or "all", as the type of an argument."""
    names = [name.strip() for name in text.split(",")]
    if names == ["all"]:
        return list(PEERS)
    for name in names:
        if name not in PEERS:
            hint = did_you_mean(name, PEERS)
            raise argparse.ArgumentTypeError(
                f"unknown peer {name!r}{hint}; choose {', '.join(PEERS)}"
            )
    return names


def compare(args: argparse.Namespace) -> int:
    """Measure this package next to its peers: 0 on success, 1 if something was not measured.

    Raises:
        LdmError: The flags ask for what is not compared, or the weights cannot be written.
    """
    _check(args)
    width, height = args.size or (_SIDE, _SIDE)
    task = Task(
        steps=args.steps or _STEPS,
        width=width,
        height=height,
        threads=args.threads or usable_cpus(),
    )
    return run(Race(Weights(narrow=args.narrow), task), _entrants(args), args)


def run(race: Race, entrants: Sequence[Entrant], args: argparse.Namespace) -> int:
    """Measure, keep every row as soon as it is there, and print the table."""
    results = args.results or (None if args.narrow else RESULTS)
    rows = []
    chosen = starts(entrants, args.precision or ())
    for row in race.rows(chosen, args.repetitions or ROUNDS):
        rows.append(json.loads(as_line(row)))
        if results is not None:
            append_line(results, row)
        if args.json:
            print(as_line(row), flush=True)
    print("\n".join(table(rows)), file=sys.stderr if args.json else sys.stdout)
    return 1 if failures(rows) else 0


def add_peer_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.add_argument(
        "--peers",
        nargs="?",
        const=list(PEERS),
        type=peer_names,
        metavar="NAME,NAME",
        help=f"measure other programs next to this one, with the weights of --model {MODEL}: "
        f"{', '.join(PEERS)} (default: all); `make peers` installs them. {_STEPS} steps of Euler's "
        f"method and {ROUNDS} repetitions, unless flags say otherwise",
    )
    parser.add_argument(
        "--results",
        type=Path,
        metavar="FILE",
        help=f"file that the rows of --peers are appended to (default: "
        f"{RESULTS.relative_to(ROOT)}; with --narrow, none)",
    )


def _check(args: argparse.Namespace) -> None:
    if args.bundle is not None or args.model not in (None, MODEL):
        raise LdmError(f"peers are compared with the weights of --model {MODEL} alone")
    if args.batch != 1:
        raise LdmError(f"peers are compared at one image a call, not at --batch {args.batch}")


def _entrants(args: argparse.Namespace) -> list[Entrant]:
    """Return the peers, the reference of images first, and this package's own entrants."""
    peers = [entrant for name, entrant in PEERS.items() if name in args.peers]
    return peers + [
        entrant for entrant in OWN if not args.backend or entrant.options["backend"] in args.backend
    ]
