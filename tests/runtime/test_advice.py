"""Advice on requests that are valid, but will not do what they look like."""

import logging

import numpy as np
import pytest

from ldm_runtime import GenerationRequest, Generator
from ldm_runtime.requests.advice import advice
from ldm_runtime.requests.resolution import resolve
from ldm_runtime.testing import TINY_SPEC, tiny_spec

IMAGE = np.zeros((128, 128, 3), dtype=np.uint8)
WHITE = np.full((128, 128), 255, dtype=np.uint8)


def advised(spec=TINY_SPEC, **fields):
    request = resolve(GenerationRequest(**{"prompt": "red", **fields}), spec)
    return list(advice(request, spec))


def test_a_usual_request_needs_no_advice():
    assert advised(prompt=r"a (red:1.2) [circle], \[a:b:0.4\], sand and a BAND, 12:30 <b>") == []
    assert advised(prompt="a [cat:dog:0.4] or a [cat|[dog:3]] or [cat::.5]") == []
    assert advised(num_inference_steps=2) == []
    assert advised(tile_size=64, height=128, width=128) == []


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ("a <lora:style:0.8> house", "an extra network such as '<lora:style:0.8>'"),
        ("a [cat:dog:bird:0.4]", "prompt editing such as '[cat:dog:bird:0.4]'"),
        ("a [(cat:dog:10]", "prompt editing such as '[(cat:dog:10]'"),
        ("a [cat|dog)]", "alternation such as '[cat|dog)]'"),
        ("a cat AND a dog", "composition such as 'AND'"),
    ],
)
def test_syntax_of_the_web_ui_that_is_not_read_is_said(prompt, found):
    expected = f"{found} is not read, its characters are; leave it out"

    assert advised(prompt=prompt) == [f"prompt: {expected}"]
    assert advised(negative_prompt=prompt) == [f"negative_prompt: {expected}"]
    assert advised(prompt=prompt, literal_prompt=True) == []


def test_steps_that_start_below_the_noise_are_said():
    (sentence,) = advised(num_inference_steps=1)

    assert sentence.startswith("num_inference_steps: 1 of the schedule 'leading' start at sigma 0.")
    assert sentence.endswith("make more steps, or choose the schedule 'trailing'")
    assert advised(num_inference_steps=1, schedule="trailing") == []
    assert len(advised(sigmas=(0.9, 0.1))) == 1


def test_steps_that_start_from_an_image_may_start_anywhere():
    assert advised(num_inference_steps=1, image=IMAGE, strength=1.0) == []
    assert len(advised(num_inference_steps=1, image=IMAGE, mask_image=WHITE)) == 1

    condition = {"image": IMAGE, "mask_image": WHITE, "prompt": None}
    assert len(advised(tiny_spec("inpainting"), num_inference_steps=1, **condition)) == 1
    assert advised(tiny_spec("autoencoder"), prompt=None, image=IMAGE) == []


def test_tiles_too_small_to_agree_are_said_where_there_is_more_than_one():
    assert advised(tile_size=32, height=128, width=16) == [
        "tile_size: tiles of 32 pixels see too little to agree with each other; take at least 64, "
        "or 0 for one piece"
    ]
    assert advised(tile_size=32, height=32, width=32) == []
    assert len(advised(tile_size=32, height=32, width=32, hires_scale=2.0)) == 1


def test_a_generator_logs_its_advice_and_generates(tiny_bundle, caplog):
    with Generator(tiny_bundle, threads=1) as generator, caplog.at_level(logging.WARNING):
        result = generator("a <lora:style:1> house", num_inference_steps=2)

    assert [record.getMessage()[:16] for record in caplog.records] == ["prompt: an extra"]
    assert len(result.images) == 1
