"""Every command and every block of Python in README and docs runs as it stands, in order.

The README runs next to the bundle that `make demo` makes. The other pages run next to tiny bundles
of the tasks, which take the same requests, and the files that a reader would bring.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm_runtime.bundle.manifest import MANIFEST_NAME, encode_manifest
from ldm_runtime.pipeline.image_files import read_metadata
from ldm_runtime.specs.networks import UNetSpec
from ldm_runtime.testing import tiny_spec, write_tiny_bundle
from models.shapes import gallery
from models.shapes.catalog.models import MODELS
from models.shapes.data.labels import label_names

ROOT = Path(__file__).parents[2]
#: Its blocks talk to a server: tests/serve/test_serving_page.py.
_SERVED = {"serving.md"}
PAGES = sorted(path.name for path in (ROOT / "docs").glob("*.md") if path.name not in _SERVED)
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_COMMAND = re.compile(r"(\w+=|(echo .*\| )?(ldm|ldm-export) (?!completion))")
#: Pages whose commands export a checkpoint; `--estimate` checks what they say without the work.
_EXPORTING = {"tensorrt.md"}
#: Lines of a shell that set up what the tests run in.
_SETUP = ("make ", "source ", "pip ")

pytestmark = pytest.mark.slow


def blocks(path):
    return _FENCE.findall(path.read_text(encoding="utf-8"))


def commands(block):
    """Return the lines of a shell's block that are run here."""
    return [line for line in block.splitlines() if _COMMAND.match(line)]


def run(command, folder):
    """Run `command` in a shell in `folder`, without a TensorRT, as after `pip install '.[cpu]'`."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        command,
        shell=isinstance(command, str),
        stdin=subprocess.DEVNULL,
        cwd=folder,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


def run_page(path, folder):
    """Run the blocks of a page in order; its Python goes on from block to block, a shell does not.

    What a line after `$ ` is to print stands below it.
    """
    python, estimates = "", path.name in _EXPORTING
    for language, block in blocks(path):
        if language == "python":
            python += block
            done = run([sys.executable, "-c", python], folder)
        elif block.startswith("$ "):
            command, expected = block.splitlines()
            done = run(command.removeprefix("$ "), folder)
            assert expected in (done.stdout + done.stderr).splitlines()
            continue
        elif language or not commands(block):
            continue
        else:
            lines = "\n".join(commands(block))
            if estimates:
                lines = lines.replace("ldm-export ", "ldm-export --estimate ")
            done = run(["bash", "-euc", lines], folder)
        assert done.returncode == 0, f"{block}\n{done.stderr[-2000:]}"


@pytest.fixture
def clone(tmp_path, shapes_bundle):
    """A clone in which `make demo` has run."""
    (tmp_path / "models").symlink_to(ROOT / "models")
    for suffix in ("ckpt", "yaml"):
        (tmp_path / f"model.{suffix}").symlink_to(ROOT / f"models/shapes/shapes.{suffix}")
    shutil.copytree(shapes_bundle, tmp_path / "engines")
    return tmp_path


def test_the_readme_runs_from_the_first_line_to_the_last(clone):
    run_page(ROOT / "README.md", clone)

    assert read_metadata(clone / "circle.png")["request"]["seed"] == 7
    with Image.open(clone / "again.png") as image:
        assert image.size == (64, 64)


def test_every_line_of_the_readme_is_run_or_sets_up():
    lines = [
        line
        for language, block in blocks(ROOT / "README.md")
        if language != "python"
        for line in block.splitlines()
    ]

    assert len([line for line in lines if _COMMAND.match(line)]) >= 8
    assert [line for line in lines if not (_COMMAND.match(line) or line.startswith(_SETUP))] == []


#: Of the four classes of the tiny model.
_CLASS_NAMES = ("red circle", "green circle", "blue circle", "red cross")


def write_named_bundle(folder, task):
    """Write the tiny bundle of a task; its labels have names of those of the trained model."""
    manifest = write_tiny_bundle(folder, task)
    if task in ("class-to-image", "layout-to-image"):
        names = tuple(label_names()) if task == "layout-to-image" else _CLASS_NAMES
        named = replace(manifest, spec=replace(manifest.spec, label_names=names))
        (folder / MANIFEST_NAME).write_bytes(encode_manifest(named))


@pytest.fixture
def workspace(tmp_path):
    """A folder with all that the pages name: bundles and inputs."""
    write_tiny_bundle(tmp_path / "engines")
    write_tiny_bundle(tmp_path / "out/retrieval", "retrieval")
    write_tiny_bundle(tmp_path / "out/autoencoder", "autoencoder")
    for name, model in MODELS.items():
        write_named_bundle(tmp_path / "out/gallery" / name, model.task)
    for folder in (tmp_path, tmp_path / "out/gallery/inputs"):
        gallery.write_inputs(folder)
        classes = np.arange(64 * 64).reshape(64, 64) // 16 % 6  # which the tiny bundle knows
        Image.fromarray(classes.astype(np.uint8)).save(folder / "map.png")
    shutil.copy(tmp_path / "image.png", tmp_path / "circle.png")
    width = tiny_spec("retrieval").network(UNetSpec).context_dim
    np.save(tmp_path / "neighbours.npy", np.ones((2, width), np.float32))
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    requests = [{"prompt": "a red circle", "seed": seed} for seed in (1, 2)]
    (tmp_path / "requests.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in requests))
    return tmp_path


@pytest.mark.parametrize("page", PAGES)
def test_a_page_runs_from_the_first_line_to_the_last(page, request):
    folder = request.getfixturevalue("clone" if page in _EXPORTING else "workspace")

    run_page(ROOT / "docs" / page, folder)
