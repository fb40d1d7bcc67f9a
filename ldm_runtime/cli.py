"""The command `ldm`: generate, verify, inspect, doctor, build-engines."""

import argparse
import json
import logging
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TextIO

from ldm_runtime.backends import BACKENDS
from ldm_runtime.cli_engines import EngineLines, add_engine_arguments, engine_options
from ldm_runtime.errors import LdmError, RequestError
from ldm_runtime.generator import Generator, Result
from ldm_runtime.images import save_png
from ldm_runtime.request import GenerationRequest, parse_request, resolve
from ldm_runtime.samplers import SAMPLERS
from ldm_runtime.sampling import Step
from ldm_runtime.schedules import SCHEDULES

_INTERRUPTED = 130
_BAR_WIDTH = 30


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `ldm`; every flag of `generate` is a field of a request."""
    parser = argparse.ArgumentParser(
        prog="ldm", description="Draw images from a bundle made by ldm-export."
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(title="commands", dest="command")
    _add_generate(commands.add_parser("generate", help="draw images from a prompt"))
    _add_verify(commands.add_parser("verify", help="compare this machine's images with torch's"))
    inspect = commands.add_parser("inspect", help="describe an image, a bundle or a checkpoint")
    inspect.add_argument("path", type=Path)
    inspect.set_defaults(run=_inspect)
    doctor = commands.add_parser("doctor", help="say which backends can run here, and why not")
    doctor.set_defaults(run=_doctor)
    _add_build_engines(
        commands.add_parser("build-engines", help="build TensorRT engines into a bundle")
    )
    for command in (inspect, doctor):
        command.add_argument("--json", action="store_true", help="print JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 on success, 1 for a failure, 2 for a request or usage that is wrong, 130 if interrupted.
    """
    warnings = logging.StreamHandler()
    warnings.addFilter(_Once())
    logging.basicConfig(level=logging.WARNING, format="warning: %(message)s", handlers=[warnings])
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        if args.version:
            return _version(args)
        if args.command is None:
            parser.error("say what to do: generate, verify, inspect, doctor or build-engines")
        return int(args.run(args))
    except LdmError as error:
        _say(f"error: {error}")
        return 2 if isinstance(error, RequestError) else 1
    except OSError as error:
        _say(f"error: {error.filename or 'the system'}: {error.strerror or error}")
        return 1
    except MemoryError:
        _say("error: not enough memory; ask for smaller images")
        return 1
    except KeyboardInterrupt:
        _say("interrupted")
        return _INTERRUPTED


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", help="what to draw")
    _add_engine_options(parser)
    parser.add_argument("--bundle", type=Path, default=Path("engines"), help="default: engines")
    parser.add_argument("--out-dir", type=Path, default=Path("out"), help="default: out")
    parser.add_argument("--negative-prompt", default="", help="what to steer away from")
    parser.add_argument("--height", type=int, help="pixels")
    parser.add_argument("--width", type=int, help="pixels")
    parser.add_argument("--num-inference-steps", "--steps", type=int, help="steps of the sampler")
    parser.add_argument("--guidance-scale", type=float, help="1 is the plain model")
    parser.add_argument("--sampler", help=", ".join(SAMPLERS))
    parser.add_argument("--schedule", help=", ".join(SCHEDULES))
    parser.add_argument("--eta", type=float, help="share of fresh noise a step, 0 to 1")
    parser.add_argument("--seed", type=int, help="of the first image; default: drawn")
    parser.add_argument("--num-images", "-n", type=int, default=1, help="default: 1")
    parser.add_argument("--plain-prompt", action="store_true", help="take the prompt literally")
    parser.set_defaults(run=_generate)


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path)
    _add_engine_options(parser)
    parser.set_defaults(run=_verify)


def _add_build_engines(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path)
    parser.add_argument(
        "--builder",
        choices=("auto", "tensorrt", "tensorrt-rtx"),
        default="auto",
        help="default: TensorRT if it and a GPU are here, else TensorRT-RTX",
    )
    add_engine_arguments(parser)
    parser.set_defaults(run=_build_engines)


def _add_engine_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backend", default="auto", help=f"{', '.join(BACKENDS)}, or the best that can: auto"
    )
    parser.add_argument("--threads", type=_positive, help="default: one a physical core")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, got {text!r}")
    return int(text)


def _generate(args: argparse.Namespace) -> int:
    request = parse_request(
        {field.name: getattr(args, field.name) for field in fields(GenerationRequest)}
    )
    with Generator(args.bundle, backend=args.backend, threads=args.threads) as generator:
        request = resolve(request, generator.spec)
        args.out_dir.mkdir(parents=True, exist_ok=True)
        for result in _draw_one_by_one(generator, request):
            print(_write(result, args.out_dir), flush=True)
    return 0


def _draw_one_by_one(generator: Generator, request: GenerationRequest) -> Iterator[Result]:
    """Draw image i from seed + i as a request of its own, so that it can be written at once."""
    assert request.seed is not None, "the request is not resolved"
    progress = _Progress(request.num_images, sys.stderr)
    for index in range(request.num_images):
        alone = replace(request, seed=request.seed + index, num_images=1)
        for event in generator.stream(alone):
            if isinstance(event, Result):
                progress.finish(index, event)
                yield event
            else:
                progress.show(index, event)


def _write(result: Result, folder: Path) -> Path:
    """Write the one picture under the next free number."""
    while True:
        numbers = (re.match(r"(\d{4,})-", path.name) for path in folder.iterdir())
        index = 1 + max((int(found[1]) for found in numbers if found), default=-1)
        path = folder / f"{index:04d}-seed{result.request.seed}.png"
        try:
            save_png(result.images[0], path, result.metadata(0))
        except FileExistsError:
            continue  # another process took the number
        return path


class _Once(logging.Filter):
    """Shows a message the first time only: every image of a command meets the same ones."""

    def __init__(self) -> None:
        super().__init__()
        self._shown: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        is_new = message not in self._shown
        self._shown.add(message)
        return is_new


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


def _verify(args: argparse.Namespace) -> int:
    from ldm_runtime.verify import verify

    missed = 0
    for check in verify(args.bundle, backend=args.backend, threads=args.threads):
        bound = "" if check.bound is None else f"bound {check.bound:g}"
        verdict = "ok" if check.passed else "MISSED"
        value = f"{check.value:.1f} dB" if check.measure == "psnr" else f"{check.value:.2e}"
        print(f"{check.subject:<20} {check.measure:<18} {value:>10}  {bound:<12} {verdict}")
        missed += not check.passed
    if missed:
        _say(f"error: {missed} of the promises of {args.bundle} do not hold on this machine")
    return 1 if missed else 0


def _build_engines(args: argparse.Namespace) -> int:
    from ldm_runtime.engine_store import add_engines

    options = engine_options(args, args.builder)
    add_engines(args.bundle, options, progress=EngineLines(sys.stderr))
    print(args.bundle)
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from ldm_runtime.inspection import inspect, readable

    description = inspect(args.path)
    print(json.dumps(description, indent=1, default=str) if args.json else readable(description))
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from ldm_runtime.doctor import diagnose

    diagnosis = diagnose()
    if args.json:
        print(json.dumps(asdict(diagnosis) | {"can_run": diagnosis.can_run}, indent=1))
    else:
        print(f"Python {diagnosis.python}, NumPy {diagnosis.numpy}, {diagnosis.system}, ", end="")
        print(f"{diagnosis.processors} processors")
        for backend in diagnosis.backends:
            verdict = "can run" if backend.why_not is None else f"cannot run: {backend.why_not}"
            print(f"{backend.name} {backend.version or ''}".strip(), verdict, sep=": ")
        if diagnosis.problem:
            print(f"problem: {diagnosis.problem}")
    return 0 if diagnosis.can_run else 1


def _version(_: argparse.Namespace) -> int:
    from ldm_runtime import __version__

    print(__version__)
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr)
