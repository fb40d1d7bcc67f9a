"""Latent consistency models, whose UNet takes the guidance scale, against diffusers' pipelines."""

import numpy as np
import pytest
import torch
from diffusers import (
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

from ldm_export.intake.unet_names import UNET_PREFIX, unet_names
from ldm_runtime.conditioning.embedded_guidance import guidance_features
from tests.reference.diffusers_folder import randomised
from tests.reference.small_families import (
    SD_1,
    SDXL,
    open_folder_networks,
    open_networks,
    state_dict,
)
from tests.reference.small_pipelines import (
    PROMPT,
    SEED,
    SIDE,
    as_arrays,
    diffusers_pipeline,
    diffusers_xl_pipeline,
    generate,
    lowest_psnr,
)
from tests.reference.test_distilled_reference import small_model
from tests.reference.twins import TRAINED

pytestmark = [
    pytest.mark.reference,
    # torch's __array__ lacks NumPy 2's `copy`, and diffusers passes tensors to np.array.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

SIZE = {"height": SIDE, "width": SIDE}
TRAINED_WITH = {name: TRAINED[name] for name in ("beta_start", "beta_end", "beta_schedule")}
FEATURES = 32


def with_guidance_input(unet):
    """Return a UNet of diffusers with the same weights, and a projection of the guidance scale."""
    torch.manual_seed(13)
    taught = UNet2DConditionModel.from_config(unet.config, time_cond_proj_dim=FEATURES)
    randomised(taught)
    lost = taught.load_state_dict(unet.state_dict(), strict=False)
    assert lost.missing_keys == ["time_embedding.cond_proj.weight"]
    # As large as the features of the timestep, so that the scale matters.
    taught.time_embedding.cond_proj.weight.normal_(std=0.3)
    return taught


def small_lcm(folder):
    """Return the tensors of a small Stable Diffusion 1, and diffusers' pipeline as an LCM."""
    state = state_dict(SD_1)
    original = diffusers_pipeline(StableDiffusionPipeline, SD_1, state, folder)
    pipeline = LatentConsistencyModelPipeline(
        vae=original.vae,
        text_encoder=original.text_encoder,
        tokenizer=original.tokenizer,
        unet=with_guidance_input(original.unet),
        scheduler=LCMScheduler(**TRAINED_WITH),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return state, pipeline


@pytest.mark.parametrize("guidance_scale", [1.0, 8.5])
def test_a_folder_that_diffusers_saved_generates_its_images(tmp_path, compare, guidance_scale):
    _, theirs = small_lcm(tmp_path)
    folder = tmp_path / "folder"
    theirs.save_pretrained(folder)
    ours = open_folder_networks(folder)
    generator = torch.Generator().manual_seed(SEED)
    expected = theirs(PROMPT, guidance_scale=guidance_scale, generator=generator, **SIZE)

    fields = {"prompt": PROMPT, "sampler": None, "guidance_scale": guidance_scale}
    compare("stable-diffusion-1-lcm", ours, as_arrays(expected.images), **fields, **SIZE)

    defaults = ours.spec.defaults
    assert (defaults.sampler, defaults.num_inference_steps, defaults.guidance_scale) == (
        "lcm",
        4,
        8.5,
    )


def test_the_guidance_scale_changes_the_image(tmp_path):
    _, theirs = small_lcm(tmp_path)
    theirs.save_pretrained(tmp_path / "folder")
    ours = open_folder_networks(tmp_path / "folder")

    first, second = (
        generate(ours, prompt=PROMPT, sampler=None, guidance_scale=scale, **SIZE)
        for scale in (1.0, 1.02)
    )

    assert lowest_psnr(first, second) < 40


def test_a_single_file_with_the_tensor_of_diffusers_generates_its_images(tmp_path):
    state, theirs = small_lcm(tmp_path)
    unet = theirs.unet.state_dict()
    renamed = {new: unet[name] for name, new in unet_names(unet).items()}
    ours = open_networks(state | renamed)
    generator = torch.Generator().manual_seed(SEED)
    expected = theirs(PROMPT, num_inference_steps=3, generator=generator, **SIZE)

    images = generate(ours, prompt=PROMPT, sampler=None, num_inference_steps=3, **SIZE)

    assert f"{UNET_PREFIX}time_embedding.cond_proj.weight" in renamed
    assert ours.spec.family == "stable-diffusion-1-lcm"
    assert lowest_psnr(images, as_arrays(expected.images)) >= 60


def small_sdxl(folder):
    return diffusers_xl_pipeline(StableDiffusionXLPipeline, SDXL, state_dict(SDXL), folder)


@pytest.mark.parametrize(
    ("name", "opened"),
    [
        ("stable-diffusion-xl-lcm", small_sdxl),
        ("ssd-1b-lcm", lambda folder: small_model("ssd-1b", folder)[1]),
    ],
)
def test_sdxl_as_a_latent_consistency_model_generates_the_images_of_diffusers(
    tmp_path, compare, name, opened
):
    theirs = opened(tmp_path)
    theirs.register_modules(
        unet=with_guidance_input(theirs.unet), scheduler=LCMScheduler(**TRAINED_WITH)
    )
    folder = tmp_path / "folder"
    theirs.save_pretrained(folder)
    ours = open_folder_networks(folder)
    generator = torch.Generator().manual_seed(SEED)
    expected = theirs(
        PROMPT, guidance_scale=6.0, num_inference_steps=4, generator=generator, **SIZE
    )

    fields = {"prompt": PROMPT, "sampler": None, "guidance_scale": 6.0}
    compare(name, ours, as_arrays(expected.images), **fields, **SIZE)


@pytest.mark.parametrize("count", [256, 32, 7])
@pytest.mark.parametrize("guidance_scale", [0.0, 1.0, 1.5, 8.5])
def test_features_of_the_guidance_scale_are_those_of_diffusers(guidance_scale, count):
    """In float32 the angles, up to 7500, are known to a few ten-thousandths."""
    embed = LatentConsistencyModelPipeline.get_guidance_scale_embedding
    expected = embed(None, torch.tensor([guidance_scale - 1.0]), embedding_dim=count)

    features = guidance_features(guidance_scale, count)

    assert features.dtype == np.float32
    np.testing.assert_allclose(features, expected.numpy(), atol=1e-3)
