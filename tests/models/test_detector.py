import numpy as np
import pytest

from models.shapes.data import scenes
from models.shapes.evaluation import detector, detector_check, held_out


def one_thing(kind="circle", color="red", size="large", radius=12.0, x=30.25, y=34.5):
    return scenes.Thing(kind=kind, color=color, size=size, x=x, y=y, radius=radius)


def image_of(*things, background="white", gradient=False, noise=0.0, blurs=0):
    scene = scenes.Scene(
        things=things,
        relations=("left of",) * (len(things) - 1),
        background=background,
        gradient=gradient,
    )
    return detector_check.photograph(scene, np.random.default_rng(0), noise, blurs)


@pytest.mark.parametrize("color", scenes.COLORS)
@pytest.mark.parametrize("kind", scenes.SHAPES)
@pytest.mark.parametrize(("size", "radius"), [("small", 6.0), ("large", 12.0)])
def test_every_shape_is_read_back_with_its_place_and_size(kind, color, size, radius):
    wanted = one_thing(kind, color, size, radius)

    reading = detector.read_image(image_of(wanted, background="gray", gradient=True))

    (found,) = reading.things
    assert found[:3] == wanted[:3]
    assert found[3:] == pytest.approx(wanted[3:], abs=0.3)


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("background", scenes.BACKGROUNDS)
def test_every_background_is_read_back(background, gradient):
    image = image_of(one_thing(), background=background, gradient=gradient, noise=12.0)

    reading = detector.read_image(image)

    assert (reading.background, reading.gradient) == (background, gradient)


def test_two_things_of_one_colour_are_two_things_and_the_largest_comes_first():
    small = one_thing("square", "blue", "small", 6.5, x=14.0, y=32.0)
    large = one_thing("circle", "blue", "large", 12.0, x=44.0, y=32.0)

    reading = detector.read_image(image_of(small, large))

    assert [(each.kind, each.size) for each in reading.things] == [
        ("circle", "large"),
        ("square", "small"),
    ]


def test_an_empty_image_holds_nothing():
    reading = detector.read_image(np.full((64, 64, 3), 22, np.uint8))

    assert (reading.things, reading.overlaps) == ((), ())
    assert (reading.background, reading.gradient) == ("black", False)


def test_specks_and_streaks_are_no_shapes():
    image = image_of(one_thing("circle", "green", "large", 12.0, x=32.0, y=40.0))
    image[3:6, 3:6] = scenes.COLORS["red"]
    image[12:15, 2:60] = scenes.COLORS["blue"]

    reading = detector.read_image(image)

    assert [(each.kind, each.color) for each in reading.things] == [("circle", "green")]


@pytest.mark.parametrize("share", [0.7, 1.3])
def test_a_pale_or_gaudy_shape_keeps_its_colour_kind_and_size(share):
    wanted = one_thing("cross", "cyan", "small", 7.0)
    clean = image_of(wanted, background="gray").astype(np.float32)
    changed = np.clip(132 + share * (clean - 132), 0, 255).astype(np.uint8)

    reading = detector.read_image(changed)

    assert [each[:3] for each in reading.things] == [wanted[:3]]


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((64, 64, 3), np.float32),
        np.zeros((32, 64, 3), np.uint8),
        np.zeros((64, 64), np.uint8),
    ],
)
def test_an_image_of_another_type_or_shape_is_refused(image):
    with pytest.raises(ValueError, match=r"an image is uint8 \(64, 64, 3\), got"):
        detector.read_image(image)


def test_pixels_that_touch_by_a_corner_only_are_apart():
    mask = np.array([[1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 1, 1]], np.bool_)

    parts = list(detector.connected(mask))

    assert [int(part.sum()) for part in parts] == [3, 3]
    np.testing.assert_array_equal(np.sum(parts, axis=0), mask)


@pytest.mark.parametrize(
    ("noise", "blurs", "goal"), [(0.0, 0, 0.99), (12.0, 0, 0.97), (12.0, 1, 0.97)]
)
def test_random_scenes_are_read_back_whole(noise, blurs, goal):
    report = detector_check.evaluate_detector(100, seed=11, noise=noise, blurs=blurs)

    assert report["right"] >= goal


@pytest.mark.slow
def test_five_hundred_clean_renders_are_read_back():
    report = detector_check.evaluate_detector(500, seed=held_out.SEED)

    assert report["right"] >= detector_check.DETECTOR_GOAL
