"""Numbers about the image in the vector of SDXL's UNets: defaults, what is refused, features."""

import math
from dataclasses import replace

import numpy as np
import pytest

from ldm_runtime.conditioning import encode_conditioning
from ldm_runtime.errors import RequestError
from ldm_runtime.pipeline.open_model import OpenModel, Origin
from ldm_runtime.pipeline.passes import open_passes
from ldm_runtime.requests.request import GenerationRequest, parse_request
from ldm_runtime.requests.resolution import resolve
from ldm_runtime.testing import TINY_SPEC, FakeEngine, tiny_networks
from ldm_runtime.text import ClipTokenizer

POOLED, HEIGHT, WIDTH = 8, 24, 16


def model(count):
    """Return a tiny model whose UNet takes a count of numbers after the pooled prompt."""
    text_encoder = replace(TINY_SPEC.networks["text_encoder"], pooled_dim=POOLED)
    unet = replace(TINY_SPEC.unet, vector_dim=POOLED + 256 * count)
    return TINY_SPEC.with_networks(unet=unet, text_encoder=text_encoder)


BASE, REFINER = model(6), model(5)


def resolved(spec, **fields):
    base = {"prompt": "a red circle", "height": HEIGHT, "width": WIDTH, "seed": 0}
    return resolve(parse_request(base | fields), spec)


def encoded(inputs):
    return {
        "context": np.zeros((*inputs["tokens"].shape, 8), dtype=np.float32),
        "pooled": np.full((len(inputs["tokens"]), POOLED), 0.5, dtype=np.float32),
    }


def vector(spec, **fields):
    engine = FakeEngine(encoded)
    request = resolved(spec, **fields)
    return encode_conditioning(lambda _: engine, ClipTokenizer([]), request, spec).vector


def features(*numbers):
    """Return the features of numbers as Podell et al. 2023 take them from Transformers."""
    angles = [[number / 10_000 ** (i / 128) for i in range(128)] for number in numbers]
    return np.array([[*map(math.cos, each), *map(math.sin, each)] for each in angles]).ravel()


@pytest.mark.parametrize(
    ("fields", "numbers"),
    [
        ({}, (HEIGHT, WIDTH, 0, 0, HEIGHT, WIDTH)),
        ({"original_size": (512, 768)}, (512, 768, 0, 0, HEIGHT, WIDTH)),
        ({"crop_top_left": (3, 5)}, (HEIGHT, WIDTH, 3, 5, HEIGHT, WIDTH)),
        ({"target_size": (32, 40)}, (HEIGHT, WIDTH, 0, 0, 32, 40)),
    ],
)
def test_the_base_model_is_told_sizes_with_either_prompt(fields, numbers):
    for row in vector(BASE, **fields):
        np.testing.assert_array_equal(row[:POOLED], 0.5)
        np.testing.assert_allclose(row[POOLED:], features(*numbers), atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "negative", "positive"),
    [({}, 2.5, 6.0), ({"aesthetic_score": 8.0, "negative_aesthetic_score": 1.0}, 1.0, 8.0)],
)
def test_the_refiner_is_told_a_score_with_each_prompt(fields, negative, positive):
    rows = vector(REFINER, original_size=(512, 768), crop_top_left=(3, 5), **fields)

    for row, score in zip(rows, (negative, positive), strict=True):
        np.testing.assert_allclose(row[POOLED:], features(512, 768, 3, 5, score), atol=1e-4)


def test_without_guidance_the_refiner_is_told_the_score_of_the_prompt():
    (row,) = vector(REFINER, guidance_scale=1.0, aesthetic_score=8.0)

    np.testing.assert_allclose(row[POOLED:], features(HEIGHT, WIDTH, 0, 0, 8.0), atol=1e-4)


def passes_of(spec, refiner=None, **fields):
    """Return the calls of the text encoder, and the passes of a request that is sampled twice."""
    networks = {**tiny_networks(), "text_encoder": encoded}
    engines = {name: FakeEngine(network) for name, network in networks.items()}
    base = {"prompt": "a red circle", "height": HEIGHT, "width": WIDTH, "seed": 0}
    request = resolve(parse_request(base | {"hires_scale": 2.0} | fields), spec, refiner)
    model, other = (
        each
        and OpenModel(
            network=engines.__getitem__,
            tokenizer=ClipTokenizer([]),
            spec=each,
            origin=Origin(bundle_sha256="", build=None),
        )
        for each in (spec, refiner)
    )
    run = open_passes(model.network, model.tokenizer, request, spec, other).run(range(1))
    first = next(run)
    second = run.send(np.zeros((1, 4, HEIGHT // 2, WIDTH // 2), dtype=np.float32))
    return engines["text_encoder"].calls, first, second


@pytest.mark.parametrize(
    ("spec", "fields", "numbers"),
    [
        (BASE, {}, (2 * HEIGHT, 2 * WIDTH, 0, 0, 2 * HEIGHT, 2 * WIDTH)),
        (BASE, {"target_size": (32, 40)}, (2 * HEIGHT, 2 * WIDTH, 0, 0, 32, 40)),
        (
            BASE,
            {"original_size": (HEIGHT, WIDTH), "crop_top_left": (3, 5)},
            (HEIGHT, WIDTH, 3, 5, 2 * HEIGHT, 2 * WIDTH),
        ),
        (REFINER, {"aesthetic_score": 8.0}, (2 * HEIGHT, 2 * WIDTH, 0, 0, 8.0)),
    ],
)
def test_the_second_pass_is_told_its_own_size_unless_the_request_says_another(
    spec, fields, numbers
):
    calls, first, second = passes_of(spec, **fields)

    assert len(calls) == 1
    np.testing.assert_array_equal(first.conditioning.vector, vector(spec, **fields))
    np.testing.assert_array_equal(second.conditioning.vector[:, :POOLED], 0.5)
    told = second.conditioning.vector[1][POOLED:]
    np.testing.assert_allclose(told, features(*numbers), atol=1e-4)


def test_the_refiner_is_told_the_size_of_the_second_pass():
    _, first, second = passes_of(BASE, REFINER)

    for each, scale in (first, 1), (second, 2):
        told = features(scale * HEIGHT, scale * WIDTH, 0, 0, 6.0)
        np.testing.assert_allclose(each.refiner.conditioning.vector[1][POOLED:], told, atol=1e-4)


def test_prompts_that_change_are_told_the_size_of_the_second_pass():
    *_, second = passes_of(BASE, prompt="[red:blue:0.5]")

    told = features(2 * HEIGHT, 2 * WIDTH, 0, 0, 2 * HEIGHT, 2 * WIDTH)
    for each in second.conditioning.edits.values():
        np.testing.assert_allclose(each.vector[1][POOLED:], told, atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "recorded"),
    [({}, None), ({"original_size": (HEIGHT, WIDTH)}, (HEIGHT, WIDTH))],
)
def test_an_image_of_two_passes_records_the_sizes_that_were_asked_for(fields, recorded):
    request = resolved(BASE, hires_scale=2.0, **fields)

    again = request.as_request()

    assert again.original_size == recorded
    assert again.target_size is None
    assert resolve(again, BASE) == request


@pytest.mark.parametrize(
    ("spec", "fields"),
    [
        (BASE, {"original_size": (512, 768), "crop_top_left": (0, 9), "target_size": (32, 40)}),
        (REFINER, {"crop_top_left": (1, 0), "aesthetic_score": 7.5}),
        (REFINER, {"negative_aesthetic_score": 0.0}),
    ],
)
def test_an_image_records_what_differs_from_the_defaults(spec, fields):
    request = resolved(spec, **fields)

    recorded = request.as_request()

    assert {name: getattr(recorded, name) for name in fields} == fields
    assert resolve(recorded, spec) == request


def test_defaults_follow_the_size_and_are_not_recorded():
    given = {"original_size": (HEIGHT, WIDTH), "crop_top_left": (0, 0)}

    request = resolved(BASE, **given)

    assert request == resolved(BASE)
    assert request.as_request().original_size is None


@pytest.mark.parametrize(
    ("spec", "fields", "sentence"),
    [
        (
            TINY_SPEC,
            {"original_size": (8, 8)},
            "original_size: means nothing to this bundle, whose UNet takes no sizes of images; "
            "leave it out",
        ),
        (
            BASE,
            {"aesthetic_score": 7.0},
            "aesthetic_score: means nothing to this bundle, which takes original_size, "
            "crop_top_left, target_size; leave it out",
        ),
        (
            REFINER,
            {"target_size": (8, 8)},
            "target_size: means nothing to this bundle, which takes original_size, crop_top_left, "
            "aesthetic_score, negative_aesthetic_score; leave it out",
        ),
    ],
)
def test_numbers_that_a_model_does_not_take_are_an_error_that_says_what_it_takes(
    spec, fields, sentence
):
    with pytest.raises(RequestError) as caught:
        resolved(spec, **fields)

    assert str(caught.value) == sentence


def test_a_pair_is_two_whole_numbers_and_the_message_says_which():
    with pytest.raises(RequestError, match=r"two whole numbers, got \(1, 2, 3\); give height and"):
        GenerationRequest("red", original_size=(1, 2, 3))


def test_the_name_of_diffusers_for_the_crop_is_understood():
    with pytest.raises(RequestError, match=r"did you mean crop_top_left"):
        GenerationRequest("red", crops_coords_top_left=(0, 0))
