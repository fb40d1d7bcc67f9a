"""Train the other systems of the paper: first stages, encoders, UNets, then a checkpoint of each.

    python models/shapes/train_systems.py vq                # the first stage of all but inpainting
    python models/shapes/train_systems.py vq_noattn         # inpainting's, without attention
    python models/shapes/train_systems.py bert              # the encoder of captions
    python models/shapes/train_systems.py layouts           # the encoder of layouts
    python models/shapes/train_systems.py latents NAME …    # what NAME needs is encoded once
    python models/shapes/train_systems.py train NAME …      # the UNet of NAME, such as inpainting
    python models/shapes/train_systems.py check NAME …      # draws and judges held-out rows
    python models/shapes/train_systems.py pack NAME …       # models/shapes/NAME.ckpt and NAME.yaml
    python models/shapes/train_systems.py unpack NAME …     # from NAME.ckpt back to where to go on

It needs the data of `train.py`, goes on from the last saved state, and logs to `log.jsonl`. Every
stage is one process that computes on one core if `OMP_NUM_THREADS=1` says so.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from models.shapes.catalog.systems import SYSTEMS, System

_FIRST_STAGES = ("vq", "vq_noattn")
_CHECKED, _CHECKED_STEPS = 64, 25


def _vq() -> None:
    from models.shapes.training.vq import train_vq

    train_vq()


def _vq_without_attention() -> None:
    from models.shapes.training.vq import train_vq_without_attention

    train_vq_without_attention()


def _bert() -> None:
    from models.shapes.training.bert_text import train_words

    train_words()


def _layouts() -> None:
    from models.shapes.training.layouts import train_layouts

    train_layouts()


def _latents(system: System, _: argparse.Namespace) -> None:
    from models.shapes.training.corpus import load_corpus

    corpus = load_corpus(system)
    print(f"{system.name}: {len(corpus.rows)} rows, latents times {corpus.scale:.4f}")


def _train(system: System, _: argparse.Namespace) -> None:
    from models.shapes.training.system import train_system

    train_system(system)


def _check(system: System, args: argparse.Namespace) -> None:
    from models.shapes.training.system import check_system

    if args.guidance_scale is not None:
        system = replace(system, guidance_scale=args.guidance_scale)
    found = check_system(system, args.pictures, args.steps)
    settings = {"pictures": args.pictures, "steps": args.steps, "guidance": system.guidance_scale}
    rounded = {name: round(value, 4) for name, value in found.items()}
    print(json.dumps({"system": system.name} | settings | rounded))


def _pack(system: System, _: argparse.Namespace) -> None:
    from models.shapes.training.packing import pack

    print(f"{system.name}: {pack(system):,} bytes")


def _unpack(system: System, _: argparse.Namespace) -> None:
    from models.shapes.training.unpacking import unpack

    print(f"{system.name}: step {unpack(system)}")


_STAGES: Mapping[str, Callable[[], None]] = {
    "vq": _vq,
    "vq_noattn": _vq_without_attention,
    "bert": _bert,
    "layouts": _layouts,
}
_ACTIONS: Mapping[str, Callable[[System, argparse.Namespace], None]] = {
    "latents": _latents,
    "train": _train,
    "check": _check,
    "pack": _pack,
    "unpack": _unpack,
}


def _check_first_stage(name: str) -> None:
    from models.shapes.training.vq import check_saved

    rounded = {key: round(value, 4) for key, value in check_saved(name).items()}
    print(json.dumps({"first_stage": name} | rounded))


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this script."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("stage", choices=[*_STAGES, *_ACTIONS])
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help=f"systems: {', '.join(SYSTEMS)}; of check also {' or '.join(_FIRST_STAGES)}",
    )
    parser.add_argument(
        "--pictures", type=int, default=_CHECKED, help="that check draws (default: %(default)s)"
    )
    parser.add_argument(
        "--steps", type=int, default=_CHECKED_STEPS, help="of each (default: %(default)s)"
    )
    parser.add_argument("--guidance-scale", type=float, help="of each (default: the system's own)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one stage: 0 on success, 2 for names that do not go with it."""
    parser = build_parser()
    args = parser.parse_args(argv)
    known = [*SYSTEMS, *(_FIRST_STAGES if args.stage == "check" else ())]
    unknown = [name for name in args.names if name not in known]
    if unknown or bool(args.names) != (args.stage in _ACTIONS):
        wanted = f"one or more of {', '.join(known)}" if args.stage in _ACTIONS else "no names"
        parser.error(f"{args.stage} takes {wanted}, got {' '.join(args.names) or 'none'}")
    deaf = [name for name in args.names if name not in SYSTEMS or not SYSTEMS[name].drops]
    if args.guidance_scale is not None and (args.stage != "check" or deaf):
        given = ", ".join(deaf) or args.stage
        parser.error(f"--guidance-scale is for check of what guidance can steer, not for {given}")
    if args.stage in _STAGES:
        _STAGES[args.stage]()
    for name in args.names:
        if name in SYSTEMS:
            _ACTIONS[args.stage](SYSTEMS[name], args)
        else:
            _check_first_stage(name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
