"""Every `ldm` line and every block of Python of the README runs as it stands, in a shell.

What the README takes for granted is put there first: the checkpoint, the bundle made of it, and the
images that a reader would bring.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm_runtime.pipeline.image_files import read_metadata
from ldm_runtime.testing import write_tiny_bundle
from models.shapes import gallery

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "models/shapes"
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
COMMANDS = [
    lines for _, block in BLOCKS if (lines := re.findall(r"^ldm(?:-export)? .*", block, re.M))
]
PYTHON = [block for language, block in BLOCKS if language == "python"]
#: The lines that are about other bundles than that of the shapes model, by their comment: tiny ones
#: take the same requests.
TASKS = {
    "layout to image": "layout-to-image",
    "semantic synthesis": "semantic-synthesis",
    "super-resolution": "super-resolution",
    "inpainting": "inpainting",
}

pytestmark = pytest.mark.slow


@pytest.fixture
def workspace(tmp_path, shapes_bundle):
    """A folder with all that the README's lines name; `engines/` is the shapes model's bundle."""
    for suffix in ("ckpt", "yaml"):
        (tmp_path / f"model.{suffix}").symlink_to(FOLDER / f"shapes.{suffix}")
    shutil.copytree(shapes_bundle, tmp_path / "engines")
    gallery.write_inputs(tmp_path)
    classes = np.arange(64 * 64).reshape(64, 64) // 16 % 6  # which the tiny bundle knows
    Image.fromarray(classes.astype(np.uint8)).save(tmp_path / "map.png")
    shutil.copy(tmp_path / "image.png", tmp_path / "circle.png")
    requests = [{"prompt": "a red circle", "seed": seed} for seed in (1, 2)]
    (tmp_path / "requests.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in requests))
    return tmp_path


def run(command, folder):
    """Run `command` in a shell in `folder`; fail with the end of what it said if it failed."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        command,
        shell=isinstance(command, str),
        cwd=folder,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}"


@pytest.mark.parametrize("lines", COMMANDS, ids=lambda lines: lines[0])
def test_the_commands_run_in_their_order(lines, workspace):
    for line in lines:
        task = TASKS.get(line.rpartition("# ")[2])
        if task is not None:
            shutil.rmtree(workspace / "engines")
            write_tiny_bundle(workspace / "engines", task)

        run(line, workspace)


@pytest.mark.parametrize("block", PYTHON)
def test_the_lines_of_python_run(block, workspace):
    (workspace / "circle.png").unlink()

    run([sys.executable, "-c", block], workspace)

    assert read_metadata(workspace / "circle.png")["request"]["seed"] == 7


def test_every_task_is_a_line_and_nothing_is_overlooked():
    comments = [line.rpartition("# ")[2] for lines in COMMANDS for line in lines]

    assert set(TASKS) <= set(comments)
    assert len(PYTHON) == 1
    assert sum(len(lines) for lines in COMMANDS) == len(
        re.findall(r"^ldm(?:-export)? ", README, re.M)
    )
