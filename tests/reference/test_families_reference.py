"""Small checkpoints of every family of Stable Diffusion against diffusers' pipeline over the same.

diffusers translates the checkpoint with its own single-file loader. Ours is detected as an export
would detect it; the networks run in torch behind the runtime's loop. That graphs compute what torch
computes is measured at every export, and tested elsewhere.
"""

from functools import partial

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    StableDiffusionUpscalePipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLInstructPix2PixPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion_upscale
from PIL import Image

from ldm_runtime.conditioning.images import augmentation_alphas, augmentation_noise
from tests.reference.small_families import (
    INSTRUCT_PIX2PIX,
    SD_1,
    SD_1_INPAINTING,
    SD_2,
    SD_2_INPAINTING,
    SDXL,
    SDXL_INPAINTING,
    SDXL_INSTRUCT_PIX2PIX,
    SDXL_REFINER,
    X4_UPSCALER,
    open_folder_networks,
    open_networks,
    state_dict,
)
from tests.reference.small_pipelines import (
    COMMON,
    PROMPT,
    SEED,
    SIDE,
    as_arrays,
    ddim,
    diffusers_pipeline,
    diffusers_refiner_pipeline,
    diffusers_xl_pipeline,
    generate,
    lowest_psnr,
    noise,
    photo,
    result_of,
    sources_of,
)
from tests.reference.twins import (
    SCHEDULERS,
    TRAINED,
)

pytestmark = [
    pytest.mark.reference,
    # torch's __array__ lacks NumPy 2's `copy`, and diffusers passes tensors to np.array.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]


@pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon"])
def test_stable_diffusion_2_generates_the_images_of_diffusers(tmp_path, compare, prediction_type):
    state = state_dict(SD_2)
    theirs = diffusers_pipeline(StableDiffusionPipeline, SD_2, state, tmp_path, prediction_type)
    ours = open_networks(state, measured=prediction_type)
    expected = theirs(PROMPT, latents=noise(ours, 2), num_images_per_prompt=2, **COMMON)

    compare(
        *("stable-diffusion-2", ours, as_arrays(expected.images)),
        prompt=PROMPT,
        num_images=2,
        **COMMON,
    )


@pytest.mark.parametrize(
    ("name", "family", "prefix"),
    [
        ("stable-diffusion-1", SD_1, "cond_stage_model.transformer."),
        ("stable-diffusion-2-sgm", SD_2, "conditioner.embedders.0.model."),
    ],
)
def test_a_layout_generates_the_images_of_diffusers(tmp_path, compare, name, family, prefix):
    """That of Stability's generative-models has the text encoder of another under its own names."""
    state = state_dict(family)
    theirs = diffusers_pipeline(StableDiffusionPipeline, family, state, tmp_path)
    (known,) = family.text_encoders
    renamed = {key.replace(known, prefix): value for key, value in state.items()}
    ours = open_networks(renamed, measured="epsilon")
    expected = theirs(PROMPT, latents=noise(ours), **COMMON)

    compare(name, ours, as_arrays(expected.images), prompt=PROMPT, **COMMON)


@pytest.mark.parametrize("negative_prompt", [None, "blurry, a dog"])
def test_sdxl_generates_the_images_of_diffusers(tmp_path, compare, negative_prompt):
    """Without a negative prompt guidance steers away from zeros, with one from that."""
    state = state_dict(SDXL)
    theirs = diffusers_xl_pipeline(StableDiffusionXLPipeline, SDXL, state, tmp_path)
    ours = open_networks(state)
    fields = COMMON | {"negative_prompt": negative_prompt}
    expected = theirs(PROMPT, latents=noise(ours, 2), num_images_per_prompt=2, **fields)

    compare(
        *("stable-diffusion-xl", ours, as_arrays(expected.images)),
        prompt=PROMPT,
        num_images=2,
        **fields,
    )


def test_sdxl_generates_the_images_of_diffusers_that_it_is_told_are_cropped(tmp_path):
    state = state_dict(SDXL)
    theirs = diffusers_xl_pipeline(StableDiffusionXLPipeline, SDXL, state, tmp_path)
    ours = open_networks(state)
    sizes = {"original_size": (300, 500), "target_size": (96, 80)}
    expected = theirs(PROMPT, latents=noise(ours), crops_coords_top_left=(40, 7), **sizes, **COMMON)

    images = generate(ours, prompt=PROMPT, crop_top_left=(40, 7), **sizes, **COMMON)

    assert lowest_psnr(images, as_arrays(expected.images)) >= 60
    assert lowest_psnr(generate(ours, prompt=PROMPT, **COMMON), as_arrays(expected.images)) < 60


@pytest.mark.parametrize("share", [0.3, 0.8])
def test_a_run_stops_and_goes_on_where_diffusers_does(tmp_path, share):
    state = state_dict(SDXL)
    theirs = diffusers_xl_pipeline(StableDiffusionXLPipeline, SDXL, state, tmp_path)
    ours = open_networks(state)
    fields = {"latents": noise(ours, 2), "num_images_per_prompt": 2, **COMMON}
    expected = theirs(PROMPT, denoising_end=share, output_type="latent", **fields).images.numpy()
    whole = theirs(PROMPT, **fields)
    fields = {"prompt": PROMPT, "num_images": 2, **COMMON}

    first = result_of(ours, denoising_end=share, **fields)
    second = generate(ours, denoising_start=share, latents=first.latents, **fields)

    assert np.abs(first.latents - expected).max() / np.abs(expected).max() < 1e-4
    assert lowest_psnr(second, as_arrays(whole.images)) >= 60


def test_sdxl_changes_an_image_as_diffusers_does(tmp_path, monkeypatch):
    monkeypatch.setattr(
        DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode()
    )
    state = state_dict(SDXL)
    theirs = diffusers_xl_pipeline(StableDiffusionXLImg2ImgPipeline, SDXL, state, tmp_path)
    ours, (image, _) = open_networks(state), photo()
    common = {name: value for name, value in COMMON.items() if name not in ("height", "width")}
    fields = {"image": image, "strength": 0.5, "original_size": (90, 200), **common}
    expected = theirs(PROMPT, generator=torch.Generator().manual_seed(SEED), **fields)

    images = generate(ours, prompt=PROMPT, **fields)

    assert lowest_psnr(images, as_arrays(expected.images)) >= 60


@pytest.mark.parametrize("sizes", [{}, {"original_size": (SIDE, SIDE)}])
def test_the_second_pass_of_sdxl_is_that_of_diffusers(tmp_path, monkeypatch, sizes):
    monkeypatch.setattr(
        DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode()
    )
    state = state_dict(SDXL)
    theirs = diffusers_xl_pipeline(StableDiffusionXLImg2ImgPipeline, SDXL, state, tmp_path)
    ours, fields = open_networks(state), {"prompt": PROMPT, "noise": "torch-cpu", **COMMON}
    (small,) = result_of(ours, **fields).images
    large = small.resize((2 * SIDE, 2 * SIDE), Image.Resampling.LANCZOS)
    common = {name: value for name, value in COMMON.items() if name not in ("height", "width")}
    expected = theirs(
        PROMPT,
        image=large,
        strength=0.5,
        generator=torch.Generator().manual_seed(SEED),
        **sizes,
        **common,
    )

    images = generate(ours, hires_scale=2.0, hires_strength=0.5, **sizes, **fields)

    assert lowest_psnr(images, as_arrays(expected.images)) >= 60


@pytest.mark.parametrize("scores", [{}, {"aesthetic_score": 9.0, "negative_aesthetic_score": 0.5}])
def test_the_refiner_changes_an_image_as_diffusers_does(tmp_path, monkeypatch, compare, scores):
    monkeypatch.setattr(
        DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode()
    )
    state = state_dict(SDXL_REFINER)
    theirs = diffusers_refiner_pipeline(state, tmp_path)
    ours, (image, _) = open_networks(state), photo()
    common = {name: value for name, value in COMMON.items() if name not in ("height", "width")}
    fields = {"image": image, "strength": 0.7, **scores, **common}
    expected = theirs(PROMPT, generator=torch.Generator().manual_seed(SEED), **fields)

    assert ours.spec.unet.vector_dim == 2560
    compare(
        *("stable-diffusion-xl-refiner", ours, as_arrays(expected.images)),
        prompt=PROMPT,
        **fields,
    )


@pytest.mark.parametrize("scheduler", ["ddim", "euler"])
@pytest.mark.parametrize(("end", "start"), [(0.8, {}), (0.4, {"refiner_start": 0.4})])
def test_the_refiner_makes_the_last_steps_as_in_diffusers(tmp_path, scheduler, end, start):
    states = state_dict(SDXL), state_dict(SDXL_REFINER, seed=1)
    base = diffusers_xl_pipeline(StableDiffusionXLPipeline, SDXL, states[0], tmp_path)
    refine = diffusers_refiner_pipeline(states[1], tmp_path)
    base.scheduler = refine.scheduler = SCHEDULERS[scheduler]
    refine.vae = base.vae
    ours, refiner = (open_networks(state) for state in states)
    fields = {"num_inference_steps": 10, "guidance_scale": 5.0, "negative_prompt": "blurry, a dog"}
    latents = base(
        PROMPT,
        latents=noise(ours, 2),
        num_images_per_prompt=2,
        height=SIDE,
        width=SIDE,
        denoising_end=end,
        output_type="latent",
        **fields,
    ).images
    expected = refine(PROMPT, image=latents, num_images_per_prompt=2, denoising_start=end, **fields)
    alone = generate(ours, prompt=PROMPT, num_images=2, **COMMON)

    result = result_of(
        *(ours, refiner),
        **{"prompt": PROMPT, "num_images": 2, "sampler": scheduler, **fields, **start},
        height=SIDE,
        width=SIDE,
    )

    images, theirs = as_arrays(result.images), as_arrays(expected.images)
    assert lowest_psnr(images, theirs) >= 60
    assert lowest_psnr(alone, theirs) < 40


@pytest.mark.usefixtures("means")
@pytest.mark.parametrize(
    ("name", "family", "kind", "opened"),
    [
        (
            *("stable-diffusion-1-inpainting", SD_1_INPAINTING),
            *(StableDiffusionInpaintPipeline, diffusers_pipeline),
        ),
        (
            *("stable-diffusion-2-inpainting", SD_2_INPAINTING),
            *(StableDiffusionInpaintPipeline, diffusers_pipeline),
        ),
        (
            *("stable-diffusion-xl-inpainting", SDXL_INPAINTING),
            *(StableDiffusionXLInpaintPipeline, diffusers_xl_pipeline),
        ),
    ],
)
def test_inpainting_models_fill_the_mask_as_diffusers_does(
    tmp_path, compare, name, family, kind, opened
):
    """diffusers samples the latents of the masked image, where ours are their mean."""
    state = state_dict(family)
    theirs = opened(kind, family, state, tmp_path)
    ours, (image, mask) = open_networks(state), photo()
    given = {"image": image, "mask_image": mask, "strength": 1.0, "latents": noise(ours)}
    expected = theirs(PROMPT, **given, **COMMON)
    inside = np.asarray(mask) > 127

    expected = np.where(inside[..., None], as_arrays(expected.images), np.asarray(image))

    compare(name, ours, expected, prompt=PROMPT, image=image, mask_image=mask, **COMMON)

    assert ours.spec.task == "text-inpainting"


UPSCALER_BETAS = {**TRAINED, "beta_start": 0.0001, "beta_end": 0.02}


def diffusers_upscaler(**parts):
    """Return diffusers' pipeline for the upscaler, which has two noise schedules."""
    del parts["requires_safety_checker"]
    schedulers = {
        "low_res_scheduler": DDPMScheduler(
            beta_start=0.0001, beta_end=0.02, beta_schedule="scaled_linear"
        ),
        "scheduler": DDIMScheduler(
            **UPSCALER_BETAS,
            set_alpha_to_one=False,
            clip_sample=False,
            prediction_type="v_prediction",
        ),
    }
    return StableDiffusionUpscalePipeline(**parts | schedulers)


@pytest.mark.parametrize("fields", [{}, {"noise_level": 150, "prompt": PROMPT}])
def test_the_upscaler_enlarges_as_diffusers_does(tmp_path, monkeypatch, compare, fields):
    """The noise of the small image is not diffusers', which samples it from the seed."""
    state = state_dict(X4_UPSCALER)
    theirs = diffusers_pipeline(diffusers_upscaler, X4_UPSCALER, state, tmp_path)
    ours, small = open_networks(state), photo()[0].resize((24, 16))
    start = torch.randn(1, 4, 16, 24, generator=torch.Generator().manual_seed(SEED))
    monkeypatch.setattr(
        pipeline_stable_diffusion_upscale,
        "randn_tensor",
        lambda shape, **_: torch.from_numpy(augmentation_noise(tuple(shape))),
    )
    common = {"num_inference_steps": 5, "guidance_scale": 5.0, "negative_prompt": "blurry"}
    known = {"noise_level": 20, "prompt": "", **common, **fields}
    expected = theirs(image=small, latents=start, **known)

    compare(
        *("stable-diffusion-x4-upscaler", ours, as_arrays(expected.images)),
        image=small,
        **common,
        **fields,
    )

    assert ours.spec.task == "text-super-resolution"
    assert ours.spec.unet.cross_attention_only == (0,)
    other = generate(ours, image=small, **common, **{**fields, "noise_level": 0})
    assert lowest_psnr(other, as_arrays(expected.images)) < 60


def test_a_folder_of_the_upscaler_enlarges_as_diffusers_does(tmp_path, monkeypatch):
    theirs = diffusers_pipeline(diffusers_upscaler, X4_UPSCALER, state_dict(X4_UPSCALER), tmp_path)
    theirs.save_pretrained(tmp_path / "folder")
    ours, small = open_folder_networks(tmp_path / "folder"), photo()[0].resize((24, 16))
    start = torch.randn(1, 4, 16, 24, generator=torch.Generator().manual_seed(SEED))
    monkeypatch.setattr(
        pipeline_stable_diffusion_upscale,
        "randn_tensor",
        lambda shape, **_: torch.from_numpy(augmentation_noise(tuple(shape))),
    )
    fields = {"num_inference_steps": 5, "guidance_scale": 5.0, "noise_level": 150}
    expected = theirs(PROMPT, image=small, latents=start, **fields)

    images = generate(ours, prompt=PROMPT, image=small, **fields)

    assert ours.spec.family == "stable-diffusion-x4-upscaler"
    assert sources_of(ours.spec)["prediction_type"] == "file"
    np.testing.assert_allclose(
        augmentation_alphas(), theirs.low_res_scheduler.alphas_cumprod, rtol=1e-4
    )
    assert lowest_psnr(images, as_arrays(expected.images)) >= 60


@pytest.mark.parametrize(
    ("name", "family", "kind", "opened"),
    [
        (
            *("stable-diffusion-1-inpainting", SD_1_INPAINTING),
            *(StableDiffusionInpaintPipeline, diffusers_pipeline),
        ),
        (
            *("stable-diffusion-2-inpainting", SD_2_INPAINTING),
            *(StableDiffusionInpaintPipeline, diffusers_pipeline),
        ),
        (
            *("stable-diffusion-xl-inpainting", SDXL_INPAINTING),
            *(StableDiffusionXLInpaintPipeline, diffusers_xl_pipeline),
        ),
    ],
)
def test_a_folder_of_an_inpainting_model_is_the_model_of_the_file(
    tmp_path, name, family, kind, opened
):
    state = state_dict(family)
    opened(kind, family, state, tmp_path).save_pretrained(tmp_path / "folder")

    folder, file = open_folder_networks(tmp_path / "folder").spec, open_networks(state).spec

    assert (folder.family, folder.task) == (name, "text-inpainting")
    assert folder.unet == file.unet
    assert folder.null_prompt == file.null_prompt


def test_a_folder_of_the_refiner_is_the_model_of_the_file(tmp_path):
    state = state_dict(SDXL_REFINER)
    diffusers_refiner_pipeline(state, tmp_path).save_pretrained(tmp_path / "folder")

    folder, file = open_folder_networks(tmp_path / "folder").spec, open_networks(state).spec

    assert folder.family == "stable-diffusion-xl-refiner"
    assert (folder.unet, folder.null_prompt) == (file.unet, "encoded")
    assert folder.networks["text_encoder"] == file.networks["text_encoder"]


#: Scales of guidance by prompt and by image: between them 3, 3, 2, 2, 3 samples and 1.
EDITS = [(7.5, 1.5), (1.0, 1.5), (7.5, 1.0), (3.0, 3.0), (2.0, 0.0), (1.0, 1.0)]
SAMPLERS = {
    "ddim": (partial(ddim, "epsilon"), {}),
    "euler_ancestral": (
        partial(EulerAncestralDiscreteScheduler, **TRAINED | {"timestep_spacing": "linspace"}),
        {"sampler": "euler_ancestral", "schedule": "linspace"},
    ),
}


@pytest.mark.parametrize(("guidance_scale", "image_guidance_scale"), EDITS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_instruct_pix2pix_edits_as_diffusers_does(
    tmp_path, monkeypatch, sampler, guidance_scale, image_guidance_scale
):
    """diffusers guides only where both scales are above a limit; its formula holds everywhere."""
    kind = StableDiffusionInstructPix2PixPipeline
    monkeypatch.setattr(kind, "do_classifier_free_guidance", True)
    state = state_dict(INSTRUCT_PIX2PIX)
    theirs = diffusers_pipeline(kind, INSTRUCT_PIX2PIX, state, tmp_path)
    scheduler, sampling = SAMPLERS[sampler]
    theirs.scheduler = scheduler()
    ours, (image, _) = open_networks(state), photo()
    fields = {name: COMMON[name] for name in ("negative_prompt", "num_inference_steps")}
    fields |= {"guidance_scale": guidance_scale, "image_guidance_scale": image_guidance_scale}
    generator = torch.Generator().manual_seed(SEED)
    expected = theirs(PROMPT, image=image, generator=generator, **fields)

    images = generate(ours, prompt=PROMPT, image=image, **fields | sampling)

    assert (ours.spec.family, ours.spec.task) == ("instruct-pix2pix", "image-editing")
    assert lowest_psnr(images, as_arrays(expected.images)) >= 60


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"negative_prompt": None},
        {"guidance_rescale": 0.7},
        {"image_guidance_scale": 1.0},
        {"original_size": (96, 48), "crops_coords_top_left": (8, 4)},
    ],
)
def test_instruct_pix2pix_of_sdxl_edits_as_diffusers_does(tmp_path, changes):
    state = state_dict(SDXL_INSTRUCT_PIX2PIX)
    kind = StableDiffusionXLInstructPix2PixPipeline
    theirs = diffusers_xl_pipeline(kind, SDXL_INSTRUCT_PIX2PIX, state, tmp_path)
    ours, (image, _) = open_networks(state), photo()
    fields = {"image": image, "image_guidance_scale": 1.5, **COMMON, **changes}
    expected = theirs(PROMPT, latents=noise(ours), **fields)
    if "crops_coords_top_left" in fields:
        fields["crop_top_left"] = fields.pop("crops_coords_top_left")

    images = generate(ours, prompt=PROMPT, **fields)

    assert ours.spec.family == "stable-diffusion-xl-instruct-pix2pix"
    assert lowest_psnr(images, as_arrays(expected.images)) >= 60


@pytest.mark.parametrize(
    ("kind", "family", "opened", "name"),
    [
        (
            StableDiffusionInstructPix2PixPipeline,
            INSTRUCT_PIX2PIX,
            diffusers_pipeline,
            "instruct-pix2pix",
        ),
        (
            StableDiffusionXLInstructPix2PixPipeline,
            SDXL_INSTRUCT_PIX2PIX,
            diffusers_xl_pipeline,
            "stable-diffusion-xl-instruct-pix2pix",
        ),
    ],
)
def test_a_folder_that_edits_images_does_as_diffusers_does(
    tmp_path, compare, kind, family, opened, name
):
    theirs = opened(kind, family, state_dict(family), tmp_path)
    theirs.save_pretrained(tmp_path / "folder")
    ours, (image, _) = open_folder_networks(tmp_path / "folder"), photo()
    fields = {"num_inference_steps": 6, "guidance_scale": 5.0, "image_guidance_scale": 1.5}
    size = {} if kind is StableDiffusionInstructPix2PixPipeline else {"height": SIDE, "width": SIDE}
    expected = theirs(PROMPT, image=image, latents=noise(ours), **fields, **size)

    compare(name, ours, as_arrays(expected.images), prompt=PROMPT, image=image, **fields)

    assert ours.spec.task == "image-editing"


@pytest.mark.parametrize(
    ("kind", "family", "opened", "name"),
    [
        (StableDiffusionPipeline, SD_2, diffusers_pipeline, "stable-diffusion-2"),
        (StableDiffusionXLPipeline, SDXL, diffusers_xl_pipeline, "stable-diffusion-xl"),
    ],
)
def test_a_folder_that_diffusers_saved_generates_its_images(tmp_path, kind, family, opened, name):
    """Of Stable Diffusion 2 the folder has only the layers that context passes."""
    theirs = opened(kind, family, state_dict(family), tmp_path)
    folder = tmp_path / "folder"
    theirs.save_pretrained(folder)
    ours = open_folder_networks(folder)
    expected = theirs(PROMPT, latents=noise(ours), **COMMON)

    images = generate(ours, prompt=PROMPT, **COMMON)

    assert ours.spec.family == name
    assert sources_of(ours.spec)["prediction_type"] == "file"
    assert lowest_psnr(images, as_arrays(expected.images)) >= 60


@pytest.mark.parametrize(("zeros", "null_prompt"), [(True, "zeros"), (False, "encoded")])
def test_a_folder_says_what_an_empty_negative_prompt_is(tmp_path, zeros, null_prompt):
    theirs = diffusers_xl_pipeline(
        *(StableDiffusionXLPipeline, SDXL, state_dict(SDXL), tmp_path),
        force_zeros_for_empty_prompt=zeros,
    )
    folder = tmp_path / "folder"
    theirs.save_pretrained(folder)
    ours = open_folder_networks(folder)
    fields = COMMON | {"negative_prompt": None}
    expected = theirs(PROMPT, latents=noise(ours), **fields)

    images = generate(ours, prompt=PROMPT, **fields)

    assert (ours.spec.null_prompt, sources_of(ours.spec)["null_prompt"]) == (null_prompt, "file")
    assert lowest_psnr(images, as_arrays(expected.images)) >= 60
