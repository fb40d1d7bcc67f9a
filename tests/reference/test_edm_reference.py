"""Small checkpoints of EDM against diffusers' pipelines with its schedulers of EDM."""

import numpy as np
import pytest
import torch
from diffusers import (
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInstructPix2PixPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from ldm_export.detection.inspection import inspect_checkpoint
from tests.reference.small_families import (
    COSXL,
    COSXL_EDIT,
    PLAYGROUND,
    open_folder_networks,
    open_networks,
    state_dict,
)
from tests.reference.small_pipelines import (
    COMMON,
    PROMPT,
    SEED,
    as_arrays,
    diffusers_xl_pipeline,
    generate,
    lowest_psnr,
    noise,
    photo,
    result_of,
    sources_of,
)

pytestmark = [
    pytest.mark.reference,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

SCHEDULERS = {"dpmpp_2m": EDMDPMSolverMultistepScheduler, "euler": EDMEulerScheduler}
NOISE_OF_COSXL = {"sigma_max": 120.0, "sigma_data": 1.0, "prediction_type": "v_prediction"}


def pipeline_of(family, folder, scheduler, kind=StableDiffusionXLPipeline, **options):
    pipeline = diffusers_xl_pipeline(kind, family, state_dict(family), folder, **options)
    autoencoder = family.autoencoder
    statistics = {
        "latents_mean": list(autoencoder.latents_mean) or None,
        "latents_std": list(autoencoder.latents_std) or None,
    }
    pipeline.vae.register_to_config(scaling_factor=autoencoder.latent_scale_factor, **statistics)
    pipeline.scheduler = scheduler
    return pipeline


@pytest.mark.parametrize(
    ("sampler", "schedule"), [("dpmpp_2m", "karras"), ("euler", "exponential")]
)
def test_playground_generates_the_images_of_diffusers(tmp_path, compare, sampler, schedule):
    theirs = pipeline_of(PLAYGROUND, tmp_path, SCHEDULERS[sampler](sigma_schedule=schedule))
    ours = open_networks(state_dict(PLAYGROUND))
    expected = theirs(PROMPT, latents=noise(ours, 2), num_images_per_prompt=2, **COMMON)
    names = {"sampler": sampler, "schedule": schedule}

    compare(
        *("playground-v2.5", ours, as_arrays(expected.images)),
        prompt=PROMPT,
        num_images=2,
        **names,
        **COMMON,
    )


def test_playground_changes_an_image_as_diffusers_does(tmp_path, monkeypatch):
    monkeypatch.setattr(
        DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode()
    )
    kind = StableDiffusionXLImg2ImgPipeline
    theirs = pipeline_of(PLAYGROUND, tmp_path, EDMEulerScheduler(), kind)
    ours, (image, _) = open_networks(state_dict(PLAYGROUND)), photo()
    common = {name: value for name, value in COMMON.items() if name not in ("height", "width")}
    fields = {"image": image, "strength": 0.5, **common}
    expected = theirs(PROMPT, generator=torch.Generator().manual_seed(SEED), **fields)

    images = generate(ours, prompt=PROMPT, sampler="euler", **fields)

    assert lowest_psnr(images, as_arrays(expected.images)) >= 60


def test_a_folder_of_playground_is_read_by_its_scheduler_and_its_autoencoder(tmp_path):
    theirs = pipeline_of(PLAYGROUND, tmp_path, EDMDPMSolverMultistepScheduler())
    theirs.save_pretrained(tmp_path / "folder")
    ours = open_folder_networks(tmp_path / "folder")
    expected = theirs(PROMPT, latents=noise(ours), **COMMON)

    images = generate(ours, prompt=PROMPT, sampler="dpmpp_2m", **COMMON)

    report = inspect_checkpoint(tmp_path / "folder")
    assert report["edm"] == {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5}
    assert report["num_train_timesteps"] is None
    assert ours.spec.family == "playground-v2.5"
    assert sources_of(ours.spec)["edm.sigma_data"] == "file"
    assert sources_of(ours.spec)["autoencoder.latents_mean"] == "file"
    assert lowest_psnr(images, as_arrays(expected.images)) >= 60


def test_cosxl_generates_the_images_of_diffusers(tmp_path, compare):
    scheduler = EDMDPMSolverMultistepScheduler(sigma_schedule="exponential", **NOISE_OF_COSXL)
    theirs = pipeline_of(COSXL, tmp_path, scheduler)
    ours = open_networks(state_dict(COSXL))
    expected = theirs(PROMPT, latents=noise(ours), **COMMON)

    compare(
        *("cosxl", ours, as_arrays(expected.images)),
        prompt=PROMPT,
        sampler="dpmpp_2m",
        **COMMON,
    )


@pytest.mark.parametrize("changes", [{}, {"image_guidance_scale": 1.0}])
def test_cosxl_edit_edits_as_diffusers_does(tmp_path, compare, changes):
    scheduler = EDMEulerScheduler(sigma_schedule="exponential", **NOISE_OF_COSXL)
    kind = StableDiffusionXLInstructPix2PixPipeline
    theirs = pipeline_of(COSXL_EDIT, tmp_path, scheduler, kind, is_cosxl_edit=True)
    ours, (image, _) = open_networks(state_dict(COSXL_EDIT)), photo()
    fields = {"image": image, "image_guidance_scale": 1.5, **COMMON, **changes}
    expected = theirs(PROMPT, latents=noise(ours), **fields)

    assert ours.spec.scales_image
    compare(
        *("cosxl-edit", ours, as_arrays(expected.images)),
        prompt=PROMPT,
        sampler="euler",
        **fields,
    )


def test_a_run_of_edm_stops_and_goes_on_in_the_middle_of_the_range_of_log_sigma():
    ours = open_networks(state_dict(COSXL))
    fields = {"prompt": PROMPT, "sampler": "euler", **COMMON}
    whole = result_of(ours, **fields)

    first = result_of(ours, denoising_end=0.5, **fields)
    second = result_of(ours, denoising_start=0.5, latents=first.latents, **fields)

    assert lowest_psnr(as_arrays(second.images), as_arrays(whole.images)) >= 60
    assert np.abs(first.latents - second.latents).max() > 0.1
