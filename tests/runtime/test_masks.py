import math

import numpy as np
import pytest
from PIL import Image

from ldm_runtime.inputs.images import InputImage
from ldm_runtime.inputs.masks import (
    binary_mask,
    blurred_mask,
    composite,
    latent_mask,
    outpaint_canvas,
)
from ldm_runtime.inputs.reading import MAX_SIDE
from ldm_runtime.pipeline.masked_denoiser import MaskedDenoiser
from ldm_runtime.samplers import SAMPLERS
from tests.runtime.sampler_cases import sampler_named

RNG = np.random.default_rng(0)
PICTURE = InputImage(RNG.integers(0, 256, (8, 16, 3), dtype=np.uint8))
OTHER = Image.fromarray(255 - PICTURE.pixels)


def mask_of(rows):
    return InputImage.read(np.array(rows, dtype=np.uint8))


# --- mask pictures --------------------------------------------------------------------------------


def test_a_latent_pixel_is_drawn_anew_if_any_of_its_pixels_is_brighter_than_one_half():
    gray = np.zeros((4, 12), dtype=np.uint8)
    gray[:2, :4] = 127
    gray[3, 5] = 128
    gray[0, 8:] = 255

    mask = latent_mask(mask_of(gray), 4)

    assert mask.dtype == np.float32
    assert mask.shape == (1, 1, 1, 3)
    assert mask.ravel().tolist() == [0, 1, 1]


def test_latent_rows_and_columns_are_not_mixed_up():
    gray = np.zeros((6, 4), dtype=np.uint8)
    gray[4:, :2] = 255

    assert latent_mask(mask_of(gray), 2)[0, 0].tolist() == [[0, 0], [0, 0], [1, 0]]


@pytest.mark.parametrize(("width", "height"), [(9, 8), (8, 9)])
def test_a_mask_that_does_not_fit_latents_is_one_sentence(width, height):
    with pytest.raises(ValueError, match=f"the mask has {width}x{height} pixels.* multiples of 8"):
        latent_mask(mask_of(np.zeros((height, width))), 8)


@pytest.mark.parametrize("blur", [(4, 4), (1, 0), (0, 9), (64, 3)])
@pytest.mark.parametrize("size", [(40, 61), (5, 7), (1, 1)])
def test_a_blur_is_that_of_scipy_in_each_direction(blur, size):
    """The reach is the web UI's, and the border OpenCV's BORDER_REFLECT_101."""
    ndimage = pytest.importorskip("scipy.ndimage", reason="needs SciPy")
    gray = RNG.integers(0, 256, size, dtype=np.uint8)

    found = blurred_mask(mask_of(gray), blur).pixels

    expected = gray.astype(np.float64)
    for axis, sigma in ((1, blur[0]), (0, blur[1])):
        if sigma:
            radius = int(2.5 * sigma + 0.5)
            expected = np.rint(
                ndimage.gaussian_filter1d(expected, sigma, axis, radius=radius, mode="mirror")
            )
    np.testing.assert_array_equal(found, np.repeat(expected[..., None], 3, axis=2))


def test_a_blurred_edge_is_that_of_opencv():
    """Of `cv2.GaussianBlur` in OpenCV 5.1 with a kernel of 21 pixels and a sigma of 4."""
    edge = np.zeros((1, 24), dtype=np.uint8)
    edge[:, 12:] = 255

    found = blurred_mask(mask_of(edge), (4, 0)).pixels[0, :, 0]

    dark, light = (0, 0, 1, 3, 7, 12, 21, 32, 48, 67, 90, 115), (140, 165, 188, 207, 223, 234)
    expected = np.array([*dark, *light, 243, 248, 252, 254, 255, 255])
    assert np.abs(found.astype(int) - expected).max() <= 1


def test_beyond_a_blurred_edge_the_new_one_fades_out():
    """Compared with the layers of Pillow that the web UI lays over each other."""
    gray = np.repeat(np.linspace(0, 255, 16).astype(np.uint8)[None], 8, axis=0)

    result = composite(PICTURE, OTHER, mask_of(gray), fades_outwards=True)

    kept = Image.fromarray(255 - np.minimum(2 * gray.astype(int), 255).astype(np.uint8))
    layer = PICTURE.to_image()
    layer.putalpha(kept)
    expected = Image.alpha_composite(OTHER.convert("RGBA"), layer).convert("RGB")
    difference = np.asarray(result).astype(int) - np.asarray(expected)
    assert np.abs(difference).max() <= 1
    np.testing.assert_array_equal(np.asarray(result)[:, 0], PICTURE.pixels[:, 0])
    np.testing.assert_array_equal(np.asarray(result)[:, 8:], np.asarray(OTHER)[:, 8:])


def test_the_dark_half_keeps_every_byte_white_takes_the_new_one_and_light_gray_blends():
    gray = np.zeros((8, 16), dtype=np.uint8)
    gray[:, 2:4], gray[:, 4:8], gray[:, 8:] = 127, 127 + 32, 255

    result = np.asarray(composite(PICTURE, OTHER, mask_of(gray)))

    new = np.asarray(OTHER)
    np.testing.assert_array_equal(result[:, :4], PICTURE.pixels[:, :4])
    np.testing.assert_array_equal(result[:, 8:], new[:, 8:])
    blended = 0.75 * PICTURE.pixels[:, 4:8] + 0.25 * new[:, 4:8]
    np.testing.assert_allclose(result[:, 4:8], blended, atol=1)


def test_a_mask_in_two_colours_divides_at_one_half_as_compvis_divides_it():
    mask = np.arange(256, dtype=np.uint8).reshape(16, 16)

    found = binary_mask(mask_of(mask)).gray() / 255

    expected = mask.astype(np.float32) / 255.0  # scripts/inpaint.py, line by line
    expected[expected < 0.5] = 0
    expected[expected >= 0.5] = 1
    np.testing.assert_array_equal(found, expected)


def test_pictures_of_different_sizes_are_not_blended():
    mask = mask_of(np.zeros((8, 8)))

    with pytest.raises(ValueError, match="the image 16x8, the generated image 16x8, the mask 8"):
        composite(PICTURE, OTHER, mask)


def test_a_grown_canvas_keeps_the_picture_and_repeats_its_edge():
    grown, mask = outpaint_canvas(PICTURE, 1, 2, 3, 4)

    assert grown.size == mask.size == (16 + 1 + 3, 8 + 2 + 4)
    np.testing.assert_array_equal(grown.pixels[2:10, 1:17], PICTURE.pixels)
    np.testing.assert_array_equal(grown.pixels[2:10, 0], PICTURE.pixels[:, 0])
    np.testing.assert_array_equal(grown.pixels[2:10, 19], PICTURE.pixels[:, 15])
    np.testing.assert_array_equal(grown.pixels[0, 1:17], PICTURE.pixels[0])
    np.testing.assert_array_equal(grown.pixels[13, 1:17], PICTURE.pixels[7])
    assert (mask.gray()[2:10, 1:17] == 0).all()
    assert mask.gray().sum() == 255 * (20 * 14 - 16 * 8)


def test_after_outpainting_every_pixel_of_the_picture_is_still_there():
    grown, mask = outpaint_canvas(PICTURE, 3, 0, 0, 1)
    drawn = Image.fromarray(255 - grown.pixels)

    result = np.asarray(composite(grown, drawn, mask))

    np.testing.assert_array_equal(result[:8, 3:], PICTURE.pixels)
    np.testing.assert_array_equal(result[:, :3], np.asarray(drawn)[:, :3])


@pytest.mark.parametrize(
    ("sides", "message"),
    [
        ((0, 0, 0, 0), "nothing to add; give at least one side"),
        ((0, -8, 8, 0), "cannot grow by -8 pixels on the top; give 0 or more"),
        ((MAX_SIDE, 0, 0, 0), f"grown to {MAX_SIDE + 16}x8 pixels; at most {MAX_SIDE} per side"),
        ((0, 0, 0, 10**12), "at most 16384 per side"),
    ],
)
def test_a_canvas_that_cannot_be_is_one_sentence(sides, message):
    with pytest.raises(ValueError, match=message):
        outpaint_canvas(PICTURE, *sides)


# --- the denoiser that knows a part ---------------------------------------------------------------

SHAPE = (2, 3, 5, 6)
#: They end in 0 and step evenly in the logarithm before it, as samplers of high order like it.
SIGMAS = [float(sigma) for sigma in np.geomspace(12.0, 0.05, 9)] + [0.0]
#: The right half is drawn anew.
UNKNOWN = np.s_[:, :, :, 3:]
KNOWN = np.s_[:, :, :, :3]
MASK = np.zeros((1, 1, 5, 6))
MASK[UNKNOWN] = 1


def smoothing(latents, sigma):
    """A made-up model: a pixel's x0 depends on its neighbours and the noise level, nonlinearly."""
    near = sum(np.roll(latents, shift, axis) for shift in (-1, 1) for axis in (2, 3))
    return np.tanh(near / (4 * math.hypot(1.0, sigma)) + 0.3 * latents / (1 + sigma**2))


class Noise:
    """Noise that depends on the stretch of sigmas alone, so that two runs can share it."""

    def __init__(self, area=np.s_[...]):
        self.area = area

    def __call__(self, sigma, sigma_next):
        seed = abs(hash((sigma, sigma_next)))
        return np.random.default_rng(seed).standard_normal(SHAPE)[self.area]


def masked(dtype, denoise=smoothing):
    """Return the denoiser and its latents at the highest sigma."""
    rng = np.random.default_rng(1)
    init = rng.uniform(-1, 1, (1, *SHAPE[1:])).astype(dtype)
    noise = rng.standard_normal(SHAPE).astype(dtype)
    denoiser = MaskedDenoiser(denoise=denoise, init=init, noise=noise, mask=MASK.astype(np.float32))
    return denoiser, init + SIGMAS[0] * noise


def run(name, denoise, latents, sigmas, noise_sampler=None):
    record = SAMPLERS[name]
    sampler = sampler_named(name)(
        denoise, latents, sigmas, eta=record.default_eta, noise_sampler=noise_sampler or Noise()
    )
    return list(sampler)


@pytest.mark.parametrize("name", SAMPLERS)
def test_with_every_sampler_what_is_known_ends_as_it_was_given(name):
    denoiser, latents = masked(np.float64)

    *_, final = run(name, denoiser, latents, SIGMAS)

    known = np.broadcast_to(denoiser.init, SHAPE)[KNOWN]
    np.testing.assert_allclose(final[KNOWN], known, rtol=0, atol=1e-12)
    assert abs(final - denoiser.init)[UNKNOWN].min() > 0


@pytest.mark.parametrize("name", [name for name, each in SAMPLERS.items() if not each.default_eta])
def test_with_a_deterministic_sampler_what_is_known_never_leaves_its_line(name):
    denoiser, latents = masked(np.float64)

    for sigma, step in zip(SIGMAS[1:], run(name, denoiser, latents, SIGMAS), strict=True):
        line = denoiser.init + sigma * denoiser.noise
        np.testing.assert_allclose(step[KNOWN], line[KNOWN], rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_rest_is_drawn_as_by_a_model_of_the_rest_that_knows_the_known_part(name):
    denoiser, latents = masked(np.float64)

    def denoise_the_rest(rest, sigma):
        whole = denoiser.init + sigma * denoiser.noise
        whole[UNKNOWN] = rest
        return smoothing(whole, sigma)[UNKNOWN]

    *_, whole = run(name, denoiser, latents, SIGMAS)
    *_, rest = run(name, denoise_the_rest, latents[UNKNOWN], SIGMAS, noise_sampler=Noise(UNKNOWN))

    np.testing.assert_allclose(whole[UNKNOWN], rest, rtol=0, atol=1e-12)


def test_the_model_sees_what_is_known_at_the_level_of_the_noise():
    seen = []

    def denoise(latents, sigma):
        seen.append((latents, sigma))
        return np.full_like(latents, 7)

    denoiser, latents = masked(np.float32, denoise)

    x0 = denoiser(np.full_like(latents, 5), 2.0)

    ((given, sigma),) = seen
    assert sigma == 2.0
    assert (given[UNKNOWN] == 5).all()
    np.testing.assert_array_equal(given[KNOWN], (denoiser.init + 2 * denoiser.noise)[KNOWN])
    assert (x0[UNKNOWN] == 7).all()
    np.testing.assert_array_equal(x0[KNOWN], np.broadcast_to(denoiser.init, SHAPE)[KNOWN])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_latents_keep_their_precision(dtype):
    denoiser, latents = masked(dtype, lambda latents, sigma: latents)

    assert denoiser(latents, 0.7).dtype == dtype
