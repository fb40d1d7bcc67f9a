"""Train the other models of the paper: autoencoders, encoders, UNets, then a checkpoint of each.

    python models/shapes/train_tasks.py vq                # the autoencoder of all but inpainting
    python models/shapes/train_tasks.py vq_noattn         # inpainting's, without attention
    python models/shapes/train_tasks.py bert              # the encoder of captions
    python models/shapes/train_tasks.py layouts           # the encoder of layouts
    python models/shapes/train_tasks.py latents NAME …    # encodes the images for NAME, once
    python models/shapes/train_tasks.py train NAME …      # the UNet of NAME, such as inpainting
    python models/shapes/train_tasks.py check NAME …      # generates and scores held-out rows
    python models/shapes/train_tasks.py pack NAME …       # models/shapes/NAME.ckpt and NAME.yaml
    python models/shapes/train_tasks.py unpack NAME …     # from NAME.ckpt back to where to go on

It needs the data of `train.py`, goes on from the last saved state, and logs to `log.jsonl`. Every
action is one process that computes on one core if `OMP_NUM_THREADS=1` says so.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from models.shapes.catalog.models import MODELS, TrainedModel

_AUTOENCODERS = ("vq", "vq_noattn")
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


def _latents(model: TrainedModel, _: argparse.Namespace) -> None:
    from models.shapes.training.corpus import load_corpus

    corpus = load_corpus(model)
    print(f"{model.name}: {len(corpus.rows)} rows, latents times {corpus.scale:.4f}")


def _train(model: TrainedModel, _: argparse.Namespace) -> None:
    from models.shapes.training.task_model import train_task

    train_task(model)


def _check(model: TrainedModel, args: argparse.Namespace) -> None:
    from models.shapes.training.task_model import check_task

    if args.guidance_scale is not None:
        model = replace(model, guidance_scale=args.guidance_scale)
    found = check_task(model, args.images, args.steps)
    settings = {"images": args.images, "steps": args.steps, "guidance": model.guidance_scale}
    rounded = {name: round(value, 4) for name, value in found.items()}
    print(json.dumps({"model": model.name} | settings | rounded))


def _pack(model: TrainedModel, _: argparse.Namespace) -> None:
    from models.shapes.training.packing import pack

    print(f"{model.name}: {pack(model):,} bytes")


def _unpack(model: TrainedModel, _: argparse.Namespace) -> None:
    from models.shapes.training.unpacking import unpack

    print(f"{model.name}: step {unpack(model)}")


_RUNS: Mapping[str, Callable[[], None]] = {
    "vq": _vq,
    "vq_noattn": _vq_without_attention,
    "bert": _bert,
    "layouts": _layouts,
}
_ACTIONS: Mapping[str, Callable[[TrainedModel, argparse.Namespace], None]] = {
    "latents": _latents,
    "train": _train,
    "check": _check,
    "pack": _pack,
    "unpack": _unpack,
}


def _check_autoencoder(name: str) -> None:
    from models.shapes.training.vq import check_saved

    rounded = {key: round(value, 4) for key, value in check_saved(name).items()}
    print(json.dumps({"autoencoder": name} | rounded))


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this script."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("action", choices=[*_RUNS, *_ACTIONS])
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help=f"models: {', '.join(MODELS)}; of check also {' or '.join(_AUTOENCODERS)}",
    )
    parser.add_argument(
        "--images", type=int, default=_CHECKED, help="that check generates (default: %(default)s)"
    )
    parser.add_argument(
        "--steps", type=int, default=_CHECKED_STEPS, help="of each (default: %(default)s)"
    )
    parser.add_argument("--guidance-scale", type=float, help="of each (default: the model's own)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one action: 0 on success, 2 for names that do not go with it."""
    parser = build_parser()
    args = parser.parse_args(argv)
    known = [*MODELS, *(_AUTOENCODERS if args.action == "check" else ())]
    unknown = [name for name in args.names if name not in known]
    if unknown or bool(args.names) != (args.action in _ACTIONS):
        wanted = f"one or more of {', '.join(known)}" if args.action in _ACTIONS else "no names"
        parser.error(f"{args.action} takes {wanted}, got {' '.join(args.names) or 'none'}")
    deaf = [name for name in args.names if name not in MODELS or not MODELS[name].drops]
    if args.guidance_scale is not None and (args.action != "check" or deaf):
        given = ", ".join(deaf) or args.action
        parser.error(f"--guidance-scale is for check of models with guidance, not for {given}")
    if args.action in _RUNS:
        _RUNS[args.action]()
    for name in args.names:
        if name in MODELS:
            _ACTIONS[args.action](MODELS[name], args)
        else:
            _check_autoencoder(name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
