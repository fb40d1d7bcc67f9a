from dataclasses import replace

import numpy as np
import pytest

from models.shapes.data import scenes
from models.shapes.evaluation import detector, frechet, prompts, scoring

CAPTIONS = 48
#: Of the absolute weights of each layer; others would make every stored distance worthless.
WEIGHT_SUMS = [44.429489, 150.190918, 323.619385]


def gaussian(mean, covariance):
    return frechet.Gaussian(mean=np.array(mean), covariance=np.array(covariance))


def random_gaussian(seed, size=5):
    rng = np.random.default_rng(seed)
    factor = rng.standard_normal((size, size))
    return gaussian(rng.standard_normal(size), factor @ factor.T)


def turned(one, rotation):
    return gaussian(rotation @ one.mean, rotation @ one.covariance @ rotation.T)


def test_a_set_is_at_distance_zero_from_itself():
    one = random_gaussian(0)

    assert frechet.distance(one, one) == pytest.approx(0, abs=1e-12)


def test_distance_is_that_of_the_closed_form_for_independent_features():
    first = gaussian([1.0, 2.0], np.diag([4.0, 9.0]))
    second = gaussian([4.0, 6.0], np.diag([1.0, 25.0]))

    expected = 3**2 + 4**2 + (2 - 1) ** 2 + (3 - 5) ** 2

    assert frechet.distance(first, second) == pytest.approx(expected, rel=1e-12)


def test_distance_is_that_of_the_root_of_the_product_for_dependent_features():
    first, second = random_gaussian(1), random_gaussian(2)

    # The product of two covariances is not symmetric, but its eigenvalues are real.
    roots = np.sqrt(np.linalg.eigvals(first.covariance @ second.covariance).real)
    shift = first.mean - second.mean
    expected = shift @ shift + np.trace(first.covariance + second.covariance) - 2 * roots.sum()
    assert frechet.distance(first, second) == pytest.approx(expected, rel=1e-9)


def test_distance_is_symmetric():
    first, second = random_gaussian(1), random_gaussian(2)

    forth, back = frechet.distance(first, second), frechet.distance(second, first)

    assert forth == pytest.approx(back, rel=1e-12)


def test_turning_both_sets_of_features_changes_nothing():
    first, second = random_gaussian(1), random_gaussian(2)
    rotation, _ = np.linalg.qr(np.random.default_rng(3).standard_normal((5, 5)))

    rotated = frechet.distance(turned(first, rotation), turned(second, rotation))

    assert rotated == pytest.approx(frechet.distance(first, second), rel=1e-9)


def test_a_set_with_fewer_images_than_features_still_has_a_distance():
    rng = np.random.default_rng(0)
    few = frechet.fit(rng.standard_normal((3, 5)))

    assert frechet.distance(few, few) == pytest.approx(0, abs=1e-9)
    assert frechet.distance(few, random_gaussian(1)) > 0


def test_one_image_has_no_covariance():
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        frechet.fit(np.zeros((1, 5)))


def test_a_fit_has_the_mean_and_covariance_of_its_features():
    generated = np.random.default_rng(0).standard_normal((50_000, 3)) * [1, 2, 3] + [4, 5, 6]

    one = frechet.fit(generated)

    np.testing.assert_allclose(one.mean, [4, 5, 6], atol=0.05)
    np.testing.assert_allclose(one.covariance, np.diag([1, 4, 9]), atol=0.15)


def test_features_depend_on_their_own_image_only():
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)

    together = frechet.features_of(images)

    assert together.shape == (3, frechet.FEATURES)
    np.testing.assert_allclose(together[1:2], frechet.features_of(images[1:2]), atol=1e-5)


def test_features_are_those_of_a_convolution_written_out():
    image = np.random.default_rng(0).integers(0, 256, (1, 5, 4, 3), np.uint8)
    (first, *_) = frechet._weights()

    found = frechet.features_of(image)[0]

    signal = np.pad(image[0] / 127.5 - 1, ((1, 1), (1, 1), (0, 0)))
    sums = [
        [signal[2 * row :, 2 * column :][:3, :3].ravel() @ first for column in range(2)]
        for row in range(3)
    ]
    leaked = np.where(np.array(sums) > 0, sums, 0.2 * np.array(sums))
    np.testing.assert_allclose(found[:8], leaked.mean(axis=(0, 1)), atol=1e-5)
    np.testing.assert_allclose(found[8:16], leaked.std(axis=(0, 1)), atol=1e-5)


# Planted faults. The stronger the fault, the larger the distance has to be.


@pytest.fixture(scope="module")
def asked():
    rng = np.random.default_rng(5)
    return [scenes.random_scene(rng) for _ in range(CAPTIONS)]


@pytest.fixture(scope="module")
def clean(asked):
    return prompts.renders(asked)


@pytest.fixture(scope="module")
def reference(asked):
    return prompts.reference_of(asked)


def noisy(images, levels):
    noise = levels * np.random.default_rng(1).standard_normal(images.shape)
    return np.clip(np.rint(images + noise), 0, 255).astype(np.uint8)


def blurred(images, times):
    soft = np.moveaxis(images.astype(np.float32), 0, 2)  # neighbours are those of axes 0 and 1
    for _ in range(times):
        soft = detector.smooth(soft)
    return np.rint(np.moveaxis(soft, 2, 0)).astype(np.uint8)


def miscoloured(images, share):
    count = int(share * len(images))
    return np.concatenate([images[:count, ..., [2, 0, 1]], images[count:]])


def pale(images, share):
    gray = images.mean(axis=3, keepdims=True)
    return np.rint((1 - share) * images + share * gray).astype(np.uint8)


def with_things_missing(asked, share):
    rng = np.random.default_rng(3)
    left = [[thing for thing in each.things if rng.random() >= share] for each in asked]
    return prompts.renders(
        [replace(each, things=tuple(things)) for each, things in zip(asked, left, strict=True)]
    )


def distances(reference, *sets):
    return [frechet.distance(frechet.fit(frechet.features_of(each)), reference) for each in sets]


@pytest.mark.parametrize(
    ("fault", "strengths", "at_least"),
    [
        (noisy, (8, 16, 32, 64), 40),
        (blurred, (1, 2, 4, 8), 3),
        (miscoloured, (0.1, 0.25, 0.5, 1), 4),
        (pale, (0.1, 0.25, 0.5, 1), 15),
    ],
)
def test_the_stronger_a_fault_the_larger_the_distance(clean, reference, fault, strengths, at_least):
    found = distances(reference, clean, *(fault(clean, strength) for strength in strengths))

    assert found == sorted(found)
    assert found[-1] > at_least * found[0]


def test_the_more_shapes_are_missing_the_larger_the_distance(asked, clean, reference):
    sets = [with_things_missing(asked, share) for share in (0.1, 0.25, 0.5, 1)]

    found = distances(reference, clean, *sets)

    assert found == sorted(found)
    assert found[2] > 2 * found[0]
    assert found[-1] > 20 * found[0]


def test_a_background_of_the_wrong_colour_is_seen(asked, clean, reference):
    gray = prompts.renders([replace(each, background="gray") for each in asked])

    right, wrong = distances(reference, clean, gray)

    assert wrong > 10 * right


def test_right_images_laid_out_again_are_all_about_as_near(asked, reference):
    rng = np.random.default_rng(11)
    sets = [
        prompts.renders([prompts.another_layout(rng, each) for each in asked]) for _ in range(3)
    ]

    found = distances(reference, *sets)

    assert max(found) < 1.3 * min(found)


def test_the_weights_are_fixed():
    total = [float(abs(weights).sum()) for weights in frechet._weights()]

    assert [weights.shape for weights in frechet._weights()] == [(27, 8), (72, 16), (144, 24)]
    assert total == pytest.approx(WEIGHT_SUMS, rel=1e-6)


def test_a_thing_laid_out_again_keeps_what_its_caption_says():
    rng = np.random.default_rng(0)

    for asked in [scenes.random_scene(rng) for _ in range(20)]:
        other = prompts.another_layout(rng, asked)

        assert scenes.caption(other) == scenes.caption(asked)
        assert other.things != asked.things
        assert scoring.score_all([asked], prompts.renders([other])).images_right == 1
