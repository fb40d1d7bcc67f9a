"""`ldm generate`: what it draws, in which files, and what it shows meanwhile."""

import argparse
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

from PIL import Image

from ldm_runtime.bundle.manifest import load_manifest
from ldm_runtime.cli.flags import add_request_arguments
from ldm_runtime.cli.request_lines import read_requests
from ldm_runtime.errors import RequestError
from ldm_runtime.generator import Generator
from ldm_runtime.pipeline.png import save_png
from ldm_runtime.pipeline.results import Result
from ldm_runtime.pipeline.sampling import Step
from ldm_runtime.requests.resolved import ResolvedRequest

_BAR_WIDTH = 30


def add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `ldm generate`, but for those that open a bundle."""
    group = add_request_arguments(parser)["Output"]
    group.add_argument("--bundle", type=Path, default=Path("engines"), help="default: engines")
    group.add_argument("--out-dir", type=Path, default=Path("out"), help="default: out")
    group.add_argument(
        "--deadline-seconds", type=float, metavar="S", help="give up on a picture after so long"
    )
    group.add_argument(
        "--preview-file", type=Path, metavar="FILE", help="PNG to keep showing what is being drawn"
    )


def generate(args: argparse.Namespace) -> int:
    """Run `ldm generate`.

    Raises:
        RequestError: A field is wrong, or is missing for the bundle's task.
    """
    # Before the networks are opened, which takes its time.
    requests = read_requests(args, load_manifest(args.bundle).spec)
    with Generator(args.bundle, backend=args.backend, threads=args.threads) as generator:
        args.out_dir.mkdir(parents=True, exist_ok=True)
        draw = _draw_together if args.requests else _draw_one_by_one
        for result in draw(generator, requests, args):
            for index in range(len(result.images)):
                print(_write(result, index, args.out_dir), flush=True)
    return 0


def _draw_one_by_one(
    generator: Generator, requests: Sequence[ResolvedRequest], args: argparse.Namespace
) -> Iterator[Result]:
    """Draw every image as a request of its own, so that it can be written at once."""
    (request,) = requests
    progress = _Progress(request.num_images, sys.stderr)
    for index in range(request.num_images):
        events = generator.stream(
            request.of_image(index),
            previews=args.preview_file is not None,
            deadline_seconds=args.deadline_seconds,
        )
        for event in events:
            if isinstance(event, Result):
                progress.finish(index, event)
                yield event
            else:
                progress.show(index, event)
                if event.previews:
                    _replace(args.preview_file, event.previews[0])


def _draw_together(
    generator: Generator, requests: Sequence[ResolvedRequest], args: argparse.Namespace
) -> Iterator[Result]:
    if args.preview_file is not None or args.deadline_seconds is not None:
        raise RequestError("requests", "go without --preview-file and --deadline-seconds")
    progress = _Progress(len(requests), sys.stderr)
    for index, result in enumerate(generator.run_many(requests)):
        progress.finish(index, result)
        yield result


def _write(result: Result, index: int, folder: Path) -> Path:
    """Write one picture under the next free number."""
    metadata = result.metadata(index)
    while True:
        numbers = (re.match(r"(\d{4,})-", path.name) for path in folder.iterdir())
        number = 1 + max((int(found[1]) for found in numbers if found), default=-1)
        path = folder / f"{number:04d}-seed{metadata['request']['seed']}.png"
        try:
            save_png(result.images[index], path, metadata)
        except FileExistsError:
            continue  # another process took the number
        return path


def _replace(path: Path, picture: Image.Image) -> None:
    """Write a picture so that whoever looks at the file never sees half of it."""
    partial = path.with_name(f".{path.name}.part")
    picture.save(partial, format="PNG")
    partial.replace(path)


class _Progress:
    """A bar on a terminal, one line an image elsewhere."""

    def __init__(self, num_images: int, stream: TextIO) -> None:
        self._num_images = num_images
        self._stream = stream
        self._started = time.perf_counter()

    def show(self, index: int, step: Step) -> None:
        """Show a step of image `index`."""
        if not self._stream.isatty():
            return
        done = (index + step.index / step.total) / self._num_images
        left = (time.perf_counter() - self._started) * (1 - done) / done
        bar = ("#" * round(done * _BAR_WIDTH)).ljust(_BAR_WIDTH)
        self._stream.write(
            f"\r[{bar}] image {index + 1}/{self._num_images} step {step.index}/{step.total}, "
            f"{left:.0f} s left\x1b[K"
        )
        self._stream.flush()

    def finish(self, index: int, result: Result) -> None:
        """Report image `index`."""
        end = "\n" if not self._stream.isatty() else "\r\x1b[K"
        line = f"image {index + 1}/{self._num_images}: {result.timings['total']:.2f} s"
        self._stream.write(f"{line}{end}" if end == "\n" else end)
        self._stream.flush()
