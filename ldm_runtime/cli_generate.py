"""`ldm generate`: every field of a request as a flag, or requests from a file."""

import argparse
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TextIO

import msgspec
from PIL import Image

from ldm_runtime.errors import RequestError
from ldm_runtime.generator import Generator, Result
from ldm_runtime.images import save_png
from ldm_runtime.noise import NOISES
from ldm_runtime.request import GenerationRequest, parse_request
from ldm_runtime.resolution import resolve
from ldm_runtime.samplers import SAMPLERS
from ldm_runtime.sampling import Step
from ldm_runtime.schedules import SCHEDULES

_BAR_WIDTH = 30
_NAMES = tuple(field.name for field in fields(GenerationRequest))


def add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `ldm generate`, but for those that open a bundle."""
    parser.add_argument("prompt", nargs="?", help="what to draw")
    _add_output(parser.add_argument_group("what comes out"))
    _add_picture(parser.add_argument_group("the picture"))
    _add_sampling(parser.add_argument_group("how it is sampled"))
    _add_guidance(parser.add_argument_group("how closely it follows the prompt"))
    _add_start(parser.add_argument_group("pictures to start from"))
    _add_large(parser.add_argument_group("large pictures"))


def _add_output(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--bundle", type=Path, default=Path("engines"), help="default: engines")
    group.add_argument("--out-dir", type=Path, default=Path("out"), help="default: out")
    group.add_argument(
        "--requests",
        type=Path,
        metavar="FILE",
        help="draw what the lines of a file say, a request in JSON each, several at once",
    )
    group.add_argument(
        "--deadline-seconds", type=float, metavar="S", help="give up on a picture after so long"
    )
    group.add_argument(
        "--preview-file", type=Path, metavar="FILE", help="PNG to keep showing what is being drawn"
    )


def _add_picture(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--negative-prompt", default="", metavar="TEXT", help="what to avoid")
    group.add_argument(
        "--plain-prompt",
        action="store_true",
        help="take prompts literally: no (word:1.2), no [word], no BREAK, no second chunk",
    )
    group.add_argument("--height", type=int, metavar="PIXELS", help="default: the bundle's")
    group.add_argument("--width", type=int, metavar="PIXELS", help="default: the bundle's")
    group.add_argument("--num-images", "-n", type=int, default=1, metavar="N", help="default: 1")
    group.add_argument("--seed", type=int, help="of the first image; default: drawn")
    group.add_argument(
        "--noise", default="torch-cpu", help=f"what a seed means: {', '.join(NOISES)}"
    )
    group.add_argument(
        "--variation-seed", type=int, metavar="SEED", help="go from --seed towards this one"
    )
    group.add_argument(
        "--variation-strength", type=float, default=0.0, metavar="S", help="how far, 0 to 1"
    )


def _add_sampling(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--sampler", help=", ".join(SAMPLERS))
    group.add_argument(
        "--num-inference-steps", "--steps", type=int, metavar="N", help="default: the bundle's"
    )
    group.add_argument("--schedule", help=", ".join(SCHEDULES))
    group.add_argument(
        "--sigmas", type=_numbers, metavar="A,B,…", help="noise levels instead of a schedule"
    )
    group.add_argument("--eta", type=float, help="share of fresh noise a step, 0 to 1")
    group.add_argument(
        "--zero-terminal-snr", action="store_true", help="start from pure noise, as some models do"
    )


def _add_guidance(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--guidance-scale", type=float, metavar="W", help="1 is the plain model")
    group.add_argument(
        "--guidance-rescale", type=float, default=0.0, metavar="PHI", help="tame contrast, 0 to 1"
    )
    group.add_argument(
        "--guidance-interval",
        type=_numbers,
        metavar="LOW,HIGH",
        help="guide between these noise levels only; elsewhere a step costs half",
    )


def _add_start(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--image", metavar="FILE", help="picture to start from")
    group.add_argument(
        "--strength", type=float, metavar="S", help="how much of it to forget, up to 1"
    )
    group.add_argument(
        "--mask-image", metavar="FILE", help="what of it to draw anew: white yes, black no"
    )
    group.add_argument(
        "--outpaint",
        type=_whole_numbers,
        metavar="L,T,R,B",
        help="pixels to add left, above, right and below, and to draw",
    )


def _add_large(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--hires-scale", type=float, metavar="X", help="enlarge X times and draw over it again"
    )
    group.add_argument(
        "--hires-strength", type=float, metavar="S", help="how much of it to forget then"
    )
    group.add_argument(
        "--tile-size", type=int, metavar="PIXELS", help="decode in tiles of this size; 0: whole"
    )


def generate(args: argparse.Namespace) -> int:
    """Run `ldm generate`.

    Raises:
        RequestError: A field is wrong, or there is no prompt or more than one source of it.
    """
    requests = _requests(args)
    with Generator(args.bundle, backend=args.backend, threads=args.threads) as generator:
        resolved = [resolve(request, generator.spec) for request in requests]
        args.out_dir.mkdir(parents=True, exist_ok=True)
        draw = _draw_together if args.requests else _draw_one_by_one
        for result in draw(generator, resolved, args):
            for index in range(len(result.images)):
                print(_write(result, index, args.out_dir), flush=True)
    return 0


def _requests(args: argparse.Namespace) -> list[GenerationRequest]:
    if args.requests is None:
        if args.prompt is None:
            raise RequestError("prompt", "is required; say what to draw, or give --requests FILE")
        return [parse_request({name: getattr(args, name) for name in _NAMES})]
    if args.prompt is not None:
        raise RequestError("prompt", "does not go with --requests, whose lines have their own")
    requests = []
    for number, line in enumerate(args.requests.read_bytes().splitlines(), start=1):
        if line.strip():
            requests.append(_parse_line(line, f"{args.requests}, line {number}"))
    return requests


def _parse_line(line: bytes, place: str) -> GenerationRequest:
    try:
        return parse_request(msgspec.json.decode(line, type=dict[str, object]))
    except msgspec.DecodeError as error:
        raise RequestError("requests", f"{place} is no JSON object: {error}") from error
    except RequestError as error:
        raise RequestError("requests", f"{place}: {error}") from error


def _draw_one_by_one(
    generator: Generator, requests: Sequence[GenerationRequest], args: argparse.Namespace
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
    generator: Generator, requests: Sequence[GenerationRequest], args: argparse.Namespace
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


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers with commas, got {text!r}") from None


def _whole_numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be whole numbers with commas, got {text!r}"
        ) from None


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
