"""The scorers of generated images: right ones pass, and each kind of fault costs its metric."""

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest

from models.shapes.data import scenes
from models.shapes.evaluation import scores
from models.shapes.evaluation.scores import (
    SCORERS,
    WHOLE,
    EvaluationPrompt,
    image_of,
    score_all,
)


def thing(kind="circle", color="red", size="large", x=32.0, y=32.0, radius=12.0):
    return scenes.Thing(kind=kind, color=color, size=size, x=x, y=y, radius=radius)


def scene(*things, relations=(), background="white", gradient=False):
    return scenes.Scene(
        things=things, relations=relations, background=background, gradient=gradient
    )


def some_prompts(count, *, most=3, mask=None):
    source = scenes.random_scenes(np.random.default_rng(8), held_out=True)
    few = (each for each in source if len(each.things) <= most)
    return [EvaluationPrompt(scene=each, mask=mask) for each in islice(few, count)]


def square_mask():
    mask = np.zeros((64, 64), np.bool_)
    mask[8:28, 8:28] = True
    return mask


def smeared(image):
    image = image.copy()
    image[54:57, 4:60] = scenes.COLORS["purple"]
    return image


@pytest.mark.parametrize("task", SCORERS)
def test_whole_images_are_the_true_ones_and_none_with_a_smear(task):
    prompts = some_prompts(4, most=1, mask=square_mask() if task == "inpainting" else None)
    truths = [each.truth for each in prompts]

    right = score_all(task, prompts, truths)
    wrong = score_all(task, prompts, [smeared(each) for each in truths])

    assert (right[WHOLE], wrong[WHOLE]) == ((4, 4), (0, 4))


@pytest.mark.parametrize("task", [each for each in SCORERS if each != "unconditional"])
def test_an_image_without_the_thing_is_not_whole(task):
    corner = np.zeros((64, 64), np.bool_)
    corner[:2, :2] = True
    asked = EvaluationPrompt(scene=scene(thing()), mask=corner if task == "inpainting" else None)
    nothing = np.full((64, 64, 3), 244, np.uint8)

    assert SCORERS[task](asked, nothing)[WHOLE] == (False, 1)


def test_what_a_short_caption_does_not_tell_may_be_otherwise():
    first, second = thing(x=16.0), thing("square", "blue", x=48.0)
    asked = scene(first, second, relations=("left of",))
    other = scene(
        first._replace(x=48.0), second._replace(x=16.0), relations=("right of",), background="black"
    )

    full, short = (
        scores.score_words(EvaluationPrompt(scene=asked, wording=wording), image_of(other))
        for wording in (scenes.FULL, scenes.SHORT)
    )

    assert (full[WHOLE], short[WHOLE]) == ((0, 1), (1, 1))


@pytest.mark.parametrize("task", [task for task in SCORERS if task != "super-resolution"])
def test_true_images_reach_every_goal(task):
    mask = square_mask() if task == "inpainting" else None
    most = 1 if task in ("unconditional", "class-to-image") else 3
    prompts = some_prompts(6, most=most, mask=mask)

    reached = scores.scores(score_all(task, prompts, [each.truth for each in prompts]))

    for name, goal in scores.GOALS[task].items():
        assert reached[name] >= goal, name


def test_true_images_are_sharper_than_bicubic_ones():
    prompts = some_prompts(4)
    metrics = score_all("super-resolution", prompts, [each.truth for each in prompts])

    assert scores.scores(metrics)["gain"] > 20


def test_bicubic_images_gain_nothing_over_bicubic_ones():
    prompts = some_prompts(4)
    plain = [scores.enlarge(scores.shrink(each.truth)) for each in prompts]

    found = scores.scores(score_all("super-resolution", prompts, plain))

    assert found["gain"] == pytest.approx(0)
    assert found["mean_gain"] == pytest.approx(0)
    assert 18 < found["psnr"] < 32


def test_metrics_add_up_over_images():
    right, wrong = scene(thing()), scene(thing(color="blue"))
    prompts = [EvaluationPrompt(scene=right), EvaluationPrompt(scene=right)]

    metrics = score_all("class-to-image", prompts, [image_of(right), image_of(wrong)])

    assert metrics["class"] == (1, 2)
    assert scores.scores(metrics)["class"] == 0.5


def test_a_second_thing_is_no_image_of_one_class():
    asked = EvaluationPrompt(scene=scene(thing(x=16.0)))
    both = scene(thing(x=16.0), thing("square", "blue", x=48.0), relations=("left of",))

    metrics = scores.score_class(asked, image_of(both))

    assert metrics["class"] == (False, 1)
    assert metrics["found"] == (True, 1)


def test_a_thing_next_to_its_box_has_its_label_and_no_overlap():
    asked = EvaluationPrompt(scene=scene(thing(x=15.0, y=15.0)))

    metrics = scores.score_layout(asked, image_of(scene(thing(x=46.0, y=46.0))))

    labels = {"overlap": (0, 1), "labels": (1, 1), "labels_in_place": (0, 1)}
    assert metrics == {WHOLE: (False, 1)} | labels


def test_a_thing_half_way_out_of_its_box_overlaps_by_a_third():
    asked = EvaluationPrompt(scene=scene(thing("square", x=24.0)))

    metrics = scores.score_layout(asked, image_of(scene(thing("square", x=24 + 0.9 * 12))))

    assert metrics["overlap"][0] == pytest.approx(1 / 3, abs=0.03)


def test_the_wrong_colour_costs_the_pixels_of_a_map_that_it_covers():
    asked = EvaluationPrompt(scene=scene(thing()))

    metrics = scores.score_map(asked, image_of(scene(thing(color="green"))))

    area = scenes.coverage(thing()).sum()
    assert metrics["pixels"][1] == 64 * 64
    assert metrics["pixels"][0] == pytest.approx(64 * 64 - area, rel=0.01)
    assert metrics["thing_pixels"][0] == 0


def test_the_wrong_background_costs_nearly_all_of_a_map():
    asked = EvaluationPrompt(scene=scene(thing()))

    metrics = scores.score_map(asked, image_of(scene(thing(), background="gray")))

    assert metrics["pixels"][0] < 0.2 * metrics["pixels"][1]
    assert metrics["thing_pixels"][0] == metrics["thing_pixels"][1]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda image: np.full_like(image, 244),  # nothing there
        lambda image: np.clip(image.astype(int) - 30, 0, 255).astype(np.uint8),
        lambda image: np.concatenate([image[:, 32:], image[:, :32]], axis=1),  # two halves
    ],
)
def test_images_that_are_no_scenes_are_not_whole(spoil):
    asked = EvaluationPrompt(scene=scene(thing(x=28.0)))

    metrics = scores.score_scene(asked, spoil(asked.truth))

    assert metrics[WHOLE] == (False, 1)


def test_a_coloured_smear_is_stray():
    asked = EvaluationPrompt(scene=scene(thing(x=18.0, y=18.0)))
    image = asked.truth.copy()
    image[50:54, 4:60] = scenes.COLORS["green"]

    assert scores.score_scene(asked, asked.truth)[WHOLE] == (True, 1)
    assert scores.score_scene(asked, image)[WHOLE] == (False, 1)


def test_more_things_than_a_model_learns_from_are_not_whole():
    two = scene(thing(x=16.0), thing("square", "blue", x=48.0), relations=("left of",))

    one_allowed = scores.score_scene(EvaluationPrompt(scene=scene(thing())), image_of(two))
    two_allowed = scores.score_scene(EvaluationPrompt(scene=two), image_of(two))

    assert (one_allowed[WHOLE], two_allowed[WHOLE]) == ((False, 1), (True, 1))


def test_one_changed_pixel_next_to_the_mask_is_not_kept():
    (prompt,) = some_prompts(1, mask=square_mask())
    changed = prompt.truth.copy()
    changed[40, 40, 0] ^= 1

    assert scores.score_filled(prompt, prompt.truth)["kept"] == (True, 1)
    assert scores.score_filled(prompt, changed)["kept"] == (False, 1)


def test_errors_in_a_mask_are_those_of_its_pixels_alone():
    (prompt,) = some_prompts(1, mask=square_mask())
    image = prompt.truth.copy()
    image[prompt.mask] = np.clip(image[prompt.mask].astype(int) ^ 8, 0, 255)

    metrics = scores.score_filled(prompt, image)

    assert metrics["error"] == (64 * 400 * 3, 400 * 3)


def test_a_thing_that_is_mostly_hidden_need_not_come_back():
    mask = np.zeros((64, 64), np.bool_)
    mask[:, 24:] = True
    asked = EvaluationPrompt(scene=scene(thing(x=32.0)), mask=mask)
    nothing = np.full((64, 64, 3), 244, np.uint8)
    showing = replace(asked, mask=~mask)

    assert scores.score_filled(asked, nothing)["readable"] == (True, 1)
    assert scores.score_filled(showing, nothing)["readable"] == (False, 1)


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
def test_of_a_thing_that_a_mask_hides_wholly_nothing_can_be_known(left, is_known):
    mask = np.zeros((64, 64), np.bool_)
    mask[:, left:40] = True
    asked = EvaluationPrompt(scene=scene(thing(x=20.0, radius=12.0)), mask=mask)

    metrics = SCORERS["inpainting"](asked, asked.truth)

    assert (metrics["knowable_error"][0] == 0) == is_known
    found = scores.scores(metrics)
    assert (found["knowable_gain"] == pytest.approx(found["gain"])) == is_known


def test_one_bad_image_of_two_decides_the_gain_and_half_of_the_mean_gain():
    good, bad = some_prompts(2, mask=square_mask())
    missing = bad.truth.copy()
    missing[bad.mask] = 128

    of_good, of_bad = (
        scores.scores(SCORERS["inpainting"](asked, image))["gain"]
        for asked, image in ((good, good.truth), (bad, missing))
    )
    both = scores.scores(score_all("inpainting", (good, bad), (good.truth, missing)))

    assert of_good > 15
    assert of_bad < 3
    assert both["mean_gain"] == pytest.approx((of_good + of_bad) / 2)
    assert both["gain"] < both["mean_gain"] - 5
