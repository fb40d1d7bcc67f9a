"""Pictures that start from pictures, against the pipelines of diffusers over the same checkpoint.

Both sides get the same clean latents: ours are the mean of the posterior where diffusers draws from
it, so that they are handed to its image-to-image pipeline, which takes latents as they are.
"""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline

from ldm_runtime import Generator
from ldm_runtime.inputs.images import InputImage
from tests.export.small_checkpoint import AUTOENCODER
from tests.reference.test_pipeline_reference import (
    FIELDS,
    PROMPT,
    SEED,
    as_arrays,
    assert_worth_comparing,
    lowest_psnr,
)
from tests.reference.twins import SCHEDULERS

pytestmark = [
    pytest.mark.reference,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def generator(small_bundle_fp32):
    with Generator(small_bundle_fp32, backend="onnxruntime", threads=1) as generator:
        yield generator


@pytest.fixture(scope="module")
def picture():
    """Something coloured and smooth, 64 by 96 pixels."""
    y, x = np.mgrid[0:64, 0:96] / 16
    channels = [np.sin(x + 1), np.cos(y - x), np.sin(2 * y)]
    return np.rint(127.5 * (1 + np.stack(channels, axis=-1))).astype(np.uint8)


def clean_latents(generator, picture):
    return generator.encode(picture)


def test_the_mean_of_the_posterior_is_that_of_diffusers(pipeline, generator, picture):
    image = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 127.5 - 1

    with torch.no_grad():
        expected = pipeline.vae.encode(image).latent_dist.mean.numpy()

    ours = clean_latents(generator, InputImage.read(picture).pixels)
    scale = AUTOENCODER.latent_scale_factor
    np.testing.assert_allclose(ours, expected * scale, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("strength", [0.5, 0.84])
@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_image_to_image_draws_what_diffusers_draws(pipeline, generator, picture, sampler, strength):
    theirs = StableDiffusionImg2ImgPipeline(**pipeline.components, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    theirs.scheduler = SCHEDULERS[sampler]
    expected = as_arrays(
        theirs(
            PROMPT,
            image=torch.from_numpy(clean_latents(generator, picture)),
            strength=strength,
            generator=torch.Generator().manual_seed(SEED),
            **FIELDS,
        ).images
    )

    images = as_arrays(
        generator(
            PROMPT, image=picture, strength=strength, sampler=sampler, seed=SEED, **FIELDS
        ).images
    )

    assert_worth_comparing(expected)
    assert lowest_psnr(images, expected) >= 60
