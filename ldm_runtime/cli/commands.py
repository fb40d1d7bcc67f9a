"""The command `ldm`: generate, verify, inspect, doctor, build-engines."""

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ldm_runtime.backends import BACKENDS
from ldm_runtime.cli.engine_flags import add_engine_arguments, engine_options
from ldm_runtime.cli.generate import add_generate_arguments, generate
from ldm_runtime.cli.messages import PrintableFormatter, say
from ldm_runtime.errors import LdmError, RequestError
from ldm_runtime.escaping import printable
from ldm_runtime.progress import reporting_to
from ldm_runtime.version import version

_INTERRUPTED = 130


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `ldm`; every flag of `generate` is a field of a request."""
    parser = argparse.ArgumentParser(
        prog="ldm", description="Generate images from a bundle made by ldm-export."
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(title="commands", dest="command")
    generating = commands.add_parser("generate", help="generate images")
    add_generate_arguments(generating)
    _add_engine_options(generating.add_argument_group("Engine"))
    generating.set_defaults(run=generate)
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
    """Run one command of `ldm`.

    Returns:
        0 on success, 1 for a failure, 2 for a request or usage that is wrong, 130 if interrupted.
    """
    warnings = logging.StreamHandler()
    warnings.addFilter(_Once())
    warnings.setFormatter(PrintableFormatter("warning: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[warnings])
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        if args.version:
            return _version(args)
        if args.command is None:
            parser.error("say what to do: generate, verify, inspect, doctor or build-engines")
        status = int(args.run(args))
        sys.stdout.flush()  # so that a closed pipe is noticed here
        return status
    except BrokenPipeError:  # as of `ldm inspect engines/ | head`: the reader has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except LdmError as error:
        say(f"error: {error}")
        return 2 if isinstance(error, RequestError) else 1
    except OSError as error:
        say(f"error: {error.filename or 'the system'}: {error.strerror or error}")
        return 1
    except MemoryError:
        say("error: not enough memory; ask for smaller images")
        return 1
    except KeyboardInterrupt:
        say("interrupted")
        return _INTERRUPTED


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
        help="default: TensorRT if it and a GPU are available, else TensorRT-RTX",
    )
    add_engine_arguments(parser)
    parser.set_defaults(run=_build_engines)


def _add_engine_options(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--backend", default="auto", help=f"{', '.join(BACKENDS)}; auto: the best that can run here"
    )
    parser.add_argument(
        "--threads", type=_positive, help="compute threads (default: one per physical core)"
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, got {text!r}")
    return int(text)


class _Once(logging.Filter):
    """Shows a message the first time only: every image of a command logs the same ones."""

    def __init__(self) -> None:
        super().__init__()
        self._shown: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        is_new = message not in self._shown
        self._shown.add(message)
        return is_new


def _verify(args: argparse.Namespace) -> int:
    from ldm_runtime.diagnostics.verify import verify

    missed = 0
    for check in verify(args.bundle, backend=args.backend, threads=args.threads):
        bound = "" if check.bound is None else f"bound {check.bound:g}"
        verdict = "ok" if check.passed else "MISSED"
        value = f"{check.value:.1f} dB" if check.measure == "psnr" else f"{check.value:.2e}"
        subject = printable(check.subject)
        print(f"{subject:<20} {check.measure:<18} {value:>10}  {bound:<12} {verdict}")
        missed += not check.passed
    if missed:
        say(f"error: {missed} of the promises of {args.bundle} do not hold on this machine")
    return 1 if missed else 0


def _build_engines(args: argparse.Namespace) -> int:
    from ldm_runtime.engines.store import add_engines

    options = engine_options(args, args.builder)
    with reporting_to(sys.stderr) as progress:
        add_engines(args.bundle, options, progress=progress)
    print(args.bundle)
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from ldm_runtime.diagnostics.inspection import inspect, readable

    description = inspect(args.path)
    print(json.dumps(description, indent=1, default=str) if args.json else readable(description))
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from ldm_runtime.diagnostics.doctor import diagnose

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
    print(version())
    return 0
