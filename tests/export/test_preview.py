import dataclasses
import logging

import numpy as np
import pytest

from ldm_export.golden.images import make_images
from ldm_export.golden.preview import fit_preview, write_pairs
from ldm_export.graphs.torch_engine import TorchEngine
from ldm_runtime.latents.previews import explained_variance, preview_pixels
from ldm_runtime.testing import FakeEngine
from tests.export.small_checkpoint import random_networks
from tests.export.small_spec import SPEC

#: f = 4, and latents that are an exact linear map of the colours when they are made by `linear`.
MATRIX = np.array([[1.0, 0.5, 0.0], [0.0, -2.0, 1.0], [0.3, 0.3, 0.3], [0.0, 0.0, 1.0]])
BIAS = MATRIX @ [0.5, -0.25, 0.1]  # of a colour, which no map without a bias can take away
SCALE = SPEC.autoencoder.latent_scale_factor


def averaged(image, factor=4):
    batch, channels, height, width = image.shape
    blocks = image.reshape(batch, channels, height // factor, factor, width // factor, factor)
    return blocks.mean(axis=(3, 5))


def as_image(pixels):
    """Pictures as the encoder takes them."""
    return pixels.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(127.5) - 1


def linear(inputs):
    """An encoder whose mean is a linear map of the averaged colours; its variance is nonsense."""
    mean = np.einsum("lc,bchw->blhw", MATRIX, averaged(inputs["image"])) + BIAS[:, None, None]
    return {"moments": np.concatenate([mean, 100 + mean**3], axis=1).astype(np.float32)}


def fit(function, folder, spec=SPEC):
    write_pairs(folder / "preview.npz", FakeEngine(function), spec)
    return fit_preview(folder / "preview.npz")


def test_an_encoder_that_is_linear_is_inverted_in_the_unets_scale(tmp_path):
    record = fit(linear, tmp_path)

    colours = np.random.default_rng(0).uniform(-1, 1, (1, 3, 5, 7)).astype(np.float32)
    mean = np.einsum("lc,bchw->blhw", MATRIX, colours) + BIAS[:, None, None]
    latents = (mean * SCALE).astype(np.float32)
    np.testing.assert_allclose(preview_pixels(latents, record), colours, atol=1e-4)
    assert record.r2 == pytest.approx(1, abs=1e-6)


def test_r2_is_measured_on_pictures_that_the_fit_has_not_seen(tmp_path):
    seen = []

    def forgetful(inputs):
        """Linear for the pictures of the fit, without any sense for the others."""
        seen.append(inputs["image"])
        sign = 1 if len(seen) <= 4 else -1
        return {"moments": sign * linear(inputs)["moments"]}

    record = fit(forgetful, tmp_path)

    assert len(seen) == 6
    assert record.r2 < 0


def test_the_fit_is_the_best_of_its_kind_on_the_pictures_it_saw(tmp_path):
    write_pairs(tmp_path / "preview.npz", TorchEngine("vae_encoder", encoder()), SPEC)
    record = fit_preview(tmp_path / "preview.npz")
    with np.load(tmp_path / "preview.npz") as file:
        latents, colours = file["latents"][:-2], file["colours"][:-2]
    best = explained_variance(preview_pixels(latents, record), colours)
    (red, *others), (bias, *rest) = record.matrix, record.bias
    worse = [
        dataclasses.replace(record, matrix=((red[0] + step, *red[1:]), *others))
        for step in (0.05, -0.05)
    ] + [dataclasses.replace(record, bias=(bias + step, *rest)) for step in (0.05, -0.05)]

    assert best >= 0
    for each in worse:
        assert explained_variance(preview_pixels(latents, each), colours) < best


def test_what_is_stored_is_the_posteriors_mean_and_the_averaged_picture(tmp_path):
    network = encoder()

    write_pairs(tmp_path / "preview.npz", TorchEngine("vae_encoder", network), SPEC)

    image = as_image(make_images(128)[3:4])
    moments = TorchEngine("vae_encoder", network).run({"image": image})["moments"]
    with np.load(tmp_path / "preview.npz", allow_pickle=False) as file:
        np.testing.assert_allclose(file["colours"][3], averaged(image)[0], atol=1e-6)
        np.testing.assert_allclose(file["latents"][3], moments[0, :4] * SCALE, atol=1e-4)


@pytest.mark.parametrize("channels", [3, 16])
def test_the_latents_of_a_codebook_are_taken_as_they_are(channels, tmp_path):
    """No half of the encoder's output is a variance, and any number of channels can be fitted."""
    rng = np.random.default_rng(1)
    matrix = rng.standard_normal((channels, 3))
    autoencoder = dataclasses.replace(
        SPEC.autoencoder, kind="vq", z_channels=channels, embed_dim=channels, codebook_size=32
    )

    def quantisable(inputs):
        latents = np.einsum("lc,bchw->blhw", matrix, averaged(inputs["image"]))
        return {"moments": latents.astype(np.float32)}

    record = fit(quantisable, tmp_path, SPEC.with_networks(autoencoder=autoencoder))

    assert [len(row) for row in record.matrix] == [channels] * 3
    assert record.r2 == pytest.approx(1, abs=1e-5)
    inverse = np.array(record.matrix) * autoencoder.latent_scale_factor @ matrix
    np.testing.assert_allclose(inverse, np.eye(3), atol=1e-3)


@pytest.mark.parametrize(("levels", "side"), [(2, 64), (3, 128), (4, 256), (5, 256)])
def test_pictures_are_at_most_256_pixels_a_side(levels, side, tmp_path):
    autoencoder = dataclasses.replace(SPEC.autoencoder, channel_mult=(1,) * levels)
    seen = []

    def remember(inputs):
        seen.append(inputs["image"].shape)
        latent = side // autoencoder.factor
        return {"moments": np.ones((1, 8, latent, latent), np.float32)}

    fit(remember, tmp_path, SPEC.with_networks(autoencoder=autoencoder))

    assert seen == [(1, 3, side, side)] * 6


def test_latents_that_say_nothing_give_a_map_that_explains_nothing(tmp_path):
    def blind(inputs):
        return {"moments": np.zeros_like(linear(inputs)["moments"])}

    record = fit(blind, tmp_path)

    assert np.abs(record.matrix).max() < 1e-6
    assert record.r2 <= 0


def test_latents_that_are_not_numbers_give_no_preview_and_a_warning(tmp_path, caplog):
    def broken(inputs):
        return {"moments": np.full_like(linear(inputs)["moments"], np.nan)}

    with caplog.at_level(logging.WARNING):
        record = fit(broken, tmp_path)

    assert record is None
    assert "there will be no previews" in caplog.text


def test_pictures_are_the_same_every_time_and_full_of_colour():
    first, second = make_images(64), make_images(64)

    assert np.array_equal(first, second)
    assert first.shape == (6, 64, 64, 3)
    assert first.dtype == np.uint8
    for image in first:  # every picture has smooth parts, saturated ones and sharp edges
        steps = np.abs(np.diff(image.astype(int), axis=1)).max(axis=2)
        assert np.isin(image, (0, 255)).all(axis=2).mean() > 0.05
        assert ((steps > 0) & (steps < 13)).mean() > 0.2
        assert (steps > 64).mean() > 0.01


def test_colours_of_the_pictures_do_not_depend_on_their_size():
    small, large = as_image(make_images(64)), as_image(make_images(256))
    small, large = averaged(small, 8), averaged(large, 32)

    assert explained_variance(small, large) > 0.95


def encoder():
    return random_networks().vae_encoder
