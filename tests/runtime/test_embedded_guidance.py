"""Models whose UNet takes the guidance scale as an input and needs no null condition."""

from dataclasses import replace

import numpy as np
import pytest

from ldm_runtime.conditioning import encode_conditioning, open_tokenizer
from ldm_runtime.conditioning.embedded_guidance import guidance_features
from ldm_runtime.errors import RequestError
from ldm_runtime.pipeline.sampling import sample_latents
from ldm_runtime.requests.request import GenerationRequest
from ldm_runtime.requests.resolution import resolve
from ldm_runtime.specs.model import components_of
from ldm_runtime.specs.tasks import samples_per_image
from ldm_runtime.testing import TINY_SPEC, FakeEngine, tiny_networks

FEATURES = 8
SPEC = TINY_SPEC.with_networks(unet=replace(TINY_SPEC.unet, guidance_dim=FEATURES))


def resolved(**fields):
    return resolve(GenerationRequest(prompt="a circle", seed=4, **fields), SPEC)


def calls_of(request, bundle, count):
    """Return the calls of the UNet and of the text encoder in a run of a request."""
    networks = tiny_networks()
    text = FakeEngine(networks["text_encoder"])
    unet = FakeEngine(networks["unet"])
    tokenizer = open_tokenizer(bundle / "tokenizer/merges.txt", SPEC)
    conditioning = encode_conditioning({"text_encoder": text}.__getitem__, tokenizer, request, SPEC)
    list(sample_latents(unet, conditioning, request, SPEC, images=range(count)))
    return unet.calls, text.calls


def test_the_scale_goes_to_the_unet_and_one_sample_per_image_is_asked_of_it(tiny_bundle):
    request = resolved(guidance_scale=2.5, num_images=3)

    unet, text = calls_of(request, tiny_bundle, 3)

    assert [len(call["tokens"]) for call in text] == [1]
    assert len(unet) == request.num_inference_steps
    for call in unet:
        assert len(call["latents"]) == len(call["context"]) == 3
        np.testing.assert_array_equal(
            call["guidance"], np.repeat(guidance_features(2.5, FEATURES), 3, axis=0)
        )


def test_the_unguided_scale_has_features_of_zero_like_a_timestep():
    expected = [0] * (FEATURES // 2) + [1] * (FEATURES // 2)

    np.testing.assert_array_equal(guidance_features(1.0, FEATURES), [expected])


def test_features_are_sines_then_cosines_from_period_2_pi_to_ten_thousand_times_it():
    (first, second, *_), angle = guidance_features(1.002, 4)[0], 1000 * 0.002

    assert first == pytest.approx(np.sin(angle), abs=1e-4)
    assert second == pytest.approx(np.sin(angle / 10_000), abs=1e-6)


def test_the_default_scale_is_the_models():
    spec = replace(SPEC, defaults=replace(SPEC.defaults, guidance_scale=8.5))

    request = resolve(GenerationRequest(prompt="a circle"), spec)

    assert request.guidance_scale == 8.5
    assert not request.is_guided
    assert resolve(request, spec) == request


def test_engines_are_made_for_one_sample_per_image():
    assert samples_per_image(SPEC, "unet") == 1
    assert samples_per_image(SPEC, "text_encoder") == 1
    assert "guidance" in [each.name for each in components_of(SPEC)["unet"].inputs]
    assert "guidance" not in [each.name for each in components_of(TINY_SPEC)["unet"].inputs]


@pytest.mark.parametrize(
    "fields",
    [
        {"negative_prompt": "blurry"},
        {"guidance_rescale": 0.5},
        {"guidance_interval": (0.1, 5.0)},
    ],
)
def test_what_steers_away_from_a_null_condition_is_an_error(fields):
    (name,) = fields

    with pytest.raises(RequestError, match=f"{name}: is .* no null condition"):
        resolved(**fields)
