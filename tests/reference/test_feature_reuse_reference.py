"""Feature reuse against DeepCache over diffusers' modules, for whole runs of the sampler."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from ldm_export.detection.overrides import Overrides
from released.compvis_files import compvis_config
from tests.export.small_checkpoint import TEXT_ENCODER, UNET
from tests.export.small_systems import SIZE, small_system
from tests.reference.deep_cache import DeepCache
from tests.reference.small_families import SD_2, SmallFamily, open_networks, state_dict
from tests.reference.small_pipelines import COMMON, PROMPT, diffusers_pipeline, noise, result_of
from tests.reference.twins import load_unet

pytestmark = [
    pytest.mark.reference,
    # torch's __array__ lacks NumPy 2's `copy`, and diffusers passes tensors to np.array.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

#: As deep as the released one: two residual blocks per level, all of which attend to the prompt.
SD_1 = SmallFamily(
    unet=replace(UNET, num_res_blocks=2, transformer_depth=(1, 1)),
    text_encoders={"cond_stage_model.transformer.": TEXT_ENCODER},
)


def psnr(ours, theirs):
    """Return the PSNR in dB of latents, whose peak is the largest value."""
    error = float(np.square(ours - theirs).mean())
    return 20 * math.log10(float(np.abs(theirs).max())) - 10 * math.log10(error)


def reusing(state, blocks, **stated):
    return open_networks(state, measured="epsilon", overrides=Overrides(reuse=blocks, **stated))


@pytest.mark.parametrize(
    ("family", "blocks", "interval"),
    [(SD_1, 1, 3), (SD_1, 2, 2), (SD_1, 3, 3), (SD_1, 3, 1), (SD_2, 2, 3)],
)
def test_stable_diffusion_reuses_features_as_deep_cache_does(tmp_path, family, blocks, interval):
    state = state_dict(family)
    theirs = diffusers_pipeline(StableDiffusionPipeline, family, state, tmp_path)
    cached = DeepCache(theirs.unet, interval, blocks)
    ours = reusing(state, blocks)
    expected = theirs(PROMPT, latents=noise(ours), output_type="latent", **COMMON).images
    fields = {"prompt": PROMPT, **COMMON}

    result = result_of(ours, reuse=f"deep:{interval}", **fields)

    assert cached.calls == COMMON["num_inference_steps"]
    assert psnr(result.latents, expected.numpy()) >= 60
    if interval > 1:
        assert psnr(result_of(ours, **fields).latents, expected.numpy()) < 60


@pytest.mark.parametrize(("blocks", "interval"), [(1, 2), (2, 3)])
def test_a_class_conditional_model_reuses_features_as_deep_cache_does(blocks, interval):
    """The two samples of guidance are one batch, of which each has features of its own."""
    system = small_system("class-guided")
    ours = reusing(system.state, blocks, height=SIZE, width=SIZE, num_heads=1)
    unet = load_unet(system.state, compvis_config(ours.spec.unet, ours.spec.autoencoder))
    DeepCache(unet, interval, blocks)
    table = system.state["cond_stage_model.embedding.weight"]
    context = torch.stack([table[1000:1001], table[3:4]])
    alphas = torch.tensor(ours.spec.alphas_cumprod, dtype=torch.float64)
    betas = 1 - alphas / torch.cat([torch.ones(1, dtype=torch.float64), alphas[:-1]])
    scheduler = DDIMScheduler(
        trained_betas=betas.tolist(),
        timestep_spacing="leading",
        steps_offset=1,
        set_alpha_to_one=False,
        clip_sample=False,
    )
    scheduler.set_timesteps(6)
    latents = noise(ours)
    with torch.inference_mode():
        for timestep in scheduler.timesteps:
            (both,) = unet(torch.cat([latents] * 2), timestep, context, return_dict=False)
            uncond, cond = both.chunk(2)
            guided = uncond + 3.0 * (cond - uncond)
            latents = scheduler.step(guided, timestep, latents).prev_sample
    fields = {"class_label": 3, "guidance_scale": 3.0, "num_inference_steps": 6, "eta": 0.0}
    fields |= {"schedule": "leading", "height": SIZE, "width": SIZE}

    result = result_of(ours, reuse=f"deep:{interval}", **fields)

    assert psnr(result.latents, latents.numpy()) >= 60
    assert psnr(result_of(ours, **fields).latents, latents.numpy()) < 60
