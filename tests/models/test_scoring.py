"""Scoring of images: which count as right, and how counts add up."""

from dataclasses import replace

import numpy as np
import pytest

from models.shapes.evaluation import detector, detector_check, held_out, scoring
from tests.models.known_scene import BLUE, GREEN, RED, SCENE, moved, reading, recolored


def test_a_perfect_image_gets_everything():
    tally = scoring.score(SCENE, reading(RED, BLUE, GREEN))

    shares = tally.shares()

    assert set(shares.values()) == {1.0}
    assert tally.extra == 0


def test_swapped_colours_lose_both_objects_and_their_relations():
    image = reading(recolored(RED, "blue"), recolored(BLUE, "red"), GREEN)

    tally = scoring.score(SCENE, image)

    assert (tally.objects_right, tally.sizes_right, tally.extra) == (1, 1, 2)
    assert (tally.relations, tally.relations_scored, tally.relations_right) == (2, 0, 0)
    assert tally.images_right == 0


def test_swapped_places_lose_the_relation_but_no_object():
    image = reading(moved(RED, 48, 20), moved(BLUE, 16, 20), moved(GREEN, 48, 52))

    tally = scoring.score(SCENE, image)

    assert tally.objects_right == 3
    assert (tally.relations_scored, tally.relations_right) == (2, 1)
    assert tally.images_right == 0


def test_a_missing_object_makes_its_relation_wrong_in_the_headline():
    tally = scoring.score(SCENE, reading(RED, GREEN))

    shares = tally.shares()

    assert shares["objects"] == pytest.approx(2 / 3)
    assert shares["relations"] == 0.5
    assert shares["relations_of_found_objects"] == 1.0


def test_a_missing_first_object_loses_every_relation():
    tally = scoring.score(SCENE, reading(BLUE, GREEN))

    assert (tally.relations, tally.relations_scored, tally.relations_right) == (2, 0, 0)


def test_a_wrong_size_costs_the_size_only():
    image = reading(RED._replace(size="small", radius=6.5), BLUE, GREEN)

    tally = scoring.score(SCENE, image)

    assert (tally.objects_right, tally.sizes_right, tally.relations_right) == (3, 2, 2)
    assert tally.images_right == 0


@pytest.mark.parametrize(
    ("change", "backgrounds", "gradients"),
    [({"background": "gray"}, 0, 1), ({"gradient": True}, 1, 0)],
)
def test_a_wrong_background_costs_the_background_only(change, backgrounds, gradients):
    tally = scoring.score(SCENE, replace(reading(RED, BLUE, GREEN), **change))

    assert (tally.backgrounds_right, tally.gradients_right) == (backgrounds, gradients)
    assert tally.objects_right == 3
    assert tally.images_right == 0


def test_something_extra_costs_the_whole_image_and_no_object():
    tally = scoring.score(SCENE, reading(RED, BLUE, GREEN, recolored(GREEN, "yellow")))

    assert (tally.objects_right, tally.extra, tally.images_right) == (3, 1, 0)


def test_an_empty_image_gets_no_object():
    tally = scoring.score(SCENE, reading())

    assert (tally.objects, tally.objects_right, tally.relations_right) == (3, 0, 0)
    assert tally.shares()["relations_of_found_objects"] is None


def test_a_detection_is_used_once():
    assert scoring.match([RED, RED], [RED]) == [RED, None]


def test_of_two_detections_that_look_alike_the_one_of_the_right_size_is_taken():
    large = BLUE._replace(size="large", radius=12.0)

    assert scoring.match([BLUE], [large, BLUE]) == [BLUE]
    assert scoring.match([BLUE], [large]) == [large]


@pytest.mark.parametrize(
    ("relation", "x", "y"),
    [("left of", 1, 0), ("right of", -1, 0), ("above", 0, 1), ("below", 0, -1)],
)
def test_a_relation_holds_in_its_own_direction_only(relation, x, y):
    first = moved(RED, 32, 32)

    assert scoring.relation_holds(relation, first, moved(BLUE, 32 + 20 * x, 32 + 20 * y))
    assert not scoring.relation_holds(relation, first, moved(BLUE, 32 - 20 * x, 32 - 20 * y))
    assert not scoring.relation_holds(relation, first, moved(BLUE, 32 + 20 * y, 32 + 20 * x))
    assert not scoring.relation_holds(relation, first, first)


def test_a_diagonal_is_scored_by_its_longer_side():
    other = moved(BLUE, RED.x + 20, RED.y + 15)

    assert scoring.relation_holds("left of", RED, other)
    assert not scoring.relation_holds("above", RED, other)


def test_tallies_add_up_field_by_field():
    good = scoring.score(SCENE, reading(RED, BLUE, GREEN))
    bad = scoring.score(SCENE, reading(BLUE))

    total = good + bad

    assert (total.images, total.objects, total.objects_right) == (2, 6, 4)
    assert total.shares()["objects"] == pytest.approx(4 / 6)


def test_clean_renders_of_held_out_captions_score_everything():
    total = scoring.Tally()
    for scene in held_out.held_out_scenes(15, seed=5):
        image = detector_check.photograph(scene, np.random.default_rng(0), 0.0, 0)
        total += scoring.score(scene, detector.read_image(image))

    assert total.images_right == 15
    assert total.relations_right == total.relations > 0
