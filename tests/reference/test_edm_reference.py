"""Small checkpoints of EDM against diffusers' pipelines with its EDM schedulers, and the paper."""

import math

import numpy as np
import pytest
import torch
from diffusers import (
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from tests.reference.small_families import (
    PLAYGROUND,
    open_folder_networks,
    open_networks,
    state_dict,
)
from tests.reference.test_families_reference import (
    COMMON,
    PROMPT,
    SEED,
    as_arrays,
    diffusers_xl_pipeline,
    generate,
    lowest_psnr,
    noise,
    photo,
    sources_of,
)

pytestmark = [
    pytest.mark.reference,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

SCHEDULERS = {"dpmpp_2m": EDMDPMSolverMultistepScheduler, "euler": EDMEulerScheduler}


def playground_pipeline(folder, scheduler, kind=StableDiffusionXLPipeline):
    state = state_dict(PLAYGROUND)
    pipeline = diffusers_xl_pipeline(kind, PLAYGROUND, state, folder)
    autoencoder = PLAYGROUND.autoencoder
    pipeline.vae.register_to_config(
        scaling_factor=autoencoder.latent_scale_factor,
        latents_mean=list(autoencoder.latents_mean),
        latents_std=list(autoencoder.latents_std),
    )
    pipeline.scheduler = scheduler
    return pipeline


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler"])
@pytest.mark.parametrize("schedule", ["karras", "exponential"])
def test_playground_generates_the_images_of_diffusers(tmp_path, sampler, schedule):
    theirs = playground_pipeline(tmp_path, SCHEDULERS[sampler](sigma_schedule=schedule))
    ours = open_networks(state_dict(PLAYGROUND))
    expected = theirs(PROMPT, latents=noise(ours, 2), num_images_per_prompt=2, **COMMON)
    names = {"sampler": sampler, "schedule": schedule}

    images = generate(ours, prompt=PROMPT, num_images=2, **names, **COMMON)

    assert ours.spec.family == "playground-v2.5"
    psnr = lowest_psnr(images, as_arrays(expected.images))
    print("psnr", psnr)
    assert psnr >= 60
