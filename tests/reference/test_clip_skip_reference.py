"""Skipped layers of the text encoder against diffusers' `clip_skip`, with and without final norm.

The bundle of Stable Diffusion 1 runs its ONNX graphs; the others' networks run in torch. diffusers
skips no layers of the negative prompt; here, as in the web UI, both prompts skip them, so that it
is given the negative prompt encoded as a prompt.
"""

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from ldm_runtime import Generator
from tests.reference.small_families import SD_2, SDXL, open_networks, state_dict
from tests.reference.small_pipelines import (
    COMMON,
    PROMPT,
    SEED,
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
    pytest.mark.slow,
    # torch's __array__ lacks NumPy 2's `copy`, and diffusers passes tensors to np.array.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]


FIELDS = {name: value for name, value in COMMON.items() if name != "negative_prompt"}


def expected_images(pipeline, latents):
    """diffusers' images with one layer skipped, of the negative prompt too."""
    names = ["negative_prompt_embeds", None, "negative_pooled_prompt_embeds", None]
    with pytest.MonkeyPatch.context() as patch:
        # diffusers looks for the final LayerNorm one level deeper than transformers 5 has it.
        if not hasattr(pipeline.text_encoder, "text_model"):
            kind = type(pipeline.text_encoder)
            patch.setattr(kind, "text_model", property(lambda self: self), raising=False)
        found = pipeline.encode_prompt(
            COMMON["negative_prompt"],
            device="cpu",
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
            clip_skip=1,
        )
        negative = {name: value for name, value in zip(names, found, strict=False) if name}
        output = pipeline(PROMPT, clip_skip=1, latents=latents, **negative, **FIELDS)
    return as_arrays(output.images)


def test_stable_diffusion_1_normalises_an_earlier_layer_as_diffusers_does(
    pipeline, small_bundle_fp32
):
    pipeline.scheduler = SCHEDULERS["ddim"]
    start = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(SEED))
    expected = expected_images(pipeline, start)

    with Generator(small_bundle_fp32, backend="onnxruntime", threads=1) as generator:
        images, others = (
            as_arrays(generator(PROMPT, clip_skip=skip, seed=SEED, sampler="ddim", **COMMON).images)
            for skip in (1, 0)
        )

    assert lowest_psnr(images, expected) >= 60
    assert lowest_psnr(others, expected) < 40


@pytest.mark.parametrize(
    ("family", "kind", "pipeline_of"),
    [
        (SD_2, StableDiffusionPipeline, diffusers_pipeline),
        (SDXL, StableDiffusionXLPipeline, diffusers_xl_pipeline),
    ],
    ids=["stable-diffusion-2", "stable-diffusion-xl"],
)
def test_openclip_and_sdxl_skip_the_layers_that_diffusers_skips(
    tmp_path, family, kind, pipeline_of
):
    state = state_dict(family)
    theirs, ours = pipeline_of(kind, family, state, tmp_path), open_networks(state)
    theirs.scheduler.register_to_config(prediction_type=ours.spec.prediction_type)
    expected = expected_images(theirs, noise(ours))

    images = generate(ours, prompt=PROMPT, clip_skip=1, **COMMON)

    assert lowest_psnr(images, expected) >= 60
    assert lowest_psnr(generate(ours, prompt=PROMPT, **COMMON), expected) < 40
