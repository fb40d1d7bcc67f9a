import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from ldm_runtime import Generator
from ldm_runtime.testing import write_tiny_bundle
from models.shapes import demo, evaluate
from models.shapes.data import scenes
from models.shapes.evaluation import held_out
from tests.models.known_scene import BLUE, GREEN, RED, SCENE, moved, reading, recolored


def run_beside_the_demo(code, *args):
    """Return what code prints in its own process, where no test has imported torch."""
    return subprocess.run(
        [sys.executable, "-c", code, *args],
        capture_output=True,
        text=True,
        check=True,
        cwd=demo.HERE,
        env={"PYTHONPATH": str(demo.ROOT)},
    ).stdout


def test_the_evaluated_captions_are_held_out_and_fixed_by_the_seed():
    first, again = held_out.held_out_scenes(6, seed=5), held_out.held_out_scenes(6, seed=5)

    assert first == again
    assert all(scenes.is_held_out(scenes.caption(each)) for each in first)


def test_a_bundle_is_scored_on_images_it_generated_for_the_captions(tmp_path):
    write_tiny_bundle(tmp_path)
    wanted = held_out.held_out_scenes(2, seed=5)

    with Generator(tmp_path) as generator:
        tally, seconds = held_out.evaluate_bundle(generator, wanted, {"num_inference_steps": 2})

    assert (tally.images, tally.objects) == (2, sum(len(each.things) for each in wanted))
    assert tally.images_right == 0  # the tiny bundle has learnt nothing
    assert seconds > 0


def test_every_caption_is_generated_from_its_own_noise(tmp_path):
    write_tiny_bundle(tmp_path)
    (scene,) = held_out.held_out_scenes(1, seed=5)

    with Generator(tmp_path) as generator:
        settings = {"num_inference_steps": 1}
        (first, second), seconds = held_out.generate_all(generator, [scene, scene], settings)
        alone = held_out.generate(generator, scenes.caption(scene), held_out.SEED + 1, settings)

    assert (first != second).any()
    np.testing.assert_array_equal(second, alone)
    assert len(seconds) == 2


def test_the_command_prints_a_table_and_one_json_line(tmp_path, capsys):
    write_tiny_bundle(tmp_path)

    status = evaluate.main(["--bundle", str(tmp_path), "--captions", "2", "--steps", "2"])

    lines = capsys.readouterr().out.splitlines()
    report = json.loads(lines[-1])
    assert status == 0
    assert report["counts"]["images"] == 2
    assert report["settings"]["num_inference_steps"] == 2
    assert any(line.startswith("relations") for line in lines[:-1])


def test_the_command_prints_the_json_line_alone_if_asked(tmp_path, capsys):
    write_tiny_bundle(tmp_path)

    results = tmp_path / "rows.jsonl"
    line = ["--bundle", str(tmp_path), "--captions", "1", "--steps", "1", "--json"]
    evaluate.main([*line, "--results", str(results)])

    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["counts"]["images"] == 1
    assert json.loads(results.read_text()) == json.loads(line)


def test_a_missing_bundle_is_an_error_that_names_it(tmp_path, capsys):
    status = evaluate.main(["--bundle", str(tmp_path / "nowhere")])

    assert status == 1
    assert "nowhere" in capsys.readouterr().err


def test_the_verdict_names_every_fault():
    image = reading(
        moved(RED._replace(size="small"), 60, 20), BLUE, recolored(GREEN, "cyan"), background="gray"
    )

    assert demo.verdict(SCENE, reading(RED, BLUE, GREEN)) == "right"
    assert demo.verdict(SCENE, image) == (
        "red circle is small, no green cross, not left of, background is gray, "
        "1 more than asked for"
    )


def test_the_contact_sheet_shows_every_image_enlarged_in_reading_order():
    images = [Image.new("RGB", (64, 64), (40 * index, 0, 0)) for index in range(6)]

    sheet = demo.contact_sheet(images, ["a large red circle on a white background"] * 6)

    middles = [
        sheet.getpixel((12 + 96 + column * (192 + 12), 12 + 96 + row * (192 + 4 * 13 + 12)))
        for row, column in [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1)]
    ]
    assert middles == [(40 * index, 0, 0) for index in range(6)]


def test_the_demo_generates_sixteen_images_and_says_what_it_sees_in_each(tmp_path):
    write_tiny_bundle(tmp_path / "engines")
    code = (
        "import demo, pathlib, sys; folder = pathlib.Path(sys.argv[1])\n"
        "print(demo.generate_sheet(folder / 'engines', folder / 'demo.png').images)"
    )

    lines = run_beside_the_demo(code, str(tmp_path)).splitlines()

    assert len(lines) == 17
    assert lines[0].startswith(" 1  a ")
    assert lines[-1] == "16"
    with Image.open(tmp_path / "demo.png") as sheet:
        assert sheet.width > 4 * 192


@pytest.mark.slow
def test_the_demo_says_that_the_checkpoint_is_missing(tmp_path, capfd):
    folders = ["--bundle", str(tmp_path / "engines"), "--out", str(tmp_path / "out")]

    status = demo.main(["--ckpt", str(tmp_path / "none.ckpt"), *folders])

    assert status == 1
    assert "none.ckpt" in capfd.readouterr().err


def test_the_demo_and_the_evaluation_load_no_torch():
    code = "import sys, demo, evaluate; print(*sys.modules)"

    modules = run_beside_the_demo(code).split()

    assert {"torch", "onnx", "transformers", "ldm_export"}.isdisjoint(modules)
