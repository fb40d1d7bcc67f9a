"""The gallery: what is given can be looked at and given again, and its page is valid."""

import ast
import os
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm_runtime.cli.commands import build_parser
from ldm_runtime.inputs.images import InputImage
from ldm_runtime.inputs.layouts import read_label_names, read_layout
from ldm_runtime.inputs.segmentation import SegmentationMap
from ldm_runtime.requests.request import GenerationRequest
from models.shapes import gallery
from models.shapes.catalog.models import MODELS
from models.shapes.evaluation import tasks

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/tasks.md").read_text()
COMMANDS = re.findall(r"^(?:\$ )?ldm (generate .*)$", PAGE, re.MULTILINE)
_, *BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)  # the first one imports
FIELDS = {field.name for field in fields(GenerationRequest)}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    gallery.write_inputs(folder)
    return folder


def test_the_inputs_are_what_requests_take(inputs):
    names = read_label_names(inputs / "labels.txt")
    layout = read_layout(inputs / "boxes.json", names)
    image, mask = InputImage.read(inputs / "image.png"), InputImage.read(inputs / "mask.png")

    assert len(names) == 24
    assert 1 <= len(layout) <= 3
    assert SegmentationMap.read(inputs / "map.png").size == image.size == mask.size == (64, 64)
    assert InputImage.read(inputs / "small.png").size == (16, 16)
    assert set(np.unique(mask.pixels)) == {0, 255}


@pytest.mark.parametrize("model", MODELS.values(), ids=list(MODELS))
def test_what_a_model_was_given_differs_from_prompt_to_prompt(model):
    if model.task == "unconditional":
        assert model.task not in gallery.INPUT_IMAGES
        return
    prompts = tasks.held_out_prompts(model, 8, 7)

    shown = [np.asarray(gallery.INPUT_IMAGES[model.task](prompt)) for prompt in prompts]

    assert all(image.shape[2] == 3 for image in shown)
    assert len({image.tobytes() for image in shown}) > 4


def test_what_is_missing_of_an_image_is_shown_in_a_colour_that_no_scene_has():
    (prompt,) = tasks.held_out_prompts(MODELS["inpainting"], 1, 7)

    shown = np.asarray(gallery.INPUT_IMAGES["inpainting"](prompt))

    np.testing.assert_array_equal((shown == (255, 0, 255)).all(axis=2), prompt.mask)


def test_a_sheet_lays_rows_out_under_each_other():
    red, blue = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (16, 16), "blue")

    sheet = gallery.sheet([[red, red], [blue, blue]])

    assert sheet.getpixel((10, 10)) == (255, 0, 0)
    assert sheet.getpixel((10, sheet.height - 10)) == (0, 0, 255)
    assert sheet.width == sheet.height


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_line_knows_every_command_of_the_page(command):
    args = build_parser().parse_args(shlex.split(command, comments=True))

    assert args.bundle.parts[0] in ("engines", "out")


@pytest.mark.parametrize("block", BLOCKS)
def test_the_lines_of_python_are_few_and_name_fields_of_a_request(block):
    calls = [node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)]
    keywords = {
        keyword.arg
        for call in calls
        if isinstance(call.func, ast.Name) and call.func.id == "generator"
        for keyword in call.keywords
    }

    assert len(block.splitlines()) <= 6
    assert keywords <= FIELDS


def test_the_page_has_a_command_and_python_for_every_task():
    sections = re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]
    run = [section for section in sections if "```python" in section]

    assert len(run) == len(BLOCKS) == 9
    assert all("ldm generate" in section for section in sections)
    assert all("No trained example" in section for section in sections if section not in run)


@pytest.mark.parametrize("module", ["gallery", "evaluation.tasks", "evaluate"])
def test_what_generates_does_not_load_torch(module):
    paths = [ROOT, ROOT / "benchmarks"]
    code = f"import models.shapes.{module}, sys; sys.exit('torch' in sys.modules)"

    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
