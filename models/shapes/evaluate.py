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
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

import detector
import scenes
from judging import Picture, Tally, judge, judge_all, match, table
from ldm_runtime import Generator
from ldm_runtime.errors import LdmError
from ldm_runtime.manifest import MANIFEST_NAME, sha256_of

#: Of the captions, not of the training scenes; caption i is drawn from noise seed + i.
SEED = 20_220_413
DETECTOR_RENDERS = 2000
DETECTOR_GOAL = 0.99
_NEAR = 2.0  # pixels that a detection on a clean render may be off


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


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this script."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bundle", type=Path, default=Path("engines"))
    parser.add_argument("--captions", type=int, default=200, help="how many (default: %(default)s)")
    parser.add_argument("--sampler", help="default: the bundle's")
    parser.add_argument("--steps", type=int, help="default: the bundle's")
    parser.add_argument("--guidance-scale", type=float, help="default: the bundle's")
    parser.add_argument("--json", action="store_true", help="print the JSON line alone")
    parser.add_argument("--results", type=Path, help="file to append the JSON line to")
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
    from rows import commit, machine  # as the benchmarks write theirs

    report = {
        "bundle": str(args.bundle),
        "bundle_sha256": sha256_of(args.bundle / MANIFEST_NAME),
        "commit": commit(),
        "device": machine(),
        "settings": settings,
        "shares": {
            name: share if share is None else round(share, 4)
            for name, share in tally.shares().items()
        },
        "counts": asdict(tally),
        "seconds_per_picture": round(seconds, 4),
    }
    print(json.dumps(report))
    if args.results is not None:
        with args.results.open("a") as file:
            file.write(json.dumps(report) + "\n")
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
    # Rows are written as the benchmarks write theirs.
    sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    sys.exit(main())
