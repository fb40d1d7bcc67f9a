"""Conditions of the models without captions, and the masks of their images."""

from itertools import islice

import numpy as np
import pytest

from models.shapes.data import labels, masks, scenes
from models.shapes.evaluation import detector
from models.shapes.evaluation.scores import image_of


def thing(kind="circle", color="red", size="large", x=32.0, y=32.0, radius=12.0):
    return scenes.Thing(kind=kind, color=color, size=size, x=x, y=y, radius=radius)


def some_scenes(count, seed=3):
    return list(islice(scenes.random_scenes(np.random.default_rng(seed), held_out=True), count))


def test_every_look_has_its_own_label_and_a_name():
    looks = [labels.looks_of(label) for label in range(labels.NUM_LABELS)]

    assert [labels.label_of(thing(*look)) for look in looks] == list(range(24))
    assert labels.label_names()[0] == "red circle"
    assert len(set(labels.label_names())) == 24


def test_every_class_of_a_map_has_the_name_of_what_is_there():
    names = labels.class_names()

    assert len(set(names)) == labels.NUM_CLASSES
    assert names[labels.background_class("gray", gradient=True)] == "gray gradient"
    (red_cross,) = set(labels.class_map([thing("cross")], "white", gradient=False).flat) - {0}
    assert names[0] == "white plain"
    assert names[red_cross] == "red cross"


@pytest.mark.parametrize("kind", scenes.SHAPES)
def test_a_box_holds_all_of_its_thing_and_no_more(kind):
    one = thing(kind, x=30.3, y=27.8, radius=11.4)
    rows, columns = np.nonzero(scenes.coverage(one) > 0.5)

    box = labels.box_of(one)

    painted = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    np.testing.assert_allclose(np.array(box) * scenes.SIZE, painted, atol=1.3)


def test_a_box_ends_where_the_image_ends():
    left, top, right, bottom = labels.box_of(thing(x=3.0, y=62.0))

    assert (left, bottom) == (0.0, 1.0)
    assert right == pytest.approx(15 / 64)
    assert top == pytest.approx(50 / 64)


@pytest.mark.parametrize(
    ("second", "overlap"),
    [
        ((0.0, 0.0, 0.5, 0.5), 1.0),
        ((0.25, 0.0, 0.75, 0.5), 1 / 3),
        ((0.5, 0.5, 1.0, 1.0), 0.0),
        ((0.1, 0.1, 0.2, 0.3), 0.08),
    ],
)
def test_the_overlap_of_boxes_is_intersection_over_union(second, overlap):
    first = (0.0, 0.0, 0.5, 0.5)

    assert labels.overlap_of(first, second) == pytest.approx(overlap)
    assert labels.overlap_of(second, first) == pytest.approx(overlap)


def test_a_class_map_has_the_label_of_what_covers_a_pixel():
    one = thing("cross", "cyan", x=20.0, y=40.0)

    ids = labels.class_map([one], "gray", gradient=True)

    assert (ids.dtype, ids.shape) == (np.uint8, (64, 64))
    assert ids[40, 20] == labels.NUM_BACKGROUNDS + labels.label_of(one)
    assert ids[0, 63] == labels.background_class("gray", gradient=True) == 3
    assert (ids != 3).sum() == pytest.approx(scenes.coverage(one).sum(), rel=0.05)


def test_the_map_of_an_image_read_back_is_that_of_its_scene():
    for scene in some_scenes(10):
        reading = detector.read_image(image_of(scene))

        found = labels.class_map(reading.things, reading.background, gradient=reading.gradient)

        assert (found == labels.scene_map(scene)).mean() > 0.995


def test_every_class_has_its_colour_and_backgrounds_are_gray():
    colors = labels.class_colors()

    assert colors.shape == (labels.NUM_CLASSES, 3)
    assert (np.ptp(colors[: labels.NUM_BACKGROUNDS], axis=1) == 0).all()
    assert len(np.unique(colors[: labels.NUM_BACKGROUNDS, 0])) == labels.NUM_BACKGROUNDS
    red = labels.NUM_BACKGROUNDS + labels.label_of(thing("square", "red"))
    np.testing.assert_allclose(127.5 * (colors[red] + 1), scenes.COLORS["red"], atol=1e-3)


def test_features_of_labels_are_those_of_a_kind_plus_those_of_a_colour():
    features = labels.label_features(256, np.random.default_rng(0)).reshape(4, 6, 256)

    turned = features[:, 1:] - features[:, :1]
    np.testing.assert_allclose(turned, np.broadcast_to(turned[:1], turned.shape), atol=1e-6)
    assert features.std() == pytest.approx(1, abs=0.1)
    assert np.abs(features[0, 0] - features[1, 0]).min() > 0


def test_masks_are_of_every_size_up_to_half_and_the_same_for_a_seed():
    generated = [masks.random_mask(np.random.default_rng(seed)) for seed in range(60)]
    shares = [mask.mean() for mask in generated]

    assert all(mask.shape == (64, 64) and mask.dtype == np.bool_ for mask in generated)
    assert 0.05 <= min(shares) < 0.15
    assert 0.35 < max(shares) <= 0.5
    np.testing.assert_array_equal(generated[7], masks.random_mask(np.random.default_rng(7)))


def test_half_of_a_thing_shows_next_to_a_mask_through_its_middle():
    mask = np.zeros((64, 64), np.bool_)
    mask[:, 32:] = True

    assert masks.visible_share(thing(), mask) == pytest.approx(0.5, abs=0.01)
    assert masks.visible_share(thing(x=15.0), mask) == 1


def test_the_plain_fill_is_the_mean_of_what_is_left():
    image = np.full((64, 64, 3), 200, np.uint8)
    image[:, :32] = 100
    mask = np.zeros((64, 64), np.bool_)
    mask[:, 48:] = True

    filled = masks.mean_color_fill(image, mask)

    assert (filled[mask] == 133).all()
    assert (filled[~mask] == image[~mask]).all()
    assert (image[mask] == 200).all()
