import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import demo
import detector
import evaluate
import scenes
from ldm_runtime import Generator
from ldm_runtime.testing import write_tiny_bundle

RED = scenes.Thing(kind="circle", color="red", size="large", x=16.0, y=20.0, radius=12.0)
BLUE = scenes.Thing(kind="square", color="blue", size="small", x=48.0, y=20.0, radius=6.5)
GREEN = scenes.Thing(kind="cross", color="green", size="small", x=16.0, y=52.0, radius=6.5)
SCENE = scenes.Scene(
    things=(RED, BLUE, GREEN), relations=("left of", "above"), background="white", gradient=False
)


def reading(*things, background="white", gradient=False):
    return detector.Reading(
        things=things, overlaps=(1.0,) * len(things), background=background, gradient=gradient
    )


def recolored(thing, color):
    return thing._replace(color=color)


def moved(thing, x, y):
    return thing._replace(x=x, y=y)


def run_beside_the_demo(code, *args):
    """Return what code prints in a process of its own, where no test has imported torch."""
    return subprocess.run(
        [sys.executable, "-c", code, *args],
        capture_output=True,
        text=True,
        check=True,
        cwd=demo.HERE,
        env={"PYTHONPATH": str(demo.ROOT)},
    ).stdout


def test_a_perfect_picture_gets_everything():
    tally = evaluate.judge(SCENE, reading(RED, BLUE, GREEN))

    shares = tally.shares()

    assert set(shares.values()) == {1.0}
    assert tally.extra == 0


def test_swapped_colours_lose_both_objects_and_their_relations():
    picture = reading(recolored(RED, "blue"), recolored(BLUE, "red"), GREEN)

    tally = evaluate.judge(SCENE, picture)

    assert (tally.objects_right, tally.sizes_right, tally.extra) == (1, 1, 2)
    assert (tally.relations, tally.relations_judged, tally.relations_right) == (2, 0, 0)
    assert tally.pictures_right == 0


def test_swapped_places_lose_the_relation_but_no_object():
    picture = reading(moved(RED, 48, 20), moved(BLUE, 16, 20), moved(GREEN, 48, 52))

    tally = evaluate.judge(SCENE, picture)

    assert tally.objects_right == 3
    assert (tally.relations_judged, tally.relations_right) == (2, 1)
    assert tally.pictures_right == 0


def test_a_missing_object_makes_its_relation_wrong_in_the_headline():
    tally = evaluate.judge(SCENE, reading(RED, GREEN))

    shares = tally.shares()

    assert shares["objects"] == pytest.approx(2 / 3)
    assert shares["relations"] == 0.5
    assert shares["relations_of_found_objects"] == 1.0


def test_a_missing_first_object_loses_every_relation():
    tally = evaluate.judge(SCENE, reading(BLUE, GREEN))

    assert (tally.relations, tally.relations_judged, tally.relations_right) == (2, 0, 0)


def test_a_wrong_size_costs_the_size_only():
    picture = reading(RED._replace(size="small", radius=6.5), BLUE, GREEN)

    tally = evaluate.judge(SCENE, picture)

    assert (tally.objects_right, tally.sizes_right, tally.relations_right) == (3, 2, 2)
    assert tally.pictures_right == 0


@pytest.mark.parametrize(
    ("change", "backgrounds", "gradients"),
    [({"background": "gray"}, 0, 1), ({"gradient": True}, 1, 0)],
)
def test_a_wrong_background_costs_the_background_only(change, backgrounds, gradients):
    tally = evaluate.judge(SCENE, replace(reading(RED, BLUE, GREEN), **change))

    assert (tally.backgrounds_right, tally.gradients_right) == (backgrounds, gradients)
    assert tally.objects_right == 3
    assert tally.pictures_right == 0


def test_something_extra_costs_the_whole_picture_and_no_object():
    tally = evaluate.judge(SCENE, reading(RED, BLUE, GREEN, recolored(GREEN, "yellow")))

    assert (tally.objects_right, tally.extra, tally.pictures_right) == (3, 1, 0)


def test_an_empty_picture_gets_no_object():
    tally = evaluate.judge(SCENE, reading())

    assert (tally.objects, tally.objects_right, tally.relations_right) == (3, 0, 0)
    assert tally.shares()["relations_of_found_objects"] is None


def test_a_detection_is_used_once():
    assert evaluate.match([RED, RED], [RED]) == [RED, None]


def test_of_two_detections_that_look_alike_the_one_of_the_right_size_is_taken():
    large = BLUE._replace(size="large", radius=12.0)

    assert evaluate.match([BLUE], [large, BLUE]) == [BLUE]
    assert evaluate.match([BLUE], [large]) == [large]


@pytest.mark.parametrize(
    ("relation", "x", "y"),
    [("left of", 1, 0), ("right of", -1, 0), ("above", 0, 1), ("below", 0, -1)],
)
def test_a_relation_holds_in_its_own_direction_only(relation, x, y):
    first = moved(RED, 32, 32)

    assert evaluate.relation_holds(relation, first, moved(BLUE, 32 + 20 * x, 32 + 20 * y))
    assert not evaluate.relation_holds(relation, first, moved(BLUE, 32 - 20 * x, 32 - 20 * y))
    assert not evaluate.relation_holds(relation, first, moved(BLUE, 32 + 20 * y, 32 + 20 * x))
    assert not evaluate.relation_holds(relation, first, first)


def test_a_diagonal_is_judged_by_its_longer_side():
    other = moved(BLUE, RED.x + 20, RED.y + 15)

    assert evaluate.relation_holds("left of", RED, other)
    assert not evaluate.relation_holds("above", RED, other)


def test_tallies_add_up_field_by_field():
    good = evaluate.judge(SCENE, reading(RED, BLUE, GREEN))
    bad = evaluate.judge(SCENE, reading(BLUE))

    total = good + bad

    assert (total.pictures, total.objects, total.objects_right) == (2, 6, 4)
    assert total.shares()["objects"] == pytest.approx(4 / 6)


def test_clean_renders_of_held_out_captions_score_everything():
    total = evaluate.Tally()
    for scene in evaluate.held_out_scenes(15, seed=5):
        picture = evaluate.photograph(scene, np.random.default_rng(0), 0.0, 0)
        total += evaluate.judge(scene, detector.read_picture(picture))

    assert total.pictures_right == 15
    assert total.relations_right == total.relations > 0


def test_the_evaluated_captions_are_held_out_and_fixed_by_the_seed():
    first, again = evaluate.held_out_scenes(6, seed=5), evaluate.held_out_scenes(6, seed=5)

    assert first == again
    assert all(scenes.is_held_out(scenes.caption(each)) for each in first)


def test_a_bundle_is_judged_on_pictures_it_drew_for_the_captions(tmp_path):
    write_tiny_bundle(tmp_path)
    wanted = evaluate.held_out_scenes(2, seed=5)

    with Generator(tmp_path) as generator:
        tally, seconds = evaluate.evaluate_bundle(generator, wanted, {"num_inference_steps": 2})

    assert (tally.pictures, tally.objects) == (2, sum(len(each.things) for each in wanted))
    assert tally.pictures_right == 0  # the tiny bundle has learnt nothing
    assert seconds > 0


def test_every_caption_is_drawn_from_noise_of_its_own(tmp_path):
    write_tiny_bundle(tmp_path)
    (scene,) = evaluate.held_out_scenes(1, seed=5)

    with Generator(tmp_path) as generator:
        settings = {"num_inference_steps": 1}
        (first, second), seconds = evaluate.draw_all(generator, [scene, scene], settings)
        alone = evaluate.draw(generator, scene, evaluate.SEED + 1, settings)

    assert (first != second).any()
    np.testing.assert_array_equal(second, alone)
    assert len(seconds) == 2


def test_the_command_prints_a_table_and_one_json_line(tmp_path, capsys):
    write_tiny_bundle(tmp_path)

    status = evaluate.main(["--bundle", str(tmp_path), "--captions", "2", "--steps", "2"])

    lines = capsys.readouterr().out.splitlines()
    report = json.loads(lines[-1])
    assert status == 0
    assert report["counts"]["pictures"] == 2
    assert report["settings"]["num_inference_steps"] == 2
    assert any(line.startswith("relations") for line in lines[:-1])


def test_the_command_prints_the_json_line_alone_if_asked(tmp_path, capsys):
    write_tiny_bundle(tmp_path)

    evaluate.main(["--bundle", str(tmp_path), "--captions", "1", "--steps", "1", "--json"])

    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["counts"]["pictures"] == 1


def test_a_missing_bundle_is_an_error_that_names_it(tmp_path, capsys):
    status = evaluate.main(["--bundle", str(tmp_path / "nowhere")])

    assert status == 1
    assert "nowhere" in capsys.readouterr().err


def test_the_verdict_names_every_fault():
    picture = reading(
        moved(RED._replace(size="small"), 60, 20), BLUE, recolored(GREEN, "cyan"), background="gray"
    )

    assert demo.verdict(SCENE, reading(RED, BLUE, GREEN)) == "right"
    assert demo.verdict(SCENE, picture) == (
        "red circle is small, no green cross, not left of, background is gray, "
        "1 more than asked for"
    )


def test_the_contact_sheet_shows_every_picture_enlarged_in_reading_order():
    pictures = [Image.new("RGB", (64, 64), (40 * index, 0, 0)) for index in range(6)]

    sheet = demo.contact_sheet(pictures, ["a large red circle on a white background"] * 6)

    middles = [
        sheet.getpixel((12 + 96 + column * (192 + 12), 12 + 96 + row * (192 + 4 * 13 + 12)))
        for row, column in [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1)]
    ]
    assert middles == [(40 * index, 0, 0) for index in range(6)]


def test_the_demo_draws_sixteen_pictures_and_says_what_it_sees_in_each(tmp_path):
    write_tiny_bundle(tmp_path / "engines")
    code = (
        "import demo, pathlib, sys; folder = pathlib.Path(sys.argv[1])\n"
        "print(demo.draw_sheet(folder / 'engines', folder / 'demo.png').pictures)"
    )

    lines = run_beside_the_demo(code, str(tmp_path)).splitlines()

    assert len(lines) == 17
    assert lines[0].startswith(" 1  a ")
    assert lines[-1] == "16"
    with Image.open(tmp_path / "demo.png") as sheet:
        assert sheet.width > 4 * 192


@pytest.mark.slow
def test_the_demo_says_that_the_checkpoint_is_missing(tmp_path, capfd):
    status = demo.main(["--ckpt", str(tmp_path / "none.ckpt"), "--out", str(tmp_path / "out")])

    assert status == 1
    assert "none.ckpt" in capfd.readouterr().err


def test_the_demo_and_the_evaluation_load_no_torch():
    code = "import sys, demo, evaluate; print(*sys.modules)"

    modules = run_beside_the_demo(code).split()

    assert {"torch", "onnx", "transformers", "ldm_export"}.isdisjoint(modules)
