import dataclasses
import json
from itertools import pairwise
from typing import get_args

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ldm_runtime.errors import BundleError, RequestError
from ldm_runtime.requests.fields import MAX_SEED
from ldm_runtime.requests.request import GenerationRequest, parse_request
from ldm_runtime.requests.request_json import request_to_json
from ldm_runtime.requests.resolution import resolve, sigma_table
from ldm_runtime.requests.resolved import ClassCondition
from ldm_runtime.requests.sizes import TILE_LATENTS, latent_size, padded_size
from ldm_runtime.samplers import SAMPLERS
from ldm_runtime.schedules import SCHEDULES, most_steps
from ldm_runtime.specs.model import Task, size_step
from ldm_runtime.testing import TINY_SPEC, tiny_requests, tiny_spec
from tests.runtime.sampler_cases import sampler_named
from tests.runtime.task_cases import BOX, MAP, NEEDED, PICTURE


def resolved(**fields):
    return resolve(parse_request({"prompt": "a red circle", **fields}), TINY_SPEC)


def resolved_for(task, **fields):
    return resolve(parse_request(NEEDED[task] | fields), tiny_spec(task))


def picture(height, width):
    return np.zeros((height, width, 3), dtype=np.uint8)


def test_resolving_fills_every_field_from_the_model_and_the_sampler():
    request = resolved(seed=5)

    assert request.as_request() == GenerationRequest(
        prompt="a red circle",
        negative_prompt="",
        height=16,
        width=16,
        num_inference_steps=4,
        guidance_scale=3.0,
        sampler="ddim",
        schedule="leading",
        eta=0.0,
        seed=5,
        num_images=1,
        tile_size=0,
    )


def test_what_a_request_says_wins_over_the_defaults():
    request = resolved(height=32, guidance_scale=0.0, sampler="euler_ancestral", schedule="karras")

    assert (request.height, request.guidance_scale) == (32, 0.0)
    assert (request.sampler, request.schedule, request.eta) == ("euler_ancestral", "karras", 1.0)


@given(
    sampler=st.sampled_from([None, *SAMPLERS]),
    seed=st.none() | st.integers(0, MAX_SEED),
    steps=st.none() | st.integers(1, 1000),
    scale=st.none() | st.floats(0, 100),
)
def test_a_resolved_request_survives_json_and_resolves_to_itself(sampler, seed, steps, scale):
    assume(sampler != "tcd" or (steps or 0) <= 50)  # its schedule has no more

    request = resolved(sampler=sampler, seed=seed, num_inference_steps=steps, guidance_scale=scale)

    again = parse_request(json.loads(json.dumps(request_to_json(request.as_request()))))

    assert again == request.as_request()
    assert resolve(again, TINY_SPEC) == request


def test_open_seeds_are_drawn_anew_and_leave_room_for_every_image():
    seeds = {resolved(num_images=10_000).seed for _ in range(8)}

    assert len(seeds) > 1
    assert max(seeds) + 10_000 <= 2**32


def test_the_size_step_counts_the_autoencoder_and_the_halvings_of_the_unet():
    deeper = dataclasses.replace(TINY_SPEC.unet, channel_mult=(1, 2, 4, 4))

    assert size_step(TINY_SPEC) == 2 * 2
    assert size_step(TINY_SPEC.with_networks(unet=deeper)) == 2 * 8


@pytest.mark.parametrize(
    ("size", "nearest"), [(17, "16 and 20"), (15, "12 and 16"), (1, "4 and 8"), (3, "4 and 8")]
)
def test_a_size_between_two_steps_is_an_error_that_names_both(size, nearest):
    with pytest.raises(RequestError, match=f"width: {size} .* of 4; .* {nearest}$"):
        resolved(width=size)


def test_more_steps_than_the_training_schedule_has_are_an_error():
    assert resolved(num_inference_steps=1000).num_inference_steps == 1000

    with pytest.raises(RequestError, match=r"num_inference_steps: 1001 .* 1 to 1000"):
        resolved(num_inference_steps=1001)


def test_a_model_without_a_usable_schedule_is_an_error_of_the_bundle():
    spec = dataclasses.replace(TINY_SPEC, alphas_cumprod=(0.5, 0.9))

    with pytest.raises(BundleError, match="alphas_cumprod must decrease"):
        resolve(GenerationRequest(prompt="red"), spec)


def test_eta_is_an_error_for_a_sampler_without_noise():
    assert resolved(sampler="ddim", eta=0.3).eta == 0.3
    assert resolved(sampler="euler", eta=0.0).eta == 0.0

    with pytest.raises(RequestError, match=r"eta: sampler 'euler' has none.*ddim"):
        resolved(sampler="euler", eta=0.3)


def test_the_sigmas_of_a_request_are_those_of_its_sampler():
    ddim, euler = resolved(sampler="ddim"), resolved(sampler="euler")

    assert ddim.sigmas[:-1] == euler.sigmas[:-1]
    assert euler.sigmas[-1] == 0
    assert ddim.sigmas[-1] > 0


@pytest.mark.parametrize(
    "fields",
    [
        {"image": PICTURE},
        {"image": PICTURE, "mask_image": PICTURE},
        {"image": PICTURE, "mask_image": PICTURE, "mask_blur": (4, 0)},
        {"image": PICTURE, "outpaint": (4, 0, 4, 0)},
        {"hires_scale": 1.5},
        {"variation_strength": 0.5},
        {"sigmas": (9.0, 3.0, 1.0)},
        {"zero_terminal_snr": True, "schedule": "trailing"},
    ],
)
def test_a_request_that_steers_resolves_once_and_for_all(fields):
    request = resolved(**fields)

    assert resolve(request, TINY_SPEC) == request


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_and_schedule_resolve_once_and_for_all(sampler, schedule):
    for steps in (4, 30, 75):  # LDM's schedule makes 4, 31 and 77 steps of them
        most = most_steps(sigma_table(TINY_SPEC, zero_terminal_snr=False), steps, schedule)
        request = resolved(sampler=sampler, schedule=schedule, num_inference_steps=most, seed=5)

        assert resolve(request, TINY_SPEC) == request
        assert resolve(request.as_request(), TINY_SPEC) == request


def test_the_schedule_of_ldm_keeps_the_number_of_steps_that_it_was_asked_for():
    request = resolved(schedule="ldm", num_inference_steps=30)

    assert (request.num_inference_steps, request.num_steps) == (30, 31)
    assert request.passes[0].steps == range(31)
    assert request_to_json(request.as_request())["num_inference_steps"] == 30


def test_of_image_i_moves_the_seed_or_that_of_the_variation():
    plain = resolved(seed=5, num_images=3)
    varied = resolved(seed=5, variation_seed=9, variation_strength=0.2, num_images=3)

    assert plain.of_image(2) == resolved(seed=7)
    assert varied.of_image(2) == resolved(seed=5, variation_seed=11, variation_strength=0.2)


@pytest.mark.parametrize("task", get_args(Task))
def test_no_field_of_a_resolved_request_is_none_and_its_request_resolves_to_it(task):
    for request in tiny_requests(task):
        full = resolve(request, tiny_spec(task))

        assert None not in dataclasses.asdict(full).values()
        assert resolve(full.as_request(), tiny_spec(task)) == full
        assert hash(full) == hash(resolve(full, tiny_spec(task)))


def test_a_condition_of_another_task_is_an_error_that_names_both():
    with pytest.raises(
        TypeError, match=r"a text-to-image request has PromptCondition.*not a Class"
    ):
        resolved(seed=1).condition_as(ClassCondition)


def test_a_picture_decides_the_size_unless_a_size_is_asked_for():
    odd = np.zeros((23, 33, 3), dtype=np.uint8)

    assert (resolved(image=PICTURE).height, resolved(image=PICTURE).width) == (24, 32)
    assert (resolved(image=odd).height, resolved(image=odd).width) == (23, 33)
    assert resolved(image=PICTURE, width=64).width == 64
    with pytest.raises(RequestError, match="width: 35 is not a multiple of 4"):
        resolved(image=odd, width=35)


def test_latents_cover_a_picture_of_any_size_and_survive_the_halvings():
    request = resolved(image=np.zeros((23, 33, 3), dtype=np.uint8))

    assert latent_size(request, TINY_SPEC) == (12, 18)
    assert padded_size(request, TINY_SPEC) == (24, 36)
    assert resolve(request, TINY_SPEC) == request


def test_what_is_added_around_a_picture_makes_its_size_and_no_other_may_be_asked_for():
    grown = resolved(image=PICTURE, outpaint=(3, 8, 0, 0))

    assert (grown.height, grown.width) == (32, 35)
    with pytest.raises(RequestError, match=r"outpaint: makes 35x24 .* 32x24 are asked for"):
        resolved(image=PICTURE, outpaint=(3, 0, 0, 0), width=32)


def test_a_mask_of_another_size_than_the_image_is_refused_with_both_sizes():
    with pytest.raises(RequestError, match=r"mask_image: has 33x23 pixels, .* has 32x24"):
        resolved(image=PICTURE, mask_image=np.zeros((23, 33), dtype=np.uint8))


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"strength": 0.5}, "strength"),
        ({"mask_image": PICTURE}, "mask_image"),
        ({"mask_blur": (4, 4), "image": PICTURE}, "mask_blur"),
        ({"mask_blur": (4, 65), "image": PICTURE, "mask_image": PICTURE}, "mask_blur"),
        ({"outpaint": (4, 0, 0, 0)}, "outpaint"),
        ({"hires_strength": 0.5}, "hires_strength"),
        ({"hires_scale": 2.0, "image": PICTURE, "mask_image": PICTURE}, "hires_scale"),
        ({"hires_scale": 8.0, "height": 16384}, "hires_scale"),
        ({"outpaint": (0, 16384, 0, 0), "image": PICTURE}, "outpaint"),
        ({"outpaint": (4, 0, 0, 0), "image": PICTURE, "mask_image": PICTURE}, "outpaint"),
        ({"variation_seed": 3}, "variation_seed"),
        ({"schedule": "custom"}, "schedule"),
        ({"sigmas": (3.0, 1.0), "schedule": "karras"}, "schedule"),
        ({"sigmas": (3.0, 1.0), "num_inference_steps": 7}, "num_inference_steps"),
        ({"sigmas": (1.0, 3.0)}, "sigmas"),
        ({"image": PICTURE, "strength": 0.1, "num_inference_steps": 4}, "strength"),
        ({"hires_scale": 2.0, "hires_strength": 0.1, "num_inference_steps": 4}, "hires_strength"),
        ({"tile_size": 7}, "tile_size"),
    ],
)
def test_fields_that_do_not_go_together_are_an_error_that_names_one(fields, field):
    with pytest.raises(RequestError) as caught:
        resolved(**fields)

    assert caught.value.field == field


def test_sigmas_given_replace_schedule_and_steps():
    request = resolved(sigmas=(9.0, 3.0, 1.0), sampler="euler")

    assert request.schedule == "custom"
    assert request.num_inference_steps == 3
    assert request.sigmas == (9.0, 3.0, 1.0, 0.0)


@pytest.mark.parametrize(("strength", "steps"), [(1.0, 10), (0.75, 7), (0.5, 5), (0.19, 1)])
def test_strength_keeps_the_last_steps(strength, steps):
    (only,) = resolved(image=PICTURE, strength=strength, num_inference_steps=10).passes

    assert only.steps == range(10 - steps, 10)


def test_strength_defaults_to_everything_where_a_mask_says_what():
    def strengths(**fields):
        return [each.strength for each in resolved(**fields).passes]

    assert strengths(image=PICTURE) == [0.8]
    assert strengths(image=PICTURE, mask_image=PICTURE) == [1.0]
    assert strengths() == [1.0]
    assert strengths(hires_scale=2.0) == [1.0, 0.6]


def test_the_second_pass_has_a_size_the_model_can_draw():
    first, second = resolved(height=20, width=32, hires_scale=1.5).passes

    assert (first.height, first.width, first.scale) == (20, 32, 1.0)
    assert (second.height, second.width, second.scale) == (32, 48, 1.5)


@pytest.mark.parametrize(("side", "scale", "larger"), [(1, 1.0, 4), (1, 1.5, 4), (1, 6.5, 8)])
def test_the_second_pass_over_a_small_image_has_at_least_one_size_step(side, scale, larger):
    _, second = resolved(image=picture(side, 16), hires_scale=scale).passes

    assert second.height == larger


def test_large_pictures_are_decoded_in_tiles_unless_told_otherwise():
    tile = 2 * TILE_LATENTS

    assert resolved(height=256, width=256).tile_size == 0
    assert resolved(height=256, width=260).tile_size == tile
    assert resolved(height=160, width=160, hires_scale=2.0).tile_size == tile
    assert resolved(height=256, width=260, tile_size=0).tile_size == 0
    with pytest.raises(RequestError, match="tile_size: 12 is too small; take 0 or at least 16"):
        resolved(tile_size=12)


def test_zero_terminal_snr_moves_the_last_sigma_and_keeps_the_first():
    plain, rescaled = (sigma_table(TINY_SPEC, zero_terminal_snr=each) for each in (False, True))

    assert rescaled[0] == pytest.approx(plain[0])
    assert rescaled[-1] > 100 * plain[-1]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_can_take_a_schedule_that_repeats_a_timestep(sampler):
    request = resolved(sampler=sampler, schedule="ldm_quadratic", num_inference_steps=50)
    sigmas = request.sigmas
    latents = np.ones((1, 4, 2, 2), dtype=np.float32)

    def denoise(latents, sigma):
        return latents / (1 + sigma)

    *_, last = sampler_named(sampler)(
        denoise, latents, sigmas, eta=0.0, noise_sampler=lambda *_: 0 * latents
    )

    assert any(sigma == sigma_next for sigma, sigma_next in pairwise(sigmas))
    assert np.isfinite(last).all()


@pytest.mark.parametrize(
    ("height", "width", "latents"), [(10, 14, (10, 14)), (9, 14, (10, 14)), (1, 3, (2, 4))]
)
def test_a_picture_to_enlarge_has_the_size_of_its_latents(height, width, latents):
    request = resolved_for("super-resolution", image=picture(height, width))

    assert (request.height, request.width) == (2 * height, 2 * width)
    assert latent_size(request, tiny_spec("super-resolution")) == latents


def test_elsewhere_latents_are_the_picture_divided_by_the_factor():
    request = resolved(height=24, width=40)

    assert latent_size(request, TINY_SPEC) == (12, 20)


def test_a_picture_is_enlarged_by_the_factor_and_to_nothing_else():
    same = resolved_for("super-resolution", image=picture(9, 14), height=18, width=28)

    assert (same.height, same.width) == (18, 28)
    with pytest.raises(RequestError) as caught:
        resolved_for("super-resolution", image=picture(9, 14), width=64)
    assert str(caught.value) == (
        "width: is 64, but the image enlarged 2 times has 28; leave it out"
    )


def test_a_picture_too_large_to_be_enlarged_is_an_error_of_the_picture():
    with pytest.raises(RequestError, match=r"image: makes 2x16386 .* at most 8192 per side"):
        resolved_for("super-resolution", image=picture(8193, 1))


def test_a_map_decides_the_size_unless_a_size_is_asked_for():
    odd = np.zeros((23, 33), dtype=np.uint8)

    def size(**fields):
        request = resolved_for("semantic-synthesis", **fields)
        return request.height, request.width

    assert size(segmentation=MAP) == (24, 32)
    assert size(segmentation=odd) == (23, 33)
    assert size(segmentation=odd, height=64) == (64, 33)
    assert size(segmentation=MAP, image=picture(40, 40)) == (24, 32)


def test_a_picture_to_fill_is_drawn_in_its_own_size():
    request = resolved_for("inpainting", image=picture(23, 33), mask_image=picture(23, 33))

    assert (request.height, request.width) == (23, 33)


def test_margins_around_a_picture_to_fill_make_its_size():
    request = parse_request({"image": PICTURE, "outpaint": (3, 0, 0, 8)})

    resolved_request = resolve(request, tiny_spec("inpainting"))

    assert (resolved_request.height, resolved_request.width) == (32, 35)


def test_a_first_stage_pads_to_its_factor_alone_and_samples_nothing():
    spec = tiny_spec("autoencoder")

    request = resolved_for("autoencoder", image=picture(23, 35))

    assert size_step(spec) == 2
    assert (request.height, request.width) == (23, 35)
    assert latent_size(request, spec) == (12, 18)
    assert (request.passes, request.sigmas, request.num_inference_steps) == ((), (), 0)
    assert request.as_request() == GenerationRequest(
        image=request.source_image.image, height=23, width=35, seed=0, tile_size=0
    )


def test_a_first_stage_keeps_a_seed_and_gives_one_picture():
    assert resolved_for("autoencoder", seed=5).seed == 5
    with pytest.raises(RequestError, match="num_images: means nothing"):
        resolved_for("autoencoder", num_images=2)


def test_the_bundle_says_how_much_fresh_noise_its_own_sampler_adds():
    defaults = dataclasses.replace(TINY_SPEC.defaults, eta=1.0)
    spec = dataclasses.replace(TINY_SPEC, defaults=defaults)

    def eta(**fields):
        return resolve(GenerationRequest(prompt="red", **fields), spec).eta

    assert eta() == 1.0
    assert eta(sampler="ddim") == 1.0
    assert eta(eta=0.5) == 0.5
    assert eta(sampler="euler") == 0.0
    assert eta(sampler="euler_ancestral") == 1.0


def test_a_schedule_among_the_defaults_goes_with_the_default_sampler_alone():
    defaults = dataclasses.replace(TINY_SPEC.defaults, sampler="euler", schedule="karras")
    spec = dataclasses.replace(TINY_SPEC, defaults=defaults)

    def schedule_of(**fields):
        return resolve(GenerationRequest(prompt="red", **fields), spec).schedule

    assert schedule_of() == schedule_of(sampler="euler") == "karras"
    assert schedule_of(schedule="exponential") == "exponential"
    assert schedule_of(sampler="dpmpp_2m") == SAMPLERS["dpmpp_2m"].schedule != "karras"


def test_eta_of_a_bundle_whose_sampler_has_none_changes_nothing():
    defaults = dataclasses.replace(TINY_SPEC.defaults, sampler="euler", eta=1.0)

    request = resolve(
        GenerationRequest(prompt="red"), dataclasses.replace(TINY_SPEC, defaults=defaults)
    )

    assert request.eta == 0.0


def test_a_null_class_between_the_others_is_named_in_the_message():
    spec = tiny_spec("class-to-image")
    spec = spec.with_networks(
        class_embedder=dataclasses.replace(spec.networks["class_embedder"], null_class=2)
    )

    with pytest.raises(RequestError, match="2 stands for no class of this bundle; give 0 to 4 but"):
        resolve(GenerationRequest(class_label=2), spec)


@pytest.mark.parametrize("label", [0, 3])
def test_every_class_but_the_null_class_can_be_drawn(label):
    assert resolved_for("class-to-image", class_label=label).condition.label == label


@pytest.mark.parametrize(
    ("task", "fields", "message"),
    [
        (
            "class-to-image",
            {"class_label": 4},
            "class_label: 4 stands for no class of this bundle; give 0 to 3",
        ),
        (
            "class-to-image",
            {"class_label": 5},
            "class_label: 5 is not a class of this bundle; give 0 to 3",
        ),
        (
            "layout-to-image",
            {"layout": [BOX] * 4},
            "layout: has 4 objects; this bundle takes at most 3",
        ),
        (
            "layout-to-image",
            {"layout": [BOX, BOX | {"label": 100}]},
            "layout: object 1 has label 100; this bundle knows 0 to 99",
        ),
        (
            "semantic-synthesis",
            {"segmentation": MAP + 1},
            "segmentation: has a pixel of class 6; this bundle knows 0 to 5, one number per pixel",
        ),
        (
            "retrieval",
            {"embeddings": np.ones((2, 7), dtype=np.float32)},
            "embeddings: have 7 numbers each; this bundle takes 8, as the encoder makes them that "
            "it was trained with",
        ),
    ],
)
def test_a_condition_that_the_model_does_not_know_is_an_error_with_what_it_knows(
    task, fields, message
):
    with pytest.raises(RequestError) as caught:
        resolved_for(task, **fields)

    assert str(caught.value) == message


def test_a_layout_may_have_as_many_objects_as_fit_and_none():
    assert len(resolved_for("layout-to-image", layout=[BOX] * 3).condition.objects) == 3
    assert resolved_for("layout-to-image", layout=[]).condition.objects == ()


def test_a_prompt_that_cannot_be_read_is_an_error_only_where_weights_are_read():
    with pytest.raises(RequestError, match="prompt: "):
        resolved(prompt="(red:1000000000)")

    literal = resolved(prompt="(red:1000000000)", literal_prompt=True).condition

    assert (literal.prompt, literal.literal) == ("(red:1000000000)", True)
