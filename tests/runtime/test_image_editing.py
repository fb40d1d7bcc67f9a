"""Editing an image by an instruction: what the samples of the UNet see, and the sizes of images."""

from dataclasses import replace

import numpy as np
import pytest

from ldm_runtime import Generator
from ldm_runtime.conditioning import encode_conditioning, open_tokenizer
from ldm_runtime.errors import RequestError
from ldm_runtime.latents.codec import to_float
from ldm_runtime.pipeline.sampling import sample_latents
from ldm_runtime.requests.request import GenerationRequest
from ldm_runtime.requests.resolution import resolve
from ldm_runtime.testing import FakeEngine, tiny_networks, tiny_spec

TASK = "image-editing"
SPEC, NETWORKS = tiny_spec(TASK), tiny_networks(TASK)
PICTURE = np.random.default_rng(3).integers(0, 256, (24, 32, 3), dtype=np.uint8)
PROMPTS = {"prompt": "make it red", "negative_prompt": "blue"}


@pytest.fixture(scope="module")
def tokenizer(bundle_of):
    return open_tokenizer(bundle_of(TASK) / "tokenizer/merges.txt", SPEC)


def resolved(spec=SPEC, **fields):
    return resolve(GenerationRequest(**{**PROMPTS, "image": PICTURE, **fields}), spec)


def encode(tokenizer, spec=SPEC, **fields):
    engines = {name: FakeEngine(network) for name, network in NETWORKS.items()}
    request = resolved(spec, **fields)
    return encode_conditioning(engines.__getitem__, tokenizer, request, spec), engines


def latents_of(pixels):
    moments = NETWORKS["vae_encoder"]({"image": to_float(pixels[None])})["moments"]
    return moments[:, : SPEC.autoencoder.embed_dim]


def test_nothing_then_the_image_then_the_prompt_as_well(tokenizer):
    found, engines = encode(tokenizer)
    texts = encode(tokenizer, guidance_scale=1.0, image_guidance_scale=1.0)[0].context

    assert [len(call["tokens"]) for call in engines["text_encoder"].calls] == [2]
    assert found.context.shape == (3, 16, 8)
    np.testing.assert_array_equal(found.context[0], found.context[1])
    np.testing.assert_array_equal(found.context[2:], texts)
    assert np.abs(found.context[1] - found.context[2]).max() > 0.1
    latents = latents_of(PICTURE)
    np.testing.assert_array_equal(found.concat, np.concatenate([0 * latents, latents, latents]))


def test_cosxl_edit_sees_the_image_in_the_scale_of_its_latents(tokenizer):
    """As `StableDiffusionXLInstructPix2PixPipeline` of diffusers does with `is_cosxl_edit`."""
    found, _ = encode(tokenizer, replace(SPEC, scales_image=True))

    latents = np.float32(SPEC.autoencoder.latent_scale_factor) * latents_of(PICTURE)
    np.testing.assert_array_equal(found.concat, np.concatenate([0 * latents, latents, latents]))


@pytest.mark.parametrize(
    ("guidance_scale", "image_guidance_scale", "kept"),
    [(7.5, 1.5, [0, 1, 2]), (7.5, 1.0, [1, 2]), (2.0, 2.0, [0, 2]), (1.0, 1.0, [2])],
)
def test_samples_that_weigh_nothing_are_not_asked_for(
    tokenizer, guidance_scale, image_guidance_scale, kept
):
    scales = {"guidance_scale": guidance_scale, "image_guidance_scale": image_guidance_scale}
    every, _ = encode(tokenizer)

    found, _ = encode(tokenizer, **scales)

    np.testing.assert_array_equal(found.context, every.context[kept])
    np.testing.assert_array_equal(found.concat, every.concat[kept])
    unet = FakeEngine(NETWORKS["unet"])
    list(sample_latents(unet, found, resolved(seed=0, num_images=2, **scales), SPEC))
    assert {len(call["latents"]) for call in unet.calls} == {2 * len(kept)}


def test_each_sample_of_a_batch_has_its_own_channels(tokenizer):
    found, _ = encode(tokenizer)
    unet = FakeEngine(NETWORKS["unet"])
    request = resolved(seed=0, num_images=2, guidance_interval=(0.0, 1.0), num_inference_steps=3)

    list(sample_latents(unet, found, request, SPEC))

    first, *_, last = (call["latents"][:, 4:] for call in unet.calls)
    np.testing.assert_array_equal(first, found.concat[[2, 2]])  # above the interval
    np.testing.assert_array_equal(last, found.concat[[0, 0, 1, 1, 2, 2]])


def test_latents_of_the_image_are_not_scaled_as_those_that_are_sampled(tokenizer):
    scaled = replace(SPEC.autoencoder, latent_scale_factor=0.25)

    found, _ = encode(tokenizer, SPEC.with_networks(autoencoder=scaled))

    np.testing.assert_array_equal(found.concat, encode(tokenizer)[0].concat)


def test_an_odd_image_keeps_its_size_and_is_padded_inside(tokenizer, bundle_of):
    odd = PICTURE[:21, :27]

    found, _ = encode(tokenizer, image=odd)
    with Generator(bundle_of(TASK), threads=1) as generator:
        result = generator(PROMPTS["prompt"], image=odd, seed=1)

    padded = np.pad(odd, ((0, 3), (0, 1), (0, 0)), mode="edge")
    np.testing.assert_array_equal(found.concat[2:], latents_of(padded))
    assert result.image.size == (27, 21)


def test_an_image_is_resized_to_the_size_that_is_asked_for(tokenizer):
    found, _ = encode(tokenizer, height=12, width=16)

    assert found.concat.shape == (3, 4, 6, 8)


def test_guidance_by_the_image_has_a_default_and_travels_with_the_request():
    request = resolved(seed=4)

    assert (request.image_guidance_scale, request.as_request().image_guidance_scale) == (1.5, 1.5)
    assert resolved(image_guidance_scale=2.0).guidance.scales == (2.0, 3.0)
    assert resolve(request.as_request(), SPEC) == request


def test_the_image_is_no_place_to_start_from():
    with pytest.raises(RequestError, match=r"^strength: means nothing to this bundle"):
        resolved(strength=0.5)
