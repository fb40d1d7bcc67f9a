"""The flags of `ldm generate` that are fields of a request."""

import argparse
import re
from pathlib import Path

from ldm_runtime.noise import NOISES
from ldm_runtime.samplers import SAMPLERS
from ldm_runtime.schedules import SCHEDULES


def add_request_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a flag for every field of a request, and one for a file of them."""
    parser.add_argument("prompt", nargs="?", help="what to draw, if the bundle takes prompts")
    _add_conditions(parser.add_argument_group("what to draw, whichever the bundle takes"))
    _add_picture(parser.add_argument_group("the picture"))
    _add_sampling(parser.add_argument_group("how it is sampled"))
    _add_guidance(parser.add_argument_group("how closely it follows what it is told"))
    _add_start(parser.add_argument_group("pictures to start from"))
    _add_large(parser.add_argument_group("large pictures"))


def _add_conditions(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--class-label", type=_label, metavar="LABEL", help="a number, or a name in --label-names"
    )
    group.add_argument(
        "--layout",
        metavar="FILE",
        help='JSON: [{"label": 3, "box": [left, top, right, bottom]}, …], sides from 0 to 1',
    )
    group.add_argument(
        "--segmentation", metavar="FILE", help="PNG, gray or palette: a class number for each pixel"
    )
    group.add_argument("--embeddings", metavar="FILE", help=".npy: a vector a row")
    group.add_argument(
        "--label-names", type=Path, metavar="FILE", help="names of labels 0, 1, …, one a line"
    )
    group.add_argument("--negative-prompt", default="", metavar="TEXT", help="what to avoid")
    group.add_argument(
        "--plain-prompt",
        action="store_true",
        help="take prompts literally: no (word:1.2), no [word], no BREAK, no second chunk",
    )
    group.add_argument(
        "--requests",
        type=Path,
        metavar="FILE",
        help="draw what the lines of a file say, a request in JSON each, several at once",
    )


def _add_picture(group: argparse._ArgumentGroup) -> None:
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
    group.add_argument("--image", metavar="FILE", help="picture to start from, to enlarge, to fill")
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


def _label(text: str) -> int | str:
    """Read a number as one; what it may not be is said by the request."""
    return int(text) if re.fullmatch(r"-?\d+", text) else text


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
