"""Textual inversions against diffusers' `load_textual_inversion`, for one text encoder and for two.

The bundle of Stable Diffusion 1 runs its ONNX graphs; SDXL's networks run in torch.
"""

import copy

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import save_file

from ldm_runtime import Generator
from ldm_runtime.conditioning import encode_conditioning
from ldm_runtime.inputs.textual_inversion import read_learned_words
from ldm_runtime.requests.request import GenerationRequest
from ldm_runtime.requests.resolution import resolve
from tests.export.small_checkpoint import TEXT_ENCODER
from tests.reference.small_families import SD_2, SDXL, open_networks, state_dict
from tests.reference.small_pipelines import (
    COMMON,
    as_arrays,
    diffusers_pipeline,
    diffusers_xl_pipeline,
    generate,
    lowest_psnr,
    noise,
)
from tests.reference.twins import SCHEDULERS, clip_tokenizer

pytestmark = [
    pytest.mark.reference,
    pytest.mark.slow,
    # torch's __array__ lacks NumPy 2's `copy`, and diffusers passes tensors to np.array.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

PROMPT = "a photo of <cat>, on a red circle"
SEED = 7
FIELDS = {"num_inference_steps": 6, "guidance_scale": 5.0, "height": 64, "width": 64}


def vectors(count, width, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return 0.5 * torch.randn((count, width), generator=generator)


def save_webui(path, values):
    torch.save(
        {
            "string_to_token": {"*": 265},
            "string_to_param": {"*": torch.nn.Parameter(values)},
            "name": "cat",
            "step": 100,
            "sd_checkpoint": None,
            "sd_checkpoint_name": None,
        },
        path,
    )


FORMATS = {
    "webui.pt": save_webui,
    "kohya.safetensors": lambda path, values: save_file({"emb_params": values}, path),
    "learned_embeds.bin": lambda path, values: torch.save({"<cat>": values}, path),
    "learned_embeds.safetensors": lambda path, values: save_file({"<cat>": values}, path),
}


@pytest.fixture
def theirs(pipeline, tmp_path):
    """diffusers' pipeline with a tokenizer and a text encoder of its own, which take words."""
    parts = {**pipeline.components, "scheduler": SCHEDULERS["ddim"]}
    parts |= {
        "tokenizer": clip_tokenizer(tmp_path),
        "text_encoder": copy.deepcopy(pipeline.text_encoder),
    }
    changed = type(pipeline)(**parts, requires_safety_checker=False)
    changed.set_progress_bar_config(disable=True)
    return changed


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", FORMATS)
def test_a_word_of_every_format_gives_the_images_of_diffusers(
    theirs, small_bundle_fp32, tmp_path, name, count
):
    path = tmp_path / name
    FORMATS[name](path, vectors(count, TEXT_ENCODER.width))
    theirs.load_textual_inversion(str(path), token="<cat>")
    start = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(SEED))
    expected = theirs(PROMPT, negative_prompt="blurry", latents=start, **FIELDS)

    with Generator(small_bundle_fp32, textual_inversions={"<cat>": path}, threads=1) as generator:
        result = generator(PROMPT, negative_prompt="blurry", seed=SEED, sampler="ddim", **FIELDS)
        other = generator("a photo of a cat", seed=SEED, sampler="ddim", **FIELDS)

    assert lowest_psnr(as_arrays(result), as_arrays(expected.images)) >= 60
    assert lowest_psnr(as_arrays(other), as_arrays(expected.images)) < 40
    assert result.metadata()["textual_inversions"].keys() == {"<cat>"}
    assert "textual_inversions" not in other.metadata()


def test_words_in_both_prompts_give_the_context_of_transformers(
    theirs, small_bundle_fp32, tmp_path
):
    files = {"<cat>": tmp_path / "cat.pt", "<cat-toy>": tmp_path / "toy.pt"}
    for seed, (word, path) in enumerate(files.items()):
        save_webui(path, vectors(2 + seed, TEXT_ENCODER.width, seed))
        theirs.load_textual_inversion(str(path), token=word)
    prompts = "a <cat-toy> and a<cat>.", "<cat>"
    cond, uncond = theirs.encode_prompt(prompts[0], "cpu", 1, True, negative_prompt=prompts[1])

    with Generator(small_bundle_fp32, textual_inversions=files, threads=1) as generator:
        request = GenerationRequest(prompts[0], negative_prompt=prompts[1], guidance_scale=2.0)
        model = generator._pipeline.model
        found = encode_conditioning(
            model.network, model.tokenizer, resolve(request, model.spec), model.spec
        ).context

    expected = torch.cat([uncond, cond]).numpy()
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def test_a_word_of_stable_diffusion_2_gives_the_images_of_diffusers(tmp_path):
    state = state_dict(SD_2)
    theirs = diffusers_pipeline(StableDiffusionPipeline, SD_2, state, tmp_path)
    ours = open_networks(state, measured="epsilon")
    (encoder,) = SD_2.text_encoders.values()
    path = tmp_path / "learned_embeds.safetensors"
    save_file({"<cat>": vectors(2, encoder.width)}, path)
    theirs.load_textual_inversion(str(path), token="<cat>")
    fields = COMMON | {"negative_prompt": "blurry, <cat>"}
    expected = theirs(PROMPT, latents=noise(ours), **fields)
    others = generate(ours, prompt=PROMPT, **fields)

    ours.words = read_learned_words({"<cat>": path}, ours.spec)
    images = generate(ours, prompt=PROMPT, **fields)

    assert lowest_psnr(images, as_arrays(expected.images)) >= 60
    assert lowest_psnr(others, as_arrays(expected.images)) < 40


@pytest.mark.parametrize("names", [("clip_l", "clip_g"), ("text_encoders_0", "text_encoders_1")])
def test_a_word_of_sdxl_gives_the_images_of_diffusers(tmp_path, names):
    state = state_dict(SDXL)
    theirs = diffusers_xl_pipeline(StableDiffusionXLPipeline, SDXL, state, tmp_path)
    ours = open_networks(state)
    widths = [each.width for each in SDXL.text_encoders.values()]
    tensors = {name: vectors(2, width) for name, width in zip(names, widths, strict=True)}
    save_file(tensors, tmp_path / "cat.safetensors")
    pairs = (
        (theirs.text_encoder, theirs.tokenizer),
        (theirs.text_encoder_2, theirs.tokenizer_2),
    )
    for tensor, (encoder, tokenizer) in zip(tensors.values(), pairs, strict=True):
        theirs.load_textual_inversion(
            {"emb": tensor}, token="<cat>", text_encoder=encoder, tokenizer=tokenizer
        )
    fields = COMMON | {"negative_prompt": "blurry, <cat>"}
    expected = theirs(PROMPT, latents=noise(ours), **fields)
    others = generate(ours, prompt=PROMPT, **fields)

    ours.words = read_learned_words({"<cat>": tmp_path / "cat.safetensors"}, ours.spec)
    images = generate(ours, prompt=PROMPT, **fields)

    assert lowest_psnr(images, as_arrays(expected.images)) >= 60
    assert lowest_psnr(others, as_arrays(expected.images)) < 40
