"""`ldm generate`: image generation, output files, and progress with previews."""

import argparse
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from ldm_runtime.bundle.manifest import load_manifest
from ldm_runtime.cli.flags import add_request_arguments, given_adapters, given_inversions
from ldm_runtime.cli.messages import reporting
from ldm_runtime.cli.outputs import add_output_arguments, image_writer
from ldm_runtime.cli.request_lines import read_requests
from ldm_runtime.durable import whole_file
from ldm_runtime.errors import RequestError
from ldm_runtime.generator import Generator
from ldm_runtime.pipeline.results import Result
from ldm_runtime.progress import Progress
from ldm_runtime.requests.refiner import check_refiner
from ldm_runtime.requests.resolved import ResolvedRequest
from ldm_runtime.specs.model import ModelSpec

_LOGGER = logging.getLogger(__name__)


def add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `ldm generate`, except those of the engine."""
    group = add_request_arguments(parser)["Output"]
    group.add_argument(
        "--bundle",
        type=Path,
        default=Path("engines"),
        help="folder made by ldm-export (default: engines)",
    )
    group.add_argument(
        "--refiner",
        type=Path,
        metavar="FOLDER",
        help="bundle whose model makes the last steps, from --refiner-start on",
    )
    add_output_arguments(group)
    group.add_argument(
        "--deadline-seconds",
        type=float,
        metavar="S",
        help="give up on an image after the step in which S seconds are over",
    )
    group.add_argument(
        "--preview-file",
        type=Path,
        metavar="FILE",
        help="PNG to update with a preview after every step",
    )


def generate(args: argparse.Namespace) -> int:
    """Run `ldm generate`.

    Raises:
        RequestError: A field is wrong, or is missing for the bundle's task.
        BundleError: The refiner does not fit the bundle.
    """
    # Requests and names are checked before the networks are opened, which takes time.
    spec = load_manifest(args.bundle, sha256=args.sha256).spec
    requests = read_requests(args, spec, _refiner_spec(args, spec))
    write = image_writer(args, [seed for request in requests for seed in _seeds(request)])
    with Generator(
        args.bundle,
        refiner=args.refiner,
        backend=args.backend,
        precision=args.precision,
        threads=args.threads,
        low_memory=args.low_memory,
        sha256=args.sha256,
        trust_engines=args.trust_engines,
        textual_inversions=given_inversions(args),
        adapters=given_adapters(args),
    ) as generator:
        where = f"{generator.backend} in {generator.precision}"
        _LOGGER.info("%s: %s on %s", args.bundle, generator.spec.family, where)
        run = _generate_together if args.requests else _generate_one_by_one
        with reporting(args) as progress:
            for result in run(generator, requests, args, progress):
                _report(result, write(result), args)
    return 0


def _refiner_spec(args: argparse.Namespace, spec: ModelSpec) -> ModelSpec | None:
    if args.refiner is None:
        return None
    refiner = load_manifest(args.refiner).spec
    check_refiner(spec, refiner)
    return refiner


def _seeds(request: ResolvedRequest) -> list[int]:
    return [request.of_image(index).seed for index in range(request.num_images)]


def _report(result: Result, paths: Sequence[Path], args: argparse.Namespace) -> None:
    """Print the path of every image, or a line of JSON about it."""
    for path, seed in zip(paths, result.seeds, strict=False):  # none on standard output
        line = {"path": str(path), "seed": seed, "seconds": round(result.timings["total"], 3)}
        print(json.dumps(line) if args.json else path, flush=True)
    spent = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in result.timings.items())
    _LOGGER.info("%s", spent)


def _generate_one_by_one(
    generator: Generator,
    requests: Sequence[ResolvedRequest],
    args: argparse.Namespace,
    progress: Progress,
) -> Iterator[Result]:
    """Generate every image as a separate request, so that it can be written at once."""
    (request,) = requests
    names = _names(request.num_images)
    progress.plan(dict.fromkeys(names))
    for index, name in enumerate(names):
        progress.begin(name)
        events = generator.stream(
            request.of_image(index),
            previews=args.preview_file is not None,
            deadline_seconds=args.deadline_seconds,
        )
        for event in events:
            if isinstance(event, Result):
                progress.end(name, "generated")
                yield event
            else:
                progress.advance(event.index / event.total)
                if event.previews:
                    with whole_file(args.preview_file, synced=False) as file:
                        event.previews[0].save(file, format="PNG")


def _generate_together(
    generator: Generator,
    requests: Sequence[ResolvedRequest],
    args: argparse.Namespace,
    progress: Progress,
) -> Iterator[Result]:
    if args.preview_file is not None:
        raise RequestError("requests", "cannot be combined with --preview-file")
    names = _names(len(requests))
    progress.plan(dict.fromkeys(names))
    results = generator.run_many(requests, deadline_seconds=args.deadline_seconds)
    for name in names:
        progress.begin(name)
        result = next(results)
        progress.end(name, "generated")
        yield result


def _names(count: int) -> list[str]:
    return [f"image {number}/{count}" for number in range(1, count + 1)]
