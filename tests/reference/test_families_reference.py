"""Small checkpoints of every family of Stable Diffusion against diffusers' pipeline over the same.

diffusers translates the checkpoint with its own single-file loader. Ours is detected as an export
would detect it; the networks run in torch behind the runtime's loop. That graphs compute what torch
computes is measured at every export, and tested elsewhere.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from ldm_runtime.bundle.manifest import BuildRecord
from ldm_runtime.conditioning import open_tokenizer
from ldm_runtime.pipeline.deadline import Deadline
from ldm_runtime.pipeline.image_pipeline import ImagePipeline
from ldm_runtime.requests.request import GenerationRequest
from ldm_runtime.requests.resolution import resolve
from tests.reference.small_families import SD_2, open_networks, state_dict
from tests.reference.twins import (
    TRAINED,
    VOCABULARY,
    clip_tokenizer,
    compvis_config,
    load_autoencoder,
    load_text_encoder,
    load_unet,
)

pytestmark = [
    pytest.mark.reference,
    # torch's __array__ lacks NumPy 2's `copy`, and diffusers passes tensors to np.array.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

PROMPT = "a large red circle left of a small blue square"
SEED, SIDE = 7, 64
COMMON = {
    "negative_prompt": "blurry, a dog",
    "num_inference_steps": 6,
    "guidance_scale": 5.0,
    "height": SIDE,
    "width": SIDE,
}


def ddim(prediction_type):
    return DDIMScheduler(
        **TRAINED, set_alpha_to_one=False, clip_sample=False, prediction_type=prediction_type
    )


def without_safety(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def noise(model, count=1):
    shape = (1, model.spec.autoencoder.embed_dim, *2 * [SIDE // model.spec.autoencoder.factor])
    return torch.cat(
        [
            torch.randn(shape, generator=torch.Generator().manual_seed(SEED + index))
            for index in range(count)
        ]
    )


def generate(model, **fields):
    """Return the images of ours as arrays (N, H, W, 3) of whole numbers, 0 to 255."""
    request = resolve(GenerationRequest(sampler="ddim", seed=SEED, **fields), model.spec)
    pipeline = ImagePipeline(
        network=model.network,
        tokenizer=open_tokenizer(VOCABULARY, model.spec),
        spec=model.spec,
        bundle_sha256="",
        build=BuildRecord(checkpoint="", checkpoint_sha256="", versions={}, seconds=0.0),
    )
    *_, result = pipeline.stream(request, None, Deadline(None), batch_size=request.num_images)
    return as_arrays(result.images)


def as_arrays(images):
    return np.stack([np.asarray(image, dtype=np.float64) for image in images])


def lowest_psnr(ours, theirs):
    """Return the PSNR in dB of the image that differs most; a flat image is not worth comparing."""
    assert ours.shape == theirs.shape
    assert theirs.std(axis=(1, 2, 3)).min() > 25
    error = np.square(ours - theirs).mean(axis=(1, 2, 3)).max()
    return 10 * math.log10(255**2 / error) if error else math.inf


@pytest.fixture
def tokenizer(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    return clip_tokenizer(tmp_path / "tokenizer")


def stable_diffusion_2(family, state, tokenizer, folder, prediction_type):
    config = compvis_config(family.unet, family.autoencoder)
    (text,) = family.text_encoders.values()
    tokenizer.pad_token = "!"
    return without_safety(
        StableDiffusionPipeline(
            vae=load_autoencoder(state, config),
            text_encoder=load_text_encoder(
                state, replace(text, num_layers=text.context_layers), folder
            ),
            tokenizer=tokenizer,
            unet=load_unet(state, config),
            scheduler=ddim(prediction_type),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    )


@pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon"])
def test_stable_diffusion_2_draws_the_images_of_diffusers(tmp_path, tokenizer, prediction_type):
    state = state_dict(SD_2)
    theirs = stable_diffusion_2(SD_2, state, tokenizer, tmp_path, prediction_type)
    ours = open_networks(state, measured=prediction_type)
    expected = theirs(PROMPT, latents=noise(ours, 2), num_images_per_prompt=2, **COMMON)

    images = generate(ours, prompt=PROMPT, num_images=2, **COMMON)

    assert ours.spec.family == "stable-diffusion-2"
    assert lowest_psnr(images, as_arrays(expected.images)) >= 60
