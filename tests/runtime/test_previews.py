import numpy as np
import pytest

from ldm_runtime import Generator
from ldm_runtime.bundle.manifest import PreviewRecord, load_manifest
from ldm_runtime.latents.previews import explained_variance, preview_image, preview_pixels

#: Red is the first channel, green the second halved, blue their sum and a little more.
RECORD = PreviewRecord(matrix=((1.0, 0.0), (0.0, 0.5), (1.0, 1.0)), bias=(0.0, 0.0, 0.25), r2=0.5)


def test_a_pixel_is_the_linear_map_of_its_latent_pixel():
    latents = np.array([0.5, -1.0], dtype=np.float32).reshape(1, 2, 1, 1)

    pixels = preview_pixels(latents, RECORD)

    assert pixels.dtype == np.float32
    np.testing.assert_allclose(pixels.ravel(), [0.5, -0.5, -0.25])


def test_a_preview_has_one_pixel_a_latent_pixel_in_its_place():
    latents = np.full((2, 2, 3, 5), -1.0, dtype=np.float32)
    latents[1, :, 2, 4] = [1.0, 2.0]

    first, second = preview_image(latents, RECORD)

    assert first.size == second.size == (5, 3)
    assert first.mode == "RGB"
    assert second.getpixel((4, 2)) == (255, 255, 255)
    assert second.getpixel((0, 0)) == first.getpixel((4, 2)) == (0, 64, 0)


def test_colours_beyond_the_scale_are_clipped():
    latents = np.full((1, 2, 1, 1), 1e4, dtype=np.float32)

    (image,) = preview_image(latents, RECORD)

    assert image.getpixel((0, 0)) == (255, 255, 255)


def test_an_enlarged_preview_repeats_every_pixel():
    latents = np.random.default_rng(0).normal(size=(1, 2, 4, 6)).astype(np.float32)
    (small,), (large,) = (preview_image(latents, RECORD, scale) for scale in (1, 3))

    assert large.size == (18, 12)
    assert np.array_equal(np.asarray(large), np.asarray(small).repeat(3, axis=0).repeat(3, axis=1))


@pytest.mark.parametrize("shape", [(2, 4, 4), (1, 3, 4, 4)])
def test_latents_of_another_model_are_refused_with_their_shape(shape):
    with pytest.raises(ValueError, match=r"latents have shape .* \(batch, 2, height, width\)"):
        preview_image(np.zeros(shape, dtype=np.float32), RECORD)


@pytest.mark.parametrize("scale", [0, -2])
def test_a_scale_that_leaves_no_pixel_is_refused(scale):
    with pytest.raises(ValueError, match=f"scale must be at least 1, got {scale}"):
        preview_image(np.zeros((1, 2, 4, 4), dtype=np.float32), RECORD, scale)


def test_the_last_preview_of_the_tiny_bundle_looks_like_its_picture(tiny_bundle):
    record = load_manifest(tiny_bundle).preview
    with Generator(tiny_bundle) as generator:
        result = generator(prompt="a red circle", seed=7, height=64, width=64)

    (preview,) = preview_image(result.latents, record)

    picture = np.asarray(result.images[0].reduce(2)).astype(float)
    difference = np.abs(np.asarray(preview) - picture).mean()
    assert difference < 0.5 * np.abs(picture - picture.mean(axis=(0, 1))).mean()


def test_explained_variance_is_1_for_the_truth_and_0_for_its_mean():
    truth = np.random.default_rng(0).normal(size=(2, 3, 4, 4)).astype(np.float32)
    truth[:, 1] += 10  # another channel's mean explains nothing
    mean = np.broadcast_to(truth.mean(axis=(0, 2, 3), keepdims=True), truth.shape)

    assert explained_variance(truth, truth) == 1
    assert explained_variance(mean, truth) == pytest.approx(0, abs=1e-6)
    assert explained_variance(2 * truth - mean, truth) == pytest.approx(0, abs=1e-6)
    assert explained_variance(3 * truth - 2 * mean, truth) == pytest.approx(-3, abs=1e-5)
