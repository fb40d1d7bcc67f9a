"""Guidance against diffusers' own arithmetic, in float64: the sum and its rescaling."""

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from ldm_runtime.pipeline.denoiser import GuidedDenoiser

pytestmark = pytest.mark.reference

TOLERANCE = 1e-12
SHAPE = (3, 4, 8, 8)
RNG = np.random.default_rng(0)
# Images of different spread and mean, so that scaling them together would be seen.
UNCOND = RNG.standard_normal(SHAPE) * np.array([0.3, 1.0, 5.0])[:, None, None, None]
COND = UNCOND + 0.4 * RNG.standard_normal(SHAPE) + 0.1
LATENTS = RNG.standard_normal(SHAPE)
CONTEXT = np.zeros((6, 2, 3))


def ours(guidance_scale, guidance_rescale, prediction=(UNCOND, COND)):
    denoise = GuidedDenoiser(
        network=lambda *_: np.concatenate(prediction),
        training_sigmas=np.geomspace(0.03, 15.0, 12),
        context=CONTEXT,
        guidance_scale=guidance_scale,
        prediction_type="sample",  # which returns the guided prediction itself
        guidance_rescale=guidance_rescale,
    )
    return denoise(LATENTS, 1.0)


def theirs(guidance_scale, guidance_rescale):
    uncond, cond = torch.from_numpy(UNCOND), torch.from_numpy(COND)
    guided = uncond + guidance_scale * (cond - uncond)
    return rescale_noise_cfg(guided, cond, guidance_rescale=guidance_rescale).numpy()


def difference(result, expected):
    return np.abs(result - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("guidance_rescale", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("guidance_scale", [0.0, 1.5, 7.5, 30.0])
def test_guidance_and_its_rescaling_are_those_of_diffusers(guidance_scale, guidance_rescale):
    result = ours(guidance_scale, guidance_rescale)

    assert result.dtype == np.float64
    assert difference(result, theirs(guidance_scale, guidance_rescale)) < TOLERANCE


def test_the_comparison_notices_swapped_halves():
    swapped = ours(7.5, 0.7, prediction=(COND, UNCOND))

    assert difference(swapped, theirs(7.5, 0.7)) > 0.01
