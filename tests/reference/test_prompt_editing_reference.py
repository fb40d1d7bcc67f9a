"""Prompts that change between steps against a plain loop over diffusers' networks.

The loop takes the embeddings of a text for every step, as they are listed here by hand.
"""

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image

from tests.reference.small_families import SD_2, SDXL, open_networks, state_dict
from tests.reference.small_pipelines import (
    COMMON,
    SIDE,
    as_arrays,
    diffusers_pipeline,
    diffusers_xl_pipeline,
    generate,
    lowest_psnr,
    noise,
)
from tests.reference.twins import SCHEDULERS

pytestmark = [
    pytest.mark.reference,
    # torch's __array__ lacks NumPy 2's `copy`, and diffusers passes tensors to np.array.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

STEPS, SCALE = COMMON["num_inference_steps"], COMMON["guidance_scale"]
A, B = "a large red circle", "a small blue square"
#: A prompt, a negative prompt, and what both are in each of six steps.
CASES = [
    (f"[{A}:{B}:0.5]", "blurry", [A, A, A, B, B, B], ["blurry"] * 6),
    (f"[{A}:{B}:2]", "[blurry:a dog:5]", [A, A, B, B, B, B], ["blurry"] * 5 + ["a dog"]),
    (f"[{A}|{B}]", "[::3]", [A, B, A, B, A, B], [""] * 6),
    ("a [red|blue] circle", "blurry[, a dog:0.34]", None, ["blurry"] * 2 + ["blurry, a dog"] * 4),
]


def conditions(pipeline, text, negative_text):
    """Return the inputs of a UNet of Stable Diffusion 2, or of SDXL with its vector."""
    if isinstance(pipeline, StableDiffusionPipeline):
        cond, uncond = pipeline.encode_prompt(text, "cpu", 1, True, negative_text)
        return {"encoder_hidden_states": torch.cat([uncond, cond])}
    cond, uncond, pooled, negative_pooled = pipeline.encode_prompt(
        text, device="cpu", negative_prompt=negative_text
    )
    sizes = torch.tensor([[SIDE, SIDE, 0, 0, SIDE, SIDE]] * 2)
    return {
        "encoder_hidden_states": torch.cat([uncond, cond]),
        "added_cond_kwargs": {
            "text_embeds": torch.cat([negative_pooled, pooled]),
            "time_ids": sizes,
        },
    }


@torch.no_grad()
def plain_loop(pipeline, prompts, negative_prompts, latents):
    """Return the image that a pipeline's networks generate from one pair of texts per step."""
    scheduler = pipeline.scheduler
    scheduler.set_timesteps(STEPS)
    latents = latents * scheduler.init_noise_sigma
    for timestep, *texts in zip(scheduler.timesteps, prompts, negative_prompts, strict=True):
        joined = scheduler.scale_model_input(torch.cat([latents] * 2), timestep)
        predicted = pipeline.unet(joined, timestep, **conditions(pipeline, *texts)).sample
        uncond, cond = predicted.chunk(2)
        latents = scheduler.step(uncond + SCALE * (cond - uncond), timestep, latents).prev_sample
    decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    pixels = ((decoded[0] / 2 + 0.5).clamp(0, 1) * 255).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_the_prompts_change_at_their_steps(tmp_path, sampler):
    state = state_dict(SD_2)
    theirs = diffusers_pipeline(StableDiffusionPipeline, SD_2, state, tmp_path)
    theirs.scheduler = SCHEDULERS[sampler]
    ours = open_networks(state, measured="epsilon")
    fields = {**COMMON, "sampler": sampler}
    unedited = generate(ours, prompt=A, **fields)

    for prompt, negative, prompts, negatives in CASES:
        prompts = prompts or ["a red circle", "a blue circle"] * 3
        expected = as_arrays([plain_loop(theirs, prompts, negatives, noise(ours))])

        image = generate(ours, prompt=prompt, **fields | {"negative_prompt": negative})

        assert lowest_psnr(image, expected) >= 60, prompt
        assert lowest_psnr(unedited, expected) < 40, prompt


def test_both_text_encoders_of_sdxl_see_the_prompts_of_each_step(tmp_path):
    state = state_dict(SDXL)
    theirs = diffusers_xl_pipeline(StableDiffusionXLPipeline, SDXL, state, tmp_path)
    ours = open_networks(state)
    prompt, negative, prompts, negatives = CASES[1]
    expected = as_arrays([plain_loop(theirs, prompts, negatives, noise(ours))])

    image = generate(ours, prompt=prompt, **COMMON | {"negative_prompt": negative})

    assert lowest_psnr(image, expected) >= 60
    unedited = generate(ours, prompt=A, **COMMON | {"negative_prompt": "blurry"})
    assert lowest_psnr(unedited, expected) < 40
