"""Whole requests that steer, on the tiny bundle: what starts from pictures, and what varies."""

import numpy as np
import pytest

from ldm_runtime import GenerationRequest, Generator, Result
from ldm_runtime.errors import DeadlineError, RequestError
from ldm_runtime.pipeline.sampling import Step, slerp
from ldm_runtime.samplers import SAMPLERS

RNG = np.random.default_rng(5)
PICTURE = RNG.integers(0, 256, (24, 32, 3), dtype=np.uint8)
LEFT_HALF = np.zeros((24, 32), dtype=np.uint8)
LEFT_HALF[:, :16] = 255


@pytest.fixture(scope="module")
def generator(tiny_bundle):
    with Generator(tiny_bundle, threads=1) as generator:
        yield generator


def draw(generator, **fields):
    return generator(**({"prompt": "a red circle", "seed": 3} | fields))


def pixels(result, index=0):
    return np.asarray(result.images[index])


def test_the_less_is_forgotten_the_fewer_steps_are_made_and_the_closer_is_the_result(generator):
    latents = draw(generator, image=PICTURE, num_inference_steps=10, strength=0.1).latents

    distances = []
    for strength in (0.2, 0.5, 1.0):
        request = GenerationRequest(
            prompt="red", seed=3, image=PICTURE, num_inference_steps=10, strength=strength
        )
        *steps, result = generator.stream(request)
        assert len(steps) == steps[-1].total == round(10 * strength)
        distances.append(np.abs(result.latents - latents).mean())

    assert distances == sorted(distances)
    assert result.images[0].size == (32, 24)


def test_where_the_mask_is_black_the_picture_is_kept_to_the_last_bit(generator):
    result = draw(generator, image=PICTURE, mask_image=LEFT_HALF)

    assert (pixels(result)[:, 16:] == PICTURE[:, 16:]).all()
    assert (pixels(result)[:, :16] != PICTURE[:, :16]).mean() > 0.5


def test_a_blur_changes_what_is_around_the_mask_alone(generator):
    """By 3 pixels: the blur reaches 2.5 standard deviations."""
    mask = np.zeros((24, 32), dtype=np.uint8)
    mask[8:, :16] = 255

    sharp, blurred = (
        draw(generator, image=PICTURE, mask_image=mask, mask_blur=blur) for blur in (None, (1, 1))
    )

    found = pixels(blurred)
    assert (found[:5] == PICTURE[:5]).all()
    assert (found[:, 19:] == PICTURE[:, 19:]).all()
    assert (found[9:, :15] == pixels(sharp)[9:, :15]).all()
    assert (found[9:, 16] != PICTURE[9:, 16]).mean() > 0.5
    assert (blurred.latents == sharp.latents).all()
    assert blurred.request.as_request().mask_blur == (1, 1)
    again = generator.generate(blurred.request.as_request())
    assert (pixels(again) == found).all()


def test_a_blur_of_nothing_is_none(generator):
    sharp, blurred = (
        draw(generator, image=PICTURE, mask_image=LEFT_HALF, mask_blur=blur)
        for blur in (None, (0, 0))
    )

    assert (pixels(blurred) == pixels(sharp)).all()
    assert blurred.request == sharp.request


def test_a_white_mask_at_full_strength_is_a_picture_from_noise(generator):
    white = np.full((24, 32), 255, dtype=np.uint8)

    masked = draw(generator, image=PICTURE, mask_image=white)
    free = draw(generator, height=24, width=32)

    assert (pixels(masked) == pixels(free)).all()


def test_outpainting_keeps_the_picture_and_draws_around_it(generator):
    result = draw(generator, image=PICTURE, outpaint=(8, 0, 0, 8))

    assert result.images[0].size == (40, 32)
    assert (pixels(result)[:24, 8:] == PICTURE).all()


def test_the_second_pass_is_larger_and_steps_count_on(generator):
    request = GenerationRequest(
        prompt="red", seed=3, num_inference_steps=4, hires_scale=2.0, hires_strength=0.5
    )

    *steps, result = generator.stream(request)

    assert [step.index for step in steps] == [1, 2, 3, 4, 5, 6]
    assert {step.total for step in steps} == {6}
    assert result.images[0].size == (32, 32)
    assert result.latents.shape == (1, 4, 16, 16)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_second_pass_may_begin_between_equal_sigmas(generator, sampler):
    fields = {"schedule": "ldm_quadratic", "num_inference_steps": 50, "sampler": sampler}

    *steps, _ = generator.stream(
        GenerationRequest("red", seed=3, hires_scale=2.0, hires_strength=0.04, **fields)
    )

    assert steps[50].sigma == steps[47].sigma
    assert len(steps) == 52
    assert np.isfinite(steps[50].x0).all()


def test_a_variation_lies_between_the_pictures_of_two_seeds(generator):
    base, other = draw(generator, seed=3), draw(generator, seed=8)

    def varied(strength, **fields):
        return draw(generator, variation_seed=8, variation_strength=strength, **fields)

    assert (pixels(varied(1.0)) == pixels(other)).all()
    near, far = (np.abs(varied(s).latents - base.latents).mean() for s in (0.1, 0.6))
    assert 0 < near < far
    many = varied(0.3, num_images=2)
    alone = draw(generator, variation_seed=9, variation_strength=0.3)
    assert (pixels(many, 1) == pixels(alone)).all()


def test_slerp_keeps_the_length_of_noise():
    low, high = RNG.standard_normal((2, 1, 4, 32, 32)).astype(np.float32)

    for share in (0.0, 0.25, 0.5, 1.0):
        mixed = slerp(low, high, share)
        assert mixed.dtype == np.float32
        assert np.std(mixed) == pytest.approx(1, abs=0.03)
    np.testing.assert_allclose(slerp(low, high, 1.0), high, atol=1e-6)
    np.testing.assert_array_equal(slerp(low, low, 0.5), low)


@pytest.mark.parametrize(
    "change",
    [
        {"guidance_rescale": 0.7},
        {"guidance_interval": (0.5, 3.0)},
        {"zero_terminal_snr": True},
        {"noise": "numpy"},
        {"noise": "torch-cuda"},
        {"sigmas": (12.0, 5.0, 2.0, 0.5)},
        {"schedule": "karras"},
    ],
)
def test_every_way_of_steering_changes_the_picture_and_is_repeated_from_its_metadata(
    generator, change
):
    plain, steered = draw(generator), draw(generator, **change)

    again = generator(**steered.metadata(0)["request"])

    assert (pixels(plain) != pixels(steered)).any()
    assert (pixels(again) == pixels(steered)).all()


def test_previews_come_with_steps_when_asked_for(generator):
    request = GenerationRequest(prompt="red", seed=3)

    with_previews = [e for e in generator.stream(request, previews=True) if isinstance(e, Step)]
    without = [e for e in generator.stream(request) if isinstance(e, Step)]

    assert {step.previews[0].size for step in with_previews} == {(8, 8)}
    assert {step.previews for step in without} == {()}


def test_a_deadline_ends_a_picture_between_two_steps(generator):
    request = GenerationRequest(prompt="red", num_inference_steps=50)

    with pytest.raises(DeadlineError, match=r"1e-06 s are over after step 1 of 50 of image 1"):
        generator.generate(request, deadline_seconds=1e-6)
    with pytest.raises(RequestError, match="deadline_seconds: must be a number above 0, got 0"):
        generator.generate(request, deadline_seconds=0)
    assert isinstance(generator.generate(request, deadline_seconds=600), Result)


def many_requests():
    base = {"prompt": "red", "height": 24}
    return [
        GenerationRequest(**base, seed=1, num_inference_steps=5),
        GenerationRequest(**base, seed=2, sampler="heun", num_inference_steps=3),
        GenerationRequest(**base, seed=3, guidance_scale=1.0),
        GenerationRequest(prompt="blue", seed=4, sampler="dpmpp_sde", num_images=3),
        GenerationRequest(**base, seed=5, image=PICTURE, strength=0.5, guidance_scale=7.0),
        GenerationRequest(**base, seed=6, hires_scale=2.0),
        GenerationRequest(prompt="red " * 40, seed=7),
    ]


@pytest.mark.parametrize("max_batch", [1, 2, 4])
def test_many_requests_are_drawn_together_in_order_and_to_the_last_bit_as_alone(
    generator, max_batch
):
    alone = [generator.generate(request) for request in many_requests()]

    together = list(generator.run_many(many_requests(), max_batch=max_batch))

    assert [each.request for each in together] == [each.request for each in alone]
    for ours, expected in zip(together, alone, strict=True):
        assert ours.latents.tobytes() == expected.latents.tobytes()
        assert [i.tobytes() for i in ours.images] == [i.tobytes() for i in expected.images]


def test_many_requests_are_checked_before_the_first_is_drawn(generator):
    requests = [GenerationRequest(prompt="red"), GenerationRequest(prompt="red", height=17)]

    with pytest.raises(RequestError, match="height: 17"):
        generator.run_many(requests)
    with pytest.raises(ValueError, match="max_batch must be at least 1 and whole, got 0"):
        generator.run_many(requests[:1], max_batch=0)
    assert list(generator.run_many([])) == []


def test_a_consumer_may_stop_in_the_midst_of_many(generator):
    results = generator.run_many(many_requests())

    next(results)
    results.close()

    assert draw(generator).images
