"""The command `ldm`: its subcommands, and how it ends."""

import argparse
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path

from ldm_runtime.cli.backend_flags import add_backend_arguments
from ldm_runtime.cli.bench import add_bench_arguments, bench
from ldm_runtime.cli.build_engines import add_builder_arguments, build_engines
from ldm_runtime.cli.completion import SHELLS, completion_script
from ldm_runtime.cli.generate import add_generate_arguments, generate
from ldm_runtime.cli.messages import (
    add_message_flags,
    flush_stdout,
    give_up_stdout,
    print_any_text,
    say,
    show_messages,
)
from ldm_runtime.cli.parsing import USAGE, Parser, add_json_flag
from ldm_runtime.cli.quantize import add_quantize_arguments, quantize
from ldm_runtime.cli.reports import doctor, inspect, verify
from ldm_runtime.cli.triton import add_triton_arguments, triton
from ldm_runtime.cli.trust_flags import add_trust_arguments
from ldm_runtime.cli.versions import version_line
from ldm_runtime.errors import LdmError, RequestError

#: Entry points of other packages: functions that add a command to the subparsers of `ldm`.
COMMANDS_GROUP = "ldm_runtime.commands"
_INTERRUPTED = 130


def build_parser() -> Parser:
    """Return the parser of `ldm`; every flag of `generate` is a field of a request."""
    parser = Parser(prog="ldm", description="Generate images from a bundle made by ldm-export.")
    parser.add_argument("--version", action="store_true", help="print versions and exit")
    commands = parser.add_subparsers(title="commands", dest="command", parser_class=Parser)
    generating = _generate_parser(commands)
    verifying = commands.add_parser("verify", help="compare this machine's images with torch's")
    verifying.add_argument("bundle", type=Path)
    add_backend_arguments(verifying, default_precision="the backend's most exact")
    add_trust_arguments(verifying)
    verifying.set_defaults(run=verify)
    inspecting = commands.add_parser("inspect", help="describe an image, a bundle or a checkpoint")
    inspecting.add_argument("path", type=Path)
    inspecting.add_argument("--full", action="store_true", help="say all that is known")
    inspecting.set_defaults(run=inspect)
    diagnosing = commands.add_parser("doctor", help="say which backends can run here, and why not")
    diagnosing.set_defaults(run=doctor)
    measuring = commands.add_parser("bench", help="measure what an image costs on this machine")
    measuring.add_argument("bundle", type=Path)
    add_bench_arguments(measuring)
    measuring.set_defaults(run=bench)
    building = commands.add_parser("build-engines", help="build TensorRT engines into a bundle")
    add_builder_arguments(building)
    building.set_defaults(run=build_engines)
    quantizing = commands.add_parser("quantize", help="add graphs in 8 bits to a bundle, for CPUs")
    add_quantize_arguments(quantizing)
    quantizing.set_defaults(run=quantize)
    exporting = commands.add_parser("triton", help="add a bundle to a Triton model repository")
    add_triton_arguments(exporting)
    exporting.set_defaults(run=triton)
    completing = commands.add_parser("completion", help="print a script for a shell's completion")
    completing.add_argument("shell", choices=SHELLS)
    completing.set_defaults(run=_completion)
    for point in entry_points(group=COMMANDS_GROUP):
        point.load()(commands)
    for command in (generating, verifying, inspecting, diagnosing, building, quantizing, exporting):
        add_json_flag(command)
    for command in commands.choices.values():
        add_message_flags(command)
    parser.set_defaults(repeats_messages=False)  # a command that runs on says otherwise
    return parser


def _generate_parser(commands: "argparse._SubParsersAction[Parser]") -> Parser:
    """Add `ldm generate` and return its parser."""
    parser = commands.add_parser(
        "generate", help="generate images", usage="%(prog)s [prompt] [flags]"
    )
    add_generate_arguments(parser)
    engine = parser.add_argument_group("Engine")
    add_backend_arguments(engine)
    engine.add_argument(
        "--low-memory",
        action="store_true",
        help="hold one network at a time in memory: slower to start, the same images",
    )
    add_trust_arguments(engine)
    parser.set_defaults(run=generate)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command of `ldm`.

    Returns:
        0 on success, 1 for a failure, 2 for a request or usage that is wrong, 130 if interrupted.
    """
    print_any_text()
    args = build_parser().parse_args(argv)
    try:
        return _run(args)
    except BrokenPipeError:  # as of `ldm inspect engines/ | head`: the reader has closed the pipe
        give_up_stdout()
        return 1
    except LdmError as error:
        say(f"error: {error}")
        return USAGE if isinstance(error, RequestError) else 1
    except OSError as error:
        say(f"error: {error.filename or 'the system'}: {error.strerror or error}")
        give_up_stdout()
        return 1
    except ModuleNotFoundError as error:
        say(f"error: the package {error.name!r} is not installed; install the extra that has it")
        return 1
    except MemoryError:
        say("error: not enough memory; ask for smaller images")
        return 1
    except KeyboardInterrupt:
        say("interrupted")
        return _INTERRUPTED


def _run(args: argparse.Namespace) -> int:
    if args.command is None and not args.version:
        args.parser.error("say what to do, such as `ldm generate`")
    status = 0
    if args.version:
        print(version_line("ldm"))
    else:
        show_messages(args, repeats=args.repeats_messages)
        status = int(args.run(args))
    flush_stdout()  # so that a closed pipe is noticed here
    return status


def _completion(args: argparse.Namespace) -> int:
    print(completion_script(build_parser(), args.shell))
    return 0
