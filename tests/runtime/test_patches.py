"""Networks over patches: which patches there are, how they are blended, and what is never 0/0."""

from itertools import product

import numpy as np
import pytest

from ldm_runtime.specs.tasks import runs_in_patches
from ldm_runtime.testing import tiny_spec
from ldm_runtime.tiling.patches import PATCH, STRIDE, border_weights, over_patches, patch_starts

RNG = np.random.default_rng(0)


def latents_of(height, width, batch=1):
    return RNG.standard_normal((batch, 2, height, width)).astype(np.float32)


class Network:
    """Adds to every pixel what depends on its place in the patch and on the patch's own mean."""

    def __init__(self, factor=1):
        self.factor, self.shapes = factor, []

    def __call__(self, part):
        self.shapes.append(part.shape)
        assert part.flags.c_contiguous
        large = np.kron(part, np.ones((self.factor, self.factor), dtype=np.float32))
        rows, columns = np.ogrid[: large.shape[2], : large.shape[3]]
        places = (0.01 * rows - 0.02 * columns).astype(np.float32)
        return large + places + part.mean(axis=(1, 2, 3), keepdims=True)


def plainly(network, latents, factor):
    """Blend patch by patch and pixel by pixel, as the reference's weighting is defined."""
    batch, channels, height, width = latents.shape
    sides = min(height, 128), min(width, 128)
    total = np.zeros((batch, channels, height * factor, width * factor))
    weights = np.zeros((height * factor, width * factor))
    for top, left in product(*(starts(length) for length in (height, width))):
        part = latents[:, :, top : top + sides[0], left : left + sides[1]]
        result = network(np.ascontiguousarray(part))
        last = result.shape[2] - 1, result.shape[3] - 1
        for row, column in product(range(last[0] + 1), range(last[1] + 1)):
            down, right = row / last[0], column / last[1]
            weight = min(max(min(down, right, 1 - down, 1 - right), 0.01), 0.5)
            y, x = top * factor + row, left * factor + column
            total[:, :, y, x] += weight * result[:, :, row, column]
            weights[y, x] += weight
    return total / weights


def starts(length):
    if length <= 128:
        return [0]
    every = [start for start in range(0, length, 64) if start + 128 <= length]
    return every if every[-1] + 128 == length else [*every, length - 128]


@pytest.mark.parametrize(
    ("height", "width", "factor"),
    [(128, 192, 1), (129, 40, 1), (150, 131, 1), (256, 64, 1), (8, 200, 2)],
)
def test_patches_are_blended_by_the_distance_to_their_borders(height, width, factor):
    latents = latents_of(height, width, batch=2)

    found = over_patches(Network(factor), latents, factor)

    assert found.dtype == np.float32
    expected = plainly(Network(factor), latents, factor)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("height", [129, 191, 192, 193, 255, 321])
def test_no_pixel_is_left_out_at_any_size(height):
    found = over_patches(Network(), latents_of(height, 140))

    assert np.isfinite(found).all()


def test_a_network_that_sees_single_pixels_gives_the_same_result():
    latents = latents_of(200, 150)

    found = over_patches(np.tanh, latents)

    np.testing.assert_allclose(found, np.tanh(latents), rtol=0, atol=2e-7)


@pytest.mark.parametrize("size", [(128, 128), (1, 1), (8, 64)])
def test_what_fits_into_a_patch_is_seen_whole_and_left_as_it_is(size):
    latents, network = latents_of(*size), Network(2)

    found = over_patches(network, latents, 2)

    assert network.shapes == [latents.shape]
    np.testing.assert_array_equal(found, Network(2)(latents))


def test_no_call_sees_more_than_a_patch():
    network = Network()

    over_patches(network, latents_of(300, 100, batch=3))

    assert set(network.shapes) == {(3, 2, PATCH, 100)}
    assert len(network.shapes) == len(patch_starts(300))


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (5, [0]),
        (128, [0]),
        (129, [0, 1]),
        (192, [0, 64]),
        (193, [0, 64, 65]),
        (256, [0, 64, 128]),
    ],
)
def test_patches_start_every_64_and_the_last_lies_at_the_border(length, expected):
    assert patch_starts(length) == expected
    assert STRIDE == 64


def test_weights_are_clipped_at_the_border_and_highest_in_the_middle():
    weights = border_weights(128, 128)

    assert weights[0].max() == weights[:, -1].max() == 0.01
    assert weights.max() == weights[63, 63] == pytest.approx(63 / 127)
    assert weights[10, 60] == pytest.approx(10 / 127)
    assert border_weights(1, 1).tolist() == [[0.01]]


def test_only_models_that_enlarge_run_in_patches():
    assert runs_in_patches(tiny_spec("super-resolution"))
    assert not runs_in_patches(tiny_spec("inpainting"))
