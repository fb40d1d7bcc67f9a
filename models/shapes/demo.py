"""Export the trained shapes model and generate a contact sheet from its bundle, without torch.

    python models/shapes/demo.py    # writes engines/ and out/demo.png

The export is its own process, so that this one, which generates images, never loads torch.
"""

import argparse
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ldm_runtime import Generator
from ldm_runtime.errors import LdmError
from models.shapes.data import scenes
from models.shapes.evaluation import detector, held_out, scoring

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
COLUMNS, ROWS = 4, 4
SCENES_SEED = 7  # the first 16 held-out scenes of this seed, whatever they are
NOISE_SEED = 0  # image i is generated from noise i

_ZOOM = 3
_MARGIN = 12
_LINE_LETTERS = 34
_LINE_HEIGHT = 13
_CAPTION_LINES = 4
_PAPER, _INK = (255, 255, 255), (40, 40, 40)


def export_bundle(checkpoint: Path, bundle: Path, *, replace: bool) -> None:
    """Run `ldm-export` in another process.

    Args:
        checkpoint: The checkpoint.
        bundle: Folder of the bundle.
        replace: Whether a bundle of another checkpoint there is replaced.

    Raises:
        CalledProcessError: It failed, and has said why.
    """
    command = ["-m", "ldm_export.cli", "--ckpt", str(checkpoint), "--out", str(bundle)]
    command += ["--engines", "none", *(["--replace"] if replace else [])]
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def verdict(scene: scenes.Scene, reading: detector.Reading) -> str:
    """Return "right", or the faults of an image."""
    matched = scoring.match(scene.things, reading.things)
    faults = []
    for wanted, found in zip(scene.things, matched, strict=True):
        if found is None:
            faults.append(f"no {wanted.color} {wanted.kind}")
        elif found.size != wanted.size:
            faults.append(f"{wanted.color} {wanted.kind} is {found.size}")
    faults += _false_relations(scene, matched)
    shown = (reading.background, reading.gradient)
    if shown != (scene.background, scene.gradient):
        faults.append(f"background is {reading.background}{' gradient' * reading.gradient}")
    extra = len(reading.things) - sum(found is not None for found in matched)
    if extra:
        faults.append(f"{extra} more than asked for")
    return ", ".join(faults) or "right"


def _false_relations(scene: scenes.Scene, matched: Sequence[scenes.Thing | None]) -> list[str]:
    """Return the faults in relations between things that were found, but elsewhere."""
    first = matched[0]
    return [
        f"not {relation}"
        for relation, other in zip(scene.relations, matched[1:], strict=True)
        if first is not None and other is not None
        if not scoring.relation_holds(relation, first, other)
    ]


def contact_sheet(images: Sequence[Image.Image], captions: Sequence[str]) -> Image.Image:
    """Return the images in a grid, enlarged without smoothing, each over its caption."""
    side = scenes.SIZE * _ZOOM
    width, height = side + _MARGIN, side + _CAPTION_LINES * _LINE_HEIGHT + _MARGIN
    rows = -(-len(images) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * width + _MARGIN, rows * height + _MARGIN), _PAPER)
    canvas, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for index, (image, text) in enumerate(zip(images, captions, strict=True)):
        row, column = divmod(index, COLUMNS)
        left, top = _MARGIN + column * width, _MARGIN + row * height
        sheet.paste(image.resize((side, side), Image.Resampling.NEAREST), (left, top))
        canvas.rectangle((left - 1, top - 1, left + side, top + side), outline=(200, 200, 200))
        for line, words in enumerate(textwrap.wrap(text, _LINE_LETTERS)):
            canvas.text((left, top + side + 3 + line * _LINE_HEIGHT), words, fill=_INK, font=font)
    return sheet


def generate_sheet(bundle: Path, path: Path) -> scoring.Tally:
    """Generate the prompts, print the verdict on each image, and save the sheet."""
    wanted = held_out.held_out_scenes(COLUMNS * ROWS, SCENES_SEED)
    images, tally = [], scoring.Tally()
    with Generator(bundle) as generator:
        for index, scene in enumerate(wanted):
            text = scenes.caption(scene)
            images.append(held_out.generate(generator, text, NOISE_SEED + index, {}))
            reading = detector.read_image(np.asarray(images[-1]))
            tally += scoring.score(scene, reading)
            print(f"{index + 1:2}  {text}: {verdict(scene, reading)}", flush=True)
    assert "torch" not in sys.modules, "the process that generates must not load torch"
    contact_sheet(images, [scenes.caption(scene) for scene in wanted]).save(path)
    return tally


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo: 0 on success, 1 for an error."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ckpt", type=Path, default=HERE / "shapes.ckpt")
    parser.add_argument("--bundle", type=Path, default=ROOT / "engines", help="to export to")
    parser.add_argument("--replace", action="store_true", help="another checkpoint's bundle, too")
    parser.add_argument("--out", type=Path, default=ROOT / "out", help="folder of the sheet")
    args = parser.parse_args(argv)
    bundle, sheet = args.bundle.resolve(), args.out.resolve() / "demo.png"
    sheet.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    try:
        export_bundle(args.ckpt.resolve(), bundle, replace=args.replace)
        exported = time.perf_counter()
        tally = generate_sheet(bundle, sheet)
    except subprocess.CalledProcessError as error:
        return int(error.returncode)
    except LdmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    generated = time.perf_counter()
    print(
        f"\n{tally.objects_right} of {tally.objects} objects, "
        f"{tally.relations_right} of {tally.relations} relations and "
        f"{tally.images_right} of {tally.images} whole images are right\n"
        f"export {exported - started:.1f} s, {tally.images} images {generated - exported:.1f} s\n"
        f"{sheet}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
