"""Shared parts of the benchmarks of one open generator: flags, opening and rows."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from ldm_runtime import Generator
from ldm_runtime.backends import get_backend
from measuring.rows import Row, commit, machine
from measuring.shapes_bundle import shapes_bundle


def add_generator_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `open_generator` reads."""
    parser.add_argument("--bundle", type=Path, help="folder made by ldm-export (default: shapes)")
    parser.add_argument("--backend", default="auto", help="default: %(default)s")
    parser.add_argument("--threads", type=int, help="threads that compute (default: all cores)")


def open_generator(args: argparse.Namespace) -> Generator:
    """Open the bundle that the flags name, or that of the shapes model.

    Raises:
        LdmError: There is no such bundle, or the backend cannot run here.
    """
    bundle = args.bundle or shapes_bundle()
    return Generator(bundle, backend=args.backend, threads=args.threads)


def generator_row(
    generator: Generator,
    name: str,
    settings: Mapping[str, str | int | float],
    seconds: Sequence[float],
) -> Row:
    """Return a measurement as a row."""
    version = get_backend(generator.backend).version()
    return Row(
        name=name,
        backend=generator.backend,
        commit=commit(),
        bundle_sha256=generator.bundle_sha256,
        device=f"{machine()}; {generator.backend} {version}",
        settings=settings,
        seconds=tuple(seconds),
    )
