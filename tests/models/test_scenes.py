import hashlib
from itertools import islice, product

import numpy as np
import pytest

from models.shapes.data import scenes


def scene(*things, relations=(), background="white", gradient=False):
    return scenes.Scene(
        things=things, relations=relations, background=background, gradient=gradient
    )


def thing(kind="circle", color="red", size="large", x=32.0, y=32.0, radius=12.0):
    return scenes.Thing(kind=kind, color=color, size=size, x=x, y=y, radius=radius)


def first_scenes(count, *, held_out, seed=3):
    return list(islice(scenes.random_scenes(np.random.default_rng(seed), held_out=held_out), count))


def test_a_caption_says_what_is_where_on_what():
    red, blue = thing(), thing(kind="square", color="blue", size="small")
    green = thing(kind="cross", color="green", size="small")

    text = scenes.caption(
        scene(red, blue, green, relations=("left of", "above"), background="gray", gradient=True)
    )

    assert text == (
        "a large red circle left of a small blue square and above a small green cross "
        "on a gray gradient background"
    )


def test_a_caption_of_one_thing_has_no_relation():
    assert scenes.caption(scene(thing())) == "a large red circle on a white background"


def test_a_short_caption_tells_kinds_and_colours_alone():
    pair = next(each for each in first_scenes(50, held_out=False) if len(each.things) == 2)
    first, second = pair.things

    text = scenes.caption(pair, scenes.SHORT)

    assert text == f"a {first.color} {first.kind} and a {second.color} {second.kind}"


def test_the_trained_scenes_of_a_seed_never_change():
    digest = hashlib.sha256()
    for each in first_scenes(50, held_out=False, seed=1):
        digest.update(scenes.caption(each).encode())
        digest.update(np.rint(scenes.render(each) * 255).astype(np.uint8).tobytes())

    assert digest.hexdigest() == "19db0d635ace06c2d0d23540d8303a969d9e99e91a8e533837feec8f9c0e6a3d"


def test_no_caption_is_both_trained_on_and_held_out():
    trained = {scenes.caption(each) for each in first_scenes(200, held_out=False)}
    held_out = {scenes.caption(each) for each in first_scenes(10, held_out=True)}

    assert not trained & held_out
    assert all(map(scenes.is_held_out, held_out))
    assert not any(map(scenes.is_held_out, trained))


def test_relations_are_true_of_the_places():
    generated = first_scenes(200, held_out=False)

    pairs = [
        (relation, each.things[0], other)
        for each in generated
        for relation, other in zip(each.relations, each.things[1:], strict=True)
    ]
    is_true = {
        "left of": lambda a, b: a.x + 12 < b.x,
        "right of": lambda a, b: a.x > b.x + 12,
        "above": lambda a, b: a.y + 12 < b.y,
        "below": lambda a, b: a.y > b.y + 12,
    }

    assert {relation for relation, _, _ in pairs} == set(is_true)
    assert all(is_true[relation](first, other) for relation, first, other in pairs)


def test_no_two_things_of_a_scene_look_the_same():
    for each in first_scenes(200, held_out=False):
        looks = [(one.kind, one.color) for one in each.things]

        assert len(set(looks)) == len(looks)


def test_things_lie_inside_the_image_and_have_the_radius_of_their_size():
    for each in first_scenes(200, held_out=False):
        for one in each.things:
            low, high = scenes.SIZES[one.size]

            assert low <= one.radius <= high
            assert one.radius < min(one.x, one.y)
            assert max(one.x, one.y) < scenes.SIZE - one.radius


@pytest.mark.parametrize("kind", scenes.SHAPES)
def test_a_thing_has_its_colour_inside_and_the_background_outside(kind):
    image = scenes.render(scene(thing(kind=kind, color="purple"), background="black")) * 255

    np.testing.assert_allclose(image[32, 32], scenes.COLORS["purple"], atol=1e-3)
    np.testing.assert_allclose(image[2, 2], scenes.BACKGROUNDS["black"], atol=1e-3)


@pytest.mark.parametrize(
    ("kind", "unit_area"), [("circle", np.pi), ("square", 3.24), ("triangle", 1.872)]
)
def test_the_coverage_of_a_thing_adds_up_to_its_area(kind, unit_area):
    share = scenes.coverage(thing(kind=kind, x=31.3, y=32.8, radius=12.0))

    assert share.sum() == pytest.approx(unit_area * 12.0**2, rel=0.02)
    assert share.min() == 0
    assert share.max() == 1


@pytest.mark.parametrize(("background", "direction"), [("white", -1), ("gray", -1), ("black", 1)])
def test_a_gradient_runs_down_the_image_and_a_plain_background_does_not(background, direction):
    plain = scenes.backdrop(background, gradient=False)
    sloped = scenes.backdrop(background, gradient=True)

    assert np.ptp(plain) == 0
    assert sloped[0, 0] == plain[0, 0]
    assert np.all(np.sign(np.diff(sloped, axis=0)) == direction)
    assert np.all(np.diff(sloped, axis=1) == 0)


def test_hues_are_far_enough_apart_to_be_read_back():
    chroma = [complex(r - (g + b) / 2, 0.75**0.5 * (g - b)) for r, g, b in scenes.COLORS.values()]

    angles = [
        abs(np.angle(first / second, deg=True))
        for (i, first), (j, second) in product(enumerate(chroma), repeat=2)
        if i < j
    ]

    assert min(angles) > 40
