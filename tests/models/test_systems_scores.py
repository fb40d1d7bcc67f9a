"""The judges of what systems draw: right pictures pass, and each kind of fault costs its mark."""

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest

from models.shapes.data import scenes
from models.shapes.evaluation import scores
from models.shapes.evaluation.scores import JUDGES, Question, drawing_of, judge_all


def thing(kind="circle", color="red", size="large", x=32.0, y=32.0, radius=12.0):
    return scenes.Thing(kind=kind, color=color, size=size, x=x, y=y, radius=radius)


def scene(*things, relations=(), background="white", gradient=False):
    return scenes.Scene(
        things=things, relations=relations, background=background, gradient=gradient
    )


def some_questions(count, *, most=3, hole=None):
    source = scenes.random_scenes(np.random.default_rng(8), held_out=True)
    few = (each for each in source if len(each.things) <= most)
    return [Question(scene=each, hole=hole) for each in islice(few, count)]


def square_hole():
    hole = np.zeros((64, 64), np.bool_)
    hole[8:28, 8:28] = True
    return hole


@pytest.mark.parametrize("task", [task for task in JUDGES if task != "super-resolution"])
def test_true_pictures_reach_every_goal(task):
    hole = square_hole() if task == "inpainting" else None
    most = 1 if task in ("unconditional", "class-to-image") else 3
    questions = some_questions(6, most=most, hole=hole)

    reached = scores.scores(judge_all(task, questions, [each.truth for each in questions]))

    for name, goal in scores.GOALS[task].items():
        assert reached[name] >= goal, name


def test_true_pictures_are_sharper_than_bicubic_ones():
    questions = some_questions(4)
    marks = judge_all("super-resolution", questions, [each.truth for each in questions])

    assert scores.scores(marks)["gain"] > 20


def test_bicubic_pictures_gain_nothing_over_bicubic_ones():
    questions = some_questions(4)
    plain = [scores.enlarge(scores.shrink(each.truth)) for each in questions]

    found = scores.scores(judge_all("super-resolution", questions, plain))

    assert found["gain"] == pytest.approx(0)
    assert found["mean_gain"] == pytest.approx(0)
    assert 18 < found["psnr"] < 32


def test_marks_add_up_over_pictures():
    right, wrong = scene(thing()), scene(thing(color="blue"))
    questions = [Question(scene=right), Question(scene=right)]

    marks = judge_all("class-to-image", questions, [drawing_of(right), drawing_of(wrong)])

    assert marks["class"] == (1, 2)
    assert scores.scores(marks)["class"] == 0.5


def test_a_second_thing_is_no_picture_of_one_class():
    asked = Question(scene=scene(thing(x=16.0)))
    both = scene(thing(x=16.0), thing("square", "blue", x=48.0), relations=("left of",))

    marks = scores.judge_class(asked, drawing_of(both))

    assert marks["class"] == (False, 1)
    assert marks["found"] == (True, 1)


def test_a_thing_beside_its_box_has_its_label_and_no_overlap():
    asked = Question(scene=scene(thing(x=15.0, y=15.0)))

    marks = scores.judge_layout(asked, drawing_of(scene(thing(x=46.0, y=46.0))))

    assert marks == {"overlap": (0, 1), "labels": (1, 1), "labels_in_place": (0, 1)}


def test_a_thing_half_way_out_of_its_box_overlaps_by_a_third():
    asked = Question(scene=scene(thing("square", x=24.0)))

    marks = scores.judge_layout(asked, drawing_of(scene(thing("square", x=24 + 0.9 * 12))))

    assert marks["overlap"][0] == pytest.approx(1 / 3, abs=0.03)


def test_the_wrong_colour_costs_the_pixels_of_a_map_that_it_covers():
    asked = Question(scene=scene(thing()))

    marks = scores.judge_map(asked, drawing_of(scene(thing(color="green"))))

    area = scenes.coverage(thing()).sum()
    assert marks["pixels"][1] == 64 * 64
    assert marks["pixels"][0] == pytest.approx(64 * 64 - area, rel=0.01)
    assert marks["thing_pixels"][0] == 0


def test_the_wrong_background_costs_nearly_all_of_a_map():
    asked = Question(scene=scene(thing()))

    marks = scores.judge_map(asked, drawing_of(scene(thing(), background="gray")))

    assert marks["pixels"][0] < 0.2 * marks["pixels"][1]
    assert marks["thing_pixels"][0] == marks["thing_pixels"][1]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda image: np.full_like(image, 244),  # nothing there
        lambda image: np.clip(image.astype(int) - 30, 0, 255).astype(np.uint8),
        lambda image: np.concatenate([image[:, 32:], image[:, :32]], axis=1),  # two halves
    ],
)
def test_pictures_that_are_no_scenes_are_not_valid(spoil):
    asked = Question(scene=scene(thing(x=28.0)))

    marks = scores.judge_scene(asked, spoil(asked.truth))

    assert marks["valid"] == (False, 1)


def test_a_coloured_smear_is_stray():
    asked = Question(scene=scene(thing(x=18.0, y=18.0)))
    image = asked.truth.copy()
    image[50:54, 4:60] = scenes.COLORS["green"]

    assert scores.judge_scene(asked, asked.truth)["valid"] == (True, 1)
    assert scores.judge_scene(asked, image)["valid"] == (False, 1)


def test_more_things_than_a_system_learns_from_are_not_valid():
    two = scene(thing(x=16.0), thing("square", "blue", x=48.0), relations=("left of",))

    one_allowed = scores.judge_scene(Question(scene=scene(thing())), drawing_of(two))
    two_allowed = scores.judge_scene(Question(scene=two), drawing_of(two))

    assert (one_allowed["valid"], two_allowed["valid"]) == ((False, 1), (True, 1))


def test_one_changed_pixel_beside_the_hole_is_not_kept():
    (question,) = some_questions(1, hole=square_hole())
    changed = question.truth.copy()
    changed[40, 40, 0] ^= 1

    assert scores.judge_filled(question, question.truth)["kept"] == (True, 1)
    assert scores.judge_filled(question, changed)["kept"] == (False, 1)


def test_errors_in_a_hole_are_those_of_its_pixels_alone():
    (question,) = some_questions(1, hole=square_hole())
    image = question.truth.copy()
    image[question.hole] = np.clip(image[question.hole].astype(int) ^ 8, 0, 255)

    marks = scores.judge_filled(question, image)

    assert marks["error"] == (64 * 400 * 3, 400 * 3)


def test_a_thing_that_is_mostly_hidden_need_not_come_back():
    hole = np.zeros((64, 64), np.bool_)
    hole[:, 24:] = True
    asked = Question(scene=scene(thing(x=32.0)), hole=hole)
    nothing = np.full((64, 64, 3), 244, np.uint8)
    showing = replace(asked, hole=~hole)

    assert scores.judge_filled(asked, nothing)["readable"] == (True, 1)
    assert scores.judge_filled(showing, nothing)["readable"] == (False, 1)


def test_shrinking_takes_the_mean_of_sixteen_pixels():
    image = np.zeros((8, 8, 3), np.uint8)
    image[:4, :4] = np.arange(16).reshape(4, 4, 1)

    small = scores.shrink(image)

    assert small.shape == (2, 2, 3)
    assert small[0, 0, 0] == round(7.5)
    assert small[1].max() == 0


@pytest.mark.parametrize(("error", "expected"), [(255.0**2, 0.0), (1.0, 48.1308), (0.0, 58.9226)])
def test_decibels_are_those_of_eight_bits_and_never_infinite(error, expected):
    assert scores.decibels(error) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("left", "is_known"), [(2, False), (14, True)])
def test_of_a_thing_that_a_hole_hides_wholly_nothing_can_be_known(left, is_known):
    hole = np.zeros((64, 64), np.bool_)
    hole[:, left:40] = True
    asked = Question(scene=scene(thing(x=20.0, radius=12.0)), hole=hole)

    marks = JUDGES["inpainting"](asked, asked.truth)

    assert (marks["knowable_error"][0] == 0) == is_known
    found = scores.scores(marks)
    assert (found["knowable_gain"] == pytest.approx(found["gain"])) == is_known


def test_one_bad_picture_of_two_decides_the_gain_and_half_of_the_mean_gain():
    good, bad = some_questions(2, hole=square_hole())
    missing = bad.truth.copy()
    missing[bad.hole] = 128

    of_good, of_bad = (
        scores.scores(JUDGES["inpainting"](asked, image))["gain"]
        for asked, image in ((good, good.truth), (bad, missing))
    )
    both = scores.scores(judge_all("inpainting", (good, bad), (good.truth, missing)))

    assert of_good > 15
    assert of_bad < 3
    assert both["mean_gain"] == pytest.approx((of_good + of_bad) / 2)
    assert both["gain"] < both["mean_gain"] - 5
