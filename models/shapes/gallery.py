"""Export every trained example and generate a sheet of each, without torch.

    python models/shapes/gallery.py                   # writes out/gallery
    python models/shapes/gallery.py inpainting        # only that one

For every model: `out/gallery/NAME` is its bundle and `out/gallery/NAME.png` the sheet, the
inputs above the generated images. `out/gallery/inputs` has the inputs of `ldm generate` in
`docs/tasks.md`.
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
from models.shapes.catalog.models import MODELS, TrainedModel
from models.shapes.data import scenes
from models.shapes.data.labels import box_of, class_colors, label_names, label_of, scene_map
from models.shapes.data.masks import mask_image
from models.shapes.evaluation.scores import EvaluationPrompt, image_of, shrink

HERE, ROOT = demo.HERE, demo.ROOT
IMAGES = 8
_SEED = 7  # of the scenes, the demo's
_ZOOM, _GAP = 2, 4
_PAPER, _MASKED = (255, 255, 255), (255, 0, 255)
_THICK = 2
_LINE_LETTERS = 18


def _boxes(prompt: EvaluationPrompt) -> Image.Image:
    """Return the boxes of a prompt in the colours of their things."""
    side = scenes.SIZE * _ZOOM
    image = Image.new("RGB", (side, side), (244, 244, 244))
    canvas = ImageDraw.Draw(image)
    for thing in prompt.scene.things:
        corners = [round(corner * (side - 1)) for corner in box_of(thing)]
        canvas.rectangle(corners, outline=scenes.COLORS[thing.color], width=_THICK)
        canvas.text((corners[0] + 4, corners[1] + 3), thing.kind, fill=(40, 40, 40))
    return image


def _words(text: str) -> Image.Image:
    side = scenes.SIZE * _ZOOM
    image = Image.new("RGB", (side, side), _PAPER)
    lines = [line for part in text.splitlines() for line in textwrap.wrap(part, _LINE_LETTERS)]
    ImageDraw.Draw(image).multiline_text((4, 4), "\n".join(lines), fill=(40, 40, 40))
    return image


def _map(prompt: EvaluationPrompt) -> Image.Image:
    levels = (class_colors()[scene_map(prompt.scene)] + 1) * 127.5
    return Image.fromarray(np.rint(levels).astype(np.uint8))


def _masked(prompt: EvaluationPrompt) -> Image.Image:
    image = prompt.truth.copy()
    image[prompt.mask] = _MASKED
    return Image.fromarray(image)


def _label(prompt: EvaluationPrompt) -> Image.Image:
    (thing,) = prompt.scene.things
    return _words(f"class {label_of(thing)}\n{thing.color} {thing.kind}")


#: The input of a model as an image; none where there is no input.
INPUT_IMAGES: Mapping[Task, Callable[[EvaluationPrompt], Image.Image]] = MappingProxyType(
    {
        "class-to-image": _label,
        "text-to-image": lambda asked: _words(scenes.caption(asked.scene)),
        "layout-to-image": _boxes,
        "semantic-synthesis": _map,
        "super-resolution": lambda asked: Image.fromarray(shrink(asked.truth)),
        "inpainting": _masked,
    }
)


def sheet(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Return images in rows of one length, each enlarged to one size without smoothing."""
    side = scenes.SIZE * _ZOOM
    width, height = len(rows[0]) * (side + _GAP) + _GAP, len(rows) * (side + _GAP) + _GAP
    paper = Image.new("RGB", (width, height), _PAPER)
    for line, images in enumerate(rows):
        for column, image in enumerate(images):
            place = (_GAP + column * (side + _GAP), _GAP + line * (side + _GAP))
            paper.paste(image.resize((side, side), Image.Resampling.NEAREST), place)
    return paper


def write_inputs(folder: Path) -> None:
    """Write one input of every kind, of a scene that no model was trained on."""
    from models.shapes.evaluation.tasks import held_out_prompts

    folder.mkdir(parents=True, exist_ok=True)
    (prompt,) = held_out_prompts(MODELS["inpainting"], 1, _SEED)
    names = label_names()
    objects = [
        {"label": names[label_of(each)], "box": [round(side, 4) for side in box_of(each)]}
        for each in prompt.scene.things
    ]
    (folder / "boxes.json").write_text(json.dumps(objects, indent=1) + "\n")
    (folder / "labels.txt").write_text("\n".join(names) + "\n")
    assert prompt.mask is not None, "inpainting has masks"
    images = {
        "map": scene_map(prompt.scene),
        "image": image_of(prompt.scene),
        "small": shrink(prompt.truth),
        "mask": mask_image(prompt.mask),
    }
    for name, pixels in images.items():
        Image.fromarray(pixels).save(folder / f"{name}.png")


def generate_sheet(model: TrainedModel, bundle: Path) -> Image.Image:
    """Return the sheet of a model's bundle.

    Raises:
        LdmError: The bundle cannot generate it.
    """
    from models.shapes.evaluation.tasks import generate_all, held_out_prompts

    prompts = held_out_prompts(model, IMAGES, _SEED)
    with Generator(bundle) as generator:
        generated, _ = generate_all(generator, model, prompts, None)
    rows = [[Image.fromarray(image) for image in generated]]
    if model.task in INPUT_IMAGES:
        rows.insert(0, [INPUT_IMAGES[model.task](prompt) for prompt in prompts])
    return sheet(rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Make the gallery: 0 on success, 1 for an error."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    known = [name for name in MODELS if (HERE / f"{name}.ckpt").exists()]
    parser.add_argument("names", nargs="*", choices=[*known, []], help=", ".join(known))
    parser.add_argument("--out", type=Path, default=ROOT / "out/gallery")
    args = parser.parse_args(argv)
    out = args.out.resolve()
    try:
        write_inputs(out / "inputs")
        for name in args.names or known:
            started = time.perf_counter()
            demo.export_bundle(HERE / f"{name}.ckpt", out / name, replace=True)
            exported = time.perf_counter()
            generate_sheet(MODELS[name], out / name).save(out / f"{name}.png")
            generated = time.perf_counter() - exported
            print(f"{out / name}.png: export {exported - started:.1f} s, images {generated:.1f} s")
    except subprocess.CalledProcessError as error:
        return int(error.returncode)
    except LdmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    assert "torch" not in sys.modules, "the process that generates must not load torch"
    return 0


if __name__ == "__main__":
    sys.exit(main())
