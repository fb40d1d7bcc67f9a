"""Measure a bundle of the shapes model: draw held-out captions, read the pictures back, count.

    python models/shapes/evaluate.py --bundle engines/        # 200 captions
    python models/shapes/evaluate.py --detector               # the ruler itself, on clean renders
    python models/shapes/evaluate.py --sweep --help           # samplers and steps, docs/quality.md

Prints a table and one JSON line (`--json`: the line alone).
"""

import argparse
import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
from PIL import Image

import detector
import scenes
from ldm_runtime import Generator
from ldm_runtime.errors import LdmError

#: RGB (64, 64, 3).
Picture = npt.NDArray[np.uint8]

#: Of the captions, not of the training scenes; caption i is drawn from noise seed + i.
SEED = 20_220_413
DETECTOR_RENDERS = 2000
DETECTOR_GOAL = 0.99
_NEAR = 2.0  # pixels that a detection on a clean render may be off


@dataclass(frozen=True, kw_only=True)
class Tally:
    """How many were asked for, and how many of those are right.

    Attributes:
        pictures: Pictures judged.
        pictures_right: Those with every object, size, relation and the background right, and
            nothing besides.
        objects: Objects asked for.
        objects_right: Those with a detection of the same kind and colour.
        sizes_right: Objects right that also have the right size.
        relations: Relations asked for.
        relations_judged: Those whose two objects were both found.
        relations_right: Relations judged that hold.
        backgrounds_right: Pictures with the right colour of background.
        gradients_right: Pictures with a gradient exactly if asked for.
        extra: Things detected that nobody asked for.
    """

    pictures: int = 0
    pictures_right: int = 0
    objects: int = 0
    objects_right: int = 0
    sizes_right: int = 0
    relations: int = 0
    relations_judged: int = 0
    relations_right: int = 0
    backgrounds_right: int = 0
    gradients_right: int = 0
    extra: int = 0

    def __add__(self, other: Self) -> "Tally":
        names = [field.name for field in fields(self)]
        return Tally(**{name: getattr(self, name) + getattr(other, name) for name in names})

    def shares(self) -> dict[str, float | None]:
        """Return the shares that are right; None where there was nothing to get right.

        An object or relation counts as wrong if anything it needs was not found, except in
        `relations_of_found_objects`.
        """
        pairs = {
            "objects": (self.objects_right, self.objects),
            "relations": (self.relations_right, self.relations),
            "relations_of_found_objects": (self.relations_right, self.relations_judged),
            "sizes": (self.sizes_right, self.objects),
            "backgrounds": (self.backgrounds_right, self.pictures),
            "gradients": (self.gradients_right, self.pictures),
            "whole_pictures": (self.pictures_right, self.pictures),
        }
        return {name: right / of if of else None for name, (right, of) in pairs.items()}


def match(
    wanted: Iterable[scenes.Thing], found: Iterable[scenes.Thing]
) -> list[scenes.Thing | None]:
    """Return for each thing wanted one found with its kind and colour, or None; each used once.

    Of several, one of the right size is preferred, then the earlier.
    """
    left = list(found)
    matched: list[scenes.Thing | None] = []
    for thing in wanted:
        alike = [each for each in left if (each.kind, each.color) == (thing.kind, thing.color)]
        same_size = [each for each in alike if each.size == thing.size]
        best = next(iter(same_size + alike), None)
        matched.append(best)
        if best is not None:
            left.remove(best)
    return matched


def relation_holds(relation: str, first: scenes.Thing, other: scenes.Thing) -> bool:
    """Tell whether `first` is e.g. left of `other`: that way, and more that way than across."""
    toward_x, toward_y = scenes.RELATIONS[relation]
    dx, dy = other.x - first.x, other.y - first.y
    return dx * toward_x + dy * toward_y > abs(dx * toward_y) + abs(dy * toward_x)


def judge(scene: scenes.Scene, reading: detector.Reading) -> Tally:
    """Compare what was asked for with what the picture shows."""
    matched = match(scene.things, reading.things)
    found = [thing for thing in matched if thing is not None]
    related = [
        relation_holds(relation, matched[0], other)
        for relation, other in zip(scene.relations, matched[1:], strict=True)
        if matched[0] is not None and other is not None
    ]
    sizes_right = sum(
        thing is not None and thing.size == wanted.size
        for wanted, thing in zip(scene.things, matched, strict=True)
    )
    background = reading.background == scene.background
    gradient = reading.gradient == scene.gradient
    extra = len(reading.things) - len(found)
    whole = (
        sizes_right == len(scene.things)
        and sum(related) == len(scene.relations)
        and (background and gradient and not extra)
    )
    return Tally(
        pictures=1,
        pictures_right=int(whole),
        objects=len(scene.things),
        objects_right=len(found),
        sizes_right=sizes_right,
        relations=len(scene.relations),
        relations_judged=len(related),
        relations_right=sum(related),
        backgrounds_right=int(background),
        gradients_right=int(gradient),
        extra=extra,
    )


def held_out_scenes(count: int, seed: int) -> list[scenes.Scene]:
    """Return scenes whose captions were never trained on."""
    return list(islice(scenes.random_scenes(np.random.default_rng(seed), held_out=True), count))


def evaluate_bundle(
    generator: Generator, wanted: Sequence[scenes.Scene], settings: Mapping[str, object]
) -> tuple[Tally, float]:
    """Draw each scene's caption and return the tally and the mean seconds a picture took.

    Args:
        generator: An open bundle.
        wanted: The scenes; picture i is drawn from noise SEED + i.
        settings: Further fields of the requests.
    """
    pictures, seconds = draw_all(generator, wanted, settings)
    return judge_all(wanted, pictures), sum(seconds) / max(len(wanted), 1)


def draw_all(
    generator: Generator, wanted: Sequence[scenes.Scene], settings: Mapping[str, object]
) -> tuple[list[Picture], list[float]]:
    """Return a picture for each scene's caption, i from noise SEED + i, and the seconds of each."""
    pictures, seconds = [], []
    for index, scene in enumerate(wanted):
        started = time.perf_counter()
        image = draw(generator, scene, SEED + index, settings)
        seconds.append(time.perf_counter() - started)
        pictures.append(np.asarray(image))
    return pictures, seconds


def judge_all(wanted: Sequence[scenes.Scene], pictures: Sequence[Picture]) -> Tally:
    """Read the pictures and compare each with its scene."""
    readings = map(detector.read_picture, pictures)
    return sum(map(judge, wanted, readings), Tally())


def draw(
    generator: Generator, scene: scenes.Scene, seed: int, settings: Mapping[str, object]
) -> Image.Image:
    """Return the picture a bundle draws for a scene's caption; `settings` are request fields."""
    size = {"height": scenes.SIZE, "width": scenes.SIZE}
    return generator(prompt=scenes.caption(scene), seed=seed, **size, **settings).images[0]


def evaluate_detector(
    count: int, seed: int, *, noise: float = 0.0, blurs: int = 0
) -> dict[str, float]:
    """Return the share of renders, clean or degraded, that are read back without any mistake.

    Args:
        count: How many renders.
        seed: Of the scenes and the noise.
        noise: Standard deviation of added noise in grey levels.
        blurs: How many times to average each pixel with its neighbours first.
    """
    rng = np.random.default_rng(seed)
    drawn = [scenes.random_scene(rng) for _ in range(count)]
    readings = [detector.read_picture(photograph(each, rng, noise, blurs)) for each in drawn]
    right = sum(map(_is_exact, drawn, readings))
    overlaps = [overlap for reading in readings for overlap in reading.overlaps]
    return {"pictures": count, "right": right / count, "lowest_overlap": min(overlaps, default=0)}


def photograph(scene: scenes.Scene, rng: np.random.Generator, noise: float, blurs: int) -> Picture:
    """Render a scene to uint8 through a bad lens: blurred (weights 1 2 1), then noisy."""
    picture = scenes.render(scene) * 255
    for _ in range(blurs):
        picture = detector.smooth(picture)
    noisy = picture + noise * rng.standard_normal(picture.shape, np.float32)
    levels: Picture = np.rint(np.clip(noisy, 0, 255)).astype(np.uint8)
    return levels


def _is_exact(scene: scenes.Scene, reading: detector.Reading) -> bool:
    """Tell whether a reading says everything of a scene, places included."""
    matched = match(scene.things, reading.things)
    near = all(
        found is not None
        and max(abs(found.x - thing.x), abs(found.y - thing.y)) < _NEAR
        and abs(found.radius - thing.radius) < _NEAR
        for thing, found in zip(scene.things, matched, strict=True)
    )
    return near and judge(scene, reading).pictures_right == 1


def table(tally: Tally) -> str:
    """Return the counts and shares as text, a row each."""
    rows = {
        "objects (kind and colour)": ("objects", tally.objects_right, tally.objects),
        "relations": ("relations", tally.relations_right, tally.relations),
        "  of objects found": (
            "relations_of_found_objects",
            tally.relations_right,
            tally.relations_judged,
        ),
        "sizes": ("sizes", tally.sizes_right, tally.objects),
        "background colours": ("backgrounds", tally.backgrounds_right, tally.pictures),
        "gradient or plain": ("gradients", tally.gradients_right, tally.pictures),
        "whole pictures": ("whole_pictures", tally.pictures_right, tally.pictures),
    }
    shares = tally.shares()
    lines = [f"{'':27}{'right':>7}{'of':>6}{'share':>9}"]
    for label, (key, right, count) in rows.items():
        share = shares[key]
        lines.append(f"{label:27}{right:7}{count:6}{'-' if share is None else f'{share:.1%}':>9}")
    lines.append(f"{'things nobody asked for':27}{tally.extra:7}")
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this script."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bundle", type=Path, default=Path("engines"))
    parser.add_argument("--captions", type=int, default=200, help="how many (default: %(default)s)")
    parser.add_argument("--sampler", help="default: the bundle's")
    parser.add_argument("--steps", type=int, help="default: the bundle's")
    parser.add_argument("--guidance-scale", type=float, help="default: the bundle's")
    parser.add_argument("--json", action="store_true", help="print the JSON line alone")
    parser.add_argument("--detector", action="store_true", help="test the detector, no bundle")
    parser.add_argument(
        "--sweep", action="store_true", help="compare samplers and steps; see --sweep --help"
    )
    parser.add_argument(
        "--report", action="store_true", help="write docs/quality.md from the sweep's results"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the evaluation: 0 on success, 1 for an error or a detector below its goal."""
    arguments = sys.argv[1:] if argv is None else argv
    if {"--sweep", "--report"} & set(arguments):
        import sweep  # which imports this module

        return sweep.main(arguments)
    args = build_parser().parse_args(arguments)
    if args.captions < 1:
        print(f"error: --captions must be at least 1, got {args.captions}", file=sys.stderr)
        return 2
    if args.detector:
        return _run_detector()
    try:
        return _run_bundle(args)
    except LdmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _run_bundle(args: argparse.Namespace) -> int:
    settings = {
        "sampler": args.sampler,
        "num_inference_steps": args.steps,
        "guidance_scale": args.guidance_scale,
    }
    with Generator(args.bundle) as generator:
        wanted = held_out_scenes(args.captions, SEED)
        tally, seconds = evaluate_bundle(generator, wanted, settings)
    if not args.json:
        print(table(tally))
        print(f"{seconds:.2f} s a picture")
    report = {
        "bundle": str(args.bundle),
        "settings": settings,
        "shares": {
            name: share if share is None else round(share, 4)
            for name, share in tally.shares().items()
        },
        "counts": asdict(tally),
        "seconds_per_picture": round(seconds, 4),
    }
    print(json.dumps(report))
    return 0


def _run_detector() -> int:
    report = {
        "clean": evaluate_detector(DETECTOR_RENDERS, SEED),
        "noisy": evaluate_detector(DETECTOR_RENDERS, SEED, noise=12.0),
        "blurred_and_noisy": evaluate_detector(DETECTOR_RENDERS, SEED, noise=12.0, blurs=1),
    }
    print(json.dumps({"detector": report}))
    return 0 if report["clean"]["right"] >= DETECTOR_GOAL else 1


if __name__ == "__main__":
    # The sweep writes its rows as the benchmarks do.
    sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    sys.exit(main())
