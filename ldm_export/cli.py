"""`ldm-export`: one checkpoint in, one bundle out."""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm_runtime.cli.engine_flags import add_engine_arguments, engine_options
from ldm_runtime.cli.messages import (
    add_message_flags,
    flush_stdout,
    give_up_stdout,
    print_any_text,
    reporting,
    say,
    show_messages,
)
from ldm_runtime.cli.parsing import Parser, add_json_flag
from ldm_runtime.cli.versions import version_line
from ldm_runtime.errors import LdmError
from ldm_runtime.escaping import printable_lines
from ldm_runtime.requests.presets import PRESETS
from ldm_runtime.version import extra

if TYPE_CHECKING:
    from ldm_export.source import ExportOptions
    from ldm_runtime.bundle.manifest import Manifest
    from ldm_runtime.specs.model import Task


_DIGITS = 12  # of a hash, in messages
#: Default of most features that the weights cannot tell.
_STATED = "(default: that of the configuration, the file or the model family)"


def build_parser() -> Parser:
    """Return the parser of `ldm-export`; nothing heavy is imported for `--help`."""
    parser = Parser(
        prog="ldm-export",
        usage="%(prog)s [flags] CKPT FOLDER",
        description="Turn a latent-diffusion checkpoint into a bundle that runs without torch.",
        epilog="Both `ldm-export model.ckpt engines/` and "
        "`ldm-export --ckpt model.ckpt --out engines/` will do.",
    )
    parser.add_argument(
        "paths", type=Path, nargs="*", metavar="PATH", help="--ckpt and --out without their names"
    )
    parser.add_argument(
        "--ckpt", type=Path, help=".ckpt, .pt, .pth or .safetensors file, or a folder of diffusers"
    )
    parser.add_argument("--out", type=Path, help="folder of the bundle")
    parser.add_argument("--version", action="store_true", help="print versions and exit")
    add_message_flags(parser)
    add_json_flag(parser, "print the bundle's folder, model and sources, or the estimate, as JSON")
    _add_bundle_flags(parser)
    add_engine_arguments(parser)
    _add_model_flags(parser)
    return parser


def _add_bundle_flags(parser: Parser) -> None:
    """Add the flags that say what is written."""
    parser.add_argument(
        "--estimate",
        action="store_true",
        help="print what the export would do and cost, then stop",
    )
    parser.add_argument(
        "--replace",
        action="store_true",
        help="replace the bundle of another checkpoint, if there is one in the folder",
    )
    parser.add_argument(
        "--weights-dtype",
        choices=("fp16", "fp32"),
        default="fp16",
        help="how weights are stored (default: %(default)s)",
    )
    parser.add_argument(
        "--engines",
        choices=("auto", "none", "tensorrt", "tensorrt-rtx"),
        help="builder of engines for NVIDIA GPUs (default: TensorRT if it and a GPU are here, "
        "else TensorRT-RTX if it is installed, else none)",
    )
    parser.add_argument(
        "--reuse",
        action="store_true",
        help="write the outermost blocks of the UNet as a graph of their own as well, which "
        "requests with --reuse take",
    )
    parser.add_argument(
        "--reuse-blocks",
        type=int,
        metavar="N",
        help="--reuse with that many blocks of either half of the UNet: more are slower and change "
        "images less (default: 1)",
    )
    parser.add_argument(
        "--quantize",
        choices=("int8",),
        help="add graphs in 8 bits for CPUs in the end, as `ldm quantize` does; --estimate counts "
        "none",
    )
    parser.add_argument(
        "--no-fp16",
        dest="fp16",
        action="store_false",
        help="leave out the graphs in half precision, which GPUs need and CPUs do not",
    )


def _add_model_flags(parser: Parser) -> None:
    """Add the flags about what the weights cannot tell."""
    features = parser.add_argument_group(
        "model configuration", "features that the weights cannot tell"
    )
    features.add_argument(
        "--config",
        type=lambda text: text if text == "none" else Path(text),
        metavar="FILE",
        help="CompVis yaml, or none (default: <ckpt>.yaml or config.yaml next to it)",
    )
    features.add_argument(
        "--vae",
        type=Path,
        metavar="FILE",
        help="autoencoder to take in place of the checkpoint's, a file or a folder of diffusers",
    )
    features.add_argument(
        "--text-encoder",
        type=Path,
        metavar="FILE",
        help="CLIP text encoder to take in place of the checkpoint's, likewise; of SDXL's two, the "
        "first",
    )
    features.add_argument(
        "--text-encoder-2",
        type=Path,
        metavar="FILE",
        help="OpenCLIP text encoder to take in place of SDXL's second one, likewise",
    )
    features.add_argument(
        "--tiny-decoder",
        type=Path,
        metavar="FILE",
        help="TAESD decoder to take along, for images decoded with --decoder tiny, likewise",
    )
    features.add_argument(
        "--image-normalizer",
        type=Path,
        metavar="FILE",
        help="mean and standard deviation of embeddings of images, which files of Stable Diffusion "
        "2.1 unCLIP L lack, likewise",
    )
    features.add_argument(
        "--weights",
        choices=("ema", "model"),
        help="moving averages or last weights of training (default: what the configuration's "
        "use_ema says, else what the family samples with)",
    )
    features.add_argument(
        "--num-heads", type=int, metavar="N", help=f"attention heads of the UNet {_STATED}"
    )
    features.add_argument(
        "--num-head-channels",
        type=int,
        metavar="N",
        help="channels per attention head of the UNet, instead of --num-heads",
    )
    features.add_argument(
        "--null-class",
        type=int,
        metavar="LABEL",
        help="null class, which classifier-free guidance needs (default: that of the "
        "configuration or the model family)",
    )
    features.add_argument(
        "--prediction-type",
        "--prediction",
        choices=("epsilon", "v_prediction", "sample"),
        help="prediction target of the UNet (default: that of --preset, the configuration or the "
        "file, else what is measured, else a hint such as metadata, else that of the model family)",
    )
    features.add_argument(
        "--zero-terminal-snr",
        action="store_true",
        default=None,
        help="the UNet was trained down to nothing but noise, so that the noise schedule of the "
        "bundle is rescaled to end there; such models predict v",
    )
    features.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        metavar="NAME",
        help="how a distilled model is sampled unless a request says otherwise, and what it "
        f"predicts: {', '.join(PRESETS)}",
    )
    features.add_argument(
        "--latent-scale-factor",
        type=float,
        metavar="FACTOR",
        help=f"factor from the autoencoder's latents to the UNet's {_STATED}",
    )
    features.add_argument(
        "--label-names",
        type=Path,
        metavar="FILE",
        help="names of labels 0, 1 and so on, one per line, to ask for classes by name",
    )
    features.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="PATTERN",
        help="leave out tensors that no network needs, by a shell pattern over whole names, such "
        "as 'adapter.*'; may be repeated",
    )
    for side in ("height", "width"):
        features.add_argument(
            f"--{side}",
            type=int,
            metavar="PIXELS",
            help=f"{side} of images unless a request has another {_STATED}",
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command: 0 on success, 1 for an error the user can act on, 2 for bad usage."""
    print_any_text()
    args = build_parser().parse_args(argv)
    try:
        _run(args)
    except BrokenPipeError:  # as of `ldm-export … | true`: the reader has closed the pipe
        give_up_stdout()
        return 1
    except LdmError as error:
        say(f"error: {error}")
        return 1
    except ImportError as error:
        say(f"error: {_missing(error)}")
        return 1
    except OSError as error:
        say(f"error: {error.filename or args.out or 'the system'}: {error.strerror or error}")
        give_up_stdout()
        return 1
    except MemoryError:
        say("error: not enough memory; `--estimate` prints how much the export takes")
        return 1
    except KeyboardInterrupt:
        say("interrupted; run the same command again to resume")
        return 130
    return 0


def _run(args: argparse.Namespace) -> None:
    if args.version:
        print(version_line("ldm-export", _library_versions()))
    else:
        _place_paths(args)
        show_messages(args, logging.INFO)
        _export(args)
    flush_stdout()  # so that a closed pipe is noticed here


def _place_paths(args: argparse.Namespace) -> None:
    """Take arguments without a flag as the checkpoint and the folder, whichever is not given."""
    paths: list[Path] = list(args.paths)
    for name in ("ckpt", "out"):
        if getattr(args, name) is None:
            if not paths:
                args.parser.error(
                    "give a checkpoint and a folder, as in `ldm-export model.ckpt engines/`"
                )
            setattr(args, name, paths.pop(0))
    if paths:
        args.parser.error(f'unexpected "{paths[0]}"; give one checkpoint and one folder')


def _library_versions() -> dict[str, str]:
    """Return the versions of the libraries that make graphs, as far as they are installed."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed_version

    versions = {}
    for name in ("torch", "onnx"):
        with suppress(PackageNotFoundError):
            versions[name] = installed_version(name)
    return versions


def _label_names(path: Path) -> tuple[str, ...]:
    from ldm_export.errors import ExportError
    from ldm_runtime.inputs.layouts import read_label_names

    try:
        return read_label_names(path)
    except ValueError as error:
        raise ExportError(f"--label-names: {error}") from error


def _missing(error: ImportError) -> str:
    install = f"install {extra('export')}"
    if isinstance(error, ModuleNotFoundError):
        return f"the package {error.name!r} is not installed; {install}"
    return f"the package {error.name!r} does not load ({error}); {install}"


def _export(args: argparse.Namespace) -> None:
    from ldm_export.intake.opening import open_model

    # A file that cannot be read is reported before torch loads.
    with open_model(
        args.ckpt,
        vae=args.vae,
        text_encoder=args.text_encoder,
        text_encoder_2=args.text_encoder_2,
        tiny_decoder=args.tiny_decoder,
        image_normalizer=args.image_normalizer,
    ):
        pass
    from ldm_export.bundle import estimate_export, export_bundle

    options = _options(args)
    if args.estimate:
        estimate = estimate_export(options)
        print(
            json.dumps(estimate.as_json(), indent=1)
            if args.json
            else printable_lines(estimate.describe())
        )
        return
    with reporting(args) as progress:
        manifest = export_bundle(options, progress=progress)
    if not args.quiet:
        say_sources(manifest)
        say_next(manifest.spec.task, args.out)
    print(json.dumps(_result(manifest, args.out), indent=1) if args.json else args.out)


def _result(manifest: "Manifest", out: Path) -> dict[str, Any]:
    spec, build = manifest.spec, manifest.build
    return {
        "bundle": str(out),
        "family": spec.family,
        "weights": spec.weights,
        "task": spec.task,
        "checkpoint": build.checkpoint,
        "checkpoint_sha256": build.checkpoint_sha256,
        "seconds": build.seconds,
        "assumptions": [asdict(each) for each in spec.assumptions],
        "quantization": None if manifest.quantization is None else asdict(manifest.quantization),
    }


def _options(args: argparse.Namespace) -> "ExportOptions":
    from ldm_export.detection.overrides import Overrides
    from ldm_export.source import ExportOptions

    return ExportOptions(
        checkpoint=args.ckpt,
        out=args.out,
        config=args.config,
        overrides=Overrides(
            weights=args.weights,
            num_heads=args.num_heads,
            num_head_channels=args.num_head_channels,
            null_class=args.null_class,
            prediction_type=args.prediction_type,
            zero_terminal_snr=args.zero_terminal_snr,
            preset=args.preset,
            latent_scale_factor=args.latent_scale_factor,
            height=args.height,
            width=args.width,
            label_names=None if args.label_names is None else _label_names(args.label_names),
            ignore=tuple(args.ignore),
            reuse=args.reuse_blocks
            if args.reuse_blocks is not None
            else ("default" if args.reuse else None),
        ),
        weights_dtype="float32" if args.weights_dtype == "fp32" else "float16",
        replace=args.replace,
        engines=engine_options(args, args.engines or ("auto" if args.fp16 else "none")),
        fp16=args.fp16,
        quantize=args.quantize == "int8",
        vae=args.vae,
        tiny_decoder=args.tiny_decoder,
        image_normalizer=args.image_normalizer,
        text_encoder=args.text_encoder,
        text_encoder_2=args.text_encoder_2,
    )


def say_sources(manifest: "Manifest") -> None:
    """Say what the weights could not tell, and which components have files of their own."""
    for assumption in manifest.spec.assumptions:
        say(f"assumed {assumption.field} = {assumption.value} (from {assumption.source})")
    for part in manifest.build.components:
        say(f"took the {part.component} from {part.file} (sha256 {part.sha256[:_DIGITS]}...)")


def say_next(task: "Task", bundle: Path) -> None:
    """Say where a bundle is, what to look at, and what to type to generate an image from it."""
    from ldm_export.next_command import next_command
    from ldm_runtime.diagnostics.golden_requests import SHEET_FILE

    say(f"the bundle is in {bundle}; look at what torch generated for it: {bundle / SHEET_FILE}")
    say(f"next: {next_command(task, bundle)}")


if __name__ == "__main__":
    sys.exit(main())
