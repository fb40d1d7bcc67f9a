"""Export every trained example and draw a sheet of each, without torch.

    python models/shapes/gallery.py                   # writes out/gallery
    python models/shapes/gallery.py inpainting        # only that one

For every system: `out/gallery/NAME` is its bundle and `out/gallery/NAME.png` the sheet, what was
given above what was drawn. `out/gallery/inputs` has what `docs/tasks.md` gives to `ldm generate`.
"""

import argparse
import json
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
from PIL import Image, ImageDraw

from ldm_runtime import Generator
from ldm_runtime.errors import LdmError
from ldm_runtime.specs.model import Task
from models.shapes import demo
from models.shapes.catalog.systems import SYSTEMS, System
from models.shapes.data import scenes
from models.shapes.data.labels import box_of, class_colors, label_names, label_of, scene_map
from models.shapes.evaluation.scores import Question, drawing_of, shrink

HERE, ROOT = demo.HERE, demo.ROOT
PICTURES, STEPS = 8, 50
_SEED = 7  # of the scenes, the demo's
_ZOOM, _GAP = 2, 4
_PAPER, _HOLE = (255, 255, 255), (255, 0, 255)
_THICK = 2
_LINE_LETTERS = 18


def _boxes(question: Question) -> Image.Image:
    """Return the asked boxes in the colours of what they are to hold."""
    side = scenes.SIZE * _ZOOM
    picture = Image.new("RGB", (side, side), (244, 244, 244))
    draw = ImageDraw.Draw(picture)
    for thing in question.scene.things:
        corners = [round(corner * (side - 1)) for corner in box_of(thing)]
        draw.rectangle(corners, outline=scenes.COLORS[thing.color], width=_THICK)
        draw.text((corners[0] + 4, corners[1] + 3), thing.kind, fill=(40, 40, 40))
    return picture


def _words(text: str) -> Image.Image:
    side = scenes.SIZE * _ZOOM
    picture = Image.new("RGB", (side, side), _PAPER)
    lines = [line for part in text.splitlines() for line in textwrap.wrap(part, _LINE_LETTERS)]
    ImageDraw.Draw(picture).multiline_text((4, 4), "\n".join(lines), fill=(40, 40, 40))
    return picture


def _map(question: Question) -> Image.Image:
    levels = (class_colors()[scene_map(question.scene)] + 1) * 127.5
    return Image.fromarray(np.rint(levels).astype(np.uint8))


def _hole(question: Question) -> Image.Image:
    picture = question.truth.copy()
    picture[question.hole] = _HOLE
    return Image.fromarray(picture)


def _label(question: Question) -> Image.Image:
    (thing,) = question.scene.things
    return _words(f"class {label_of(thing)}\n{thing.color} {thing.kind}")


#: What a system was given, to be looked at; none where nothing is given.
CUSTOM: Mapping[Task, Callable[[Question], Image.Image]] = MappingProxyType(
    {
        "class-to-image": _label,
        "text-to-image": lambda asked: _words(scenes.caption(asked.scene)),
        "layout-to-image": _boxes,
        "semantic-synthesis": _map,
        "super-resolution": lambda asked: Image.fromarray(shrink(asked.truth)),
        "inpainting": _hole,
    }
)


def sheet(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Return pictures in rows of one length, each enlarged to one size without smoothing."""
    side = scenes.SIZE * _ZOOM
    width, height = len(rows[0]) * (side + _GAP) + _GAP, len(rows) * (side + _GAP) + _GAP
    paper = Image.new("RGB", (width, height), _PAPER)
    for line, pictures in enumerate(rows):
        for column, picture in enumerate(pictures):
            place = (_GAP + column * (side + _GAP), _GAP + line * (side + _GAP))
            paper.paste(picture.resize((side, side), Image.Resampling.NEAREST), place)
    return paper


def write_inputs(folder: Path) -> None:
    """Write one input of every kind, of a scene that no system was trained on."""
    from models.shapes.evaluation.systems import held_out_questions

    folder.mkdir(parents=True, exist_ok=True)
    (question,) = held_out_questions(SYSTEMS["inpainting"], 1, _SEED)
    names = label_names()
    objects = [
        {"label": names[label_of(each)], "box": [round(side, 4) for side in box_of(each)]}
        for each in question.scene.things
    ]
    (folder / "boxes.json").write_text(json.dumps(objects, indent=1) + "\n")
    (folder / "labels.txt").write_text("\n".join(names) + "\n")
    assert question.hole is not None, "inpainting has holes"
    pictures = {
        "map": scene_map(question.scene),
        "picture": drawing_of(question.scene),
        "small": shrink(question.truth),
        "mask": np.where(question.hole, np.uint8(255), np.uint8(0)),
    }
    for name, pixels in pictures.items():
        Image.fromarray(pixels).save(folder / f"{name}.png")


def draw_system(system: System, bundle: Path) -> Image.Image:
    """Return the sheet of a system's bundle.

    Raises:
        LdmError: The bundle cannot draw it.
    """
    from models.shapes.evaluation.systems import draw_all, held_out_questions

    questions = held_out_questions(system, PICTURES, _SEED)
    with Generator(bundle) as generator:
        drawn, _ = draw_all(generator, system, questions, STEPS)
    rows = [[Image.fromarray(picture) for picture in drawn]]
    if system.task in CUSTOM:
        rows.insert(0, [CUSTOM[system.task](question) for question in questions])
    return sheet(rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Make the gallery: 0 on success, 1 for an error."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    known = [name for name in SYSTEMS if (HERE / f"{name}.ckpt").exists()]
    parser.add_argument("names", nargs="*", choices=[*known, []], help=", ".join(known))
    parser.add_argument("--out", type=Path, default=ROOT / "out/gallery")
    args = parser.parse_args(argv)
    out = args.out.resolve()
    try:
        write_inputs(out / "inputs")
        for name in args.names or known:
            started = time.perf_counter()
            demo.export_bundle(HERE / f"{name}.ckpt", out / name)
            exported = time.perf_counter()
            draw_system(SYSTEMS[name], out / name).save(out / f"{name}.png")
            drawn = time.perf_counter() - exported
            print(f"{out / name}.png: export {exported - started:.1f} s, drawn in {drawn:.1f} s")
    except subprocess.CalledProcessError as error:
        return int(error.returncode)
    except LdmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    assert "torch" not in sys.modules, "the process that draws must not load torch"
    return 0


if __name__ == "__main__":
    sys.exit(main())
