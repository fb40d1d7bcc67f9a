"""The calls of a generator: every one takes the same fields, and reports while it works."""

import re

import numpy as np
import pytest

from ldm_runtime import GenerationRequest, Generator, Result, Step
from ldm_runtime.errors import BackendError, DeadlineError, RequestError
from ldm_runtime.pipeline.step_reports import report_steps
from ldm_runtime.requests.call_arguments import request_from
from ldm_runtime.requests.request import FIELDS, parse_request
from ldm_runtime.requests.resolution import resolve
from ldm_runtime.testing import TINY_SPEC

FIELDS_OF_ALL = {"seed": 3, "num_inference_steps": 2, "sampler": "euler_ancestral"}


@pytest.fixture(scope="module")
def generator(tiny_bundle):
    with Generator(tiny_bundle, threads=1) as generator:
        yield generator


def pixels(result):
    return [image.tobytes() for image in result]


def last(events):
    *_, result = events
    return result


def test_every_call_takes_the_same_fields(generator):
    called = generator("red", **FIELDS_OF_ALL)

    assert pixels(generator.generate("red", **FIELDS_OF_ALL)) == pixels(called)
    assert pixels(last(generator.stream("red", **FIELDS_OF_ALL))) == pixels(called)
    assert [pixels(each) for each in generator.run_many(["red"], **FIELDS_OF_ALL)] == [
        pixels(called)
    ]


def test_every_call_takes_a_request_as_well(generator):
    request = GenerationRequest("red", **FIELDS_OF_ALL)
    result = generator(request)

    assert pixels(generator.generate(result.request)) == pixels(result)
    assert pixels(last(generator.stream(request))) == pixels(result)
    many = ["red", request, {"prompt": "red", **FIELDS_OF_ALL}]
    assert [pixels(each) for each in generator.run_many(many, **FIELDS_OF_ALL)] == [
        pixels(result)
    ] * 3


def test_fields_replace_those_of_a_request(generator):
    request = GenerationRequest("red", **FIELDS_OF_ALL)

    changed = generator(generator(request).request, seed=4)

    assert pixels(changed) == pixels(generator("red", **{**FIELDS_OF_ALL, "seed": 4}))
    with pytest.raises(RequestError, match=r"steps: unknown field \(did you mean num_inf"):
        generator(request, steps=4)


SMALL, LARGE = (np.full((side, side, 3), 99, dtype=np.uint8) for side in (16, 32))
WIDE = np.full((16, 8192, 3), 99, dtype=np.uint8)


@pytest.mark.parametrize(
    ("made", "fields", "expected"),
    [
        ({}, {"sampler": "DPM++ 2M Karras"}, {"sampler": "dpmpp_2m", "schedule": "karras"}),
        ({"sampler": "euler_ancestral"}, {"sampler": "euler"}, {"eta": 0.0}),
        ({"sampler": "ddim", "eta": 0.5}, {"sampler": "ddim"}, {"eta": 0.5}),
        ({"sampler": "heun", "schedule": "karras"}, {"sampler": "ddim"}, {"schedule": "leading"}),
        ({"sampler": "heun"}, {"sampler": None}, {"sampler": "ddim", "schedule": "leading"}),
        ({"sigmas": [14, 3]}, {"num_inference_steps": 20}, {"schedule": "leading"}),
        ({"sigmas": [14, 3]}, {"schedule": "karras"}, {"schedule": "karras"}),
        ({"sigmas": [14, 3]}, {"sampler": "Heun Karras"}, {"schedule": "karras"}),
        ({"sigmas": [14, 3]}, {"sampler": "heun"}, {"sigmas": (14, 3, 0)}),
        ({"sigmas": [14, 3, 1]}, {"sigmas": [9, 1]}, {"sigmas": (9, 1, 0)}),
        ({"sigmas": [14, 3, 1]}, {"sigmas": None}, {"num_inference_steps": 4}),
        ({"num_inference_steps": 3}, {"sigmas": None}, {"num_inference_steps": 3}),
        ({}, {"sigmas": [9, 1]}, {"schedule": "custom", "num_inference_steps": 2}),
        ({"num_inference_steps": 3}, {"preset": "tcd"}, {"num_inference_steps": 4, "eta": 0.3}),
        ({"image": SMALL}, {"image": LARGE}, {"height": 32, "width": 32}),
        ({"image": SMALL, "height": 24}, {"image": SMALL.copy()}, {"height": 24, "width": 16}),
        ({"image": LARGE, "strength": 0.5}, {"image": None}, {"height": 16}),
        ({"image": LARGE, "mask_image": LARGE}, {"outpaint": (4, 0, 0, 0)}, {"width": 36}),
        ({"hires_scale": 2.0, "hires_strength": 0.7}, {"hires_scale": None}, {"height": 16}),
        ({"variation_strength": 0.5}, {"variation_strength": 0}, {"variation_strength": 0}),
        ({}, {"width": 512, "height": 512}, {"tile_size": 192}),
        ({"tile_size": 64}, {"seed": 4}, {"tile_size": 64}),
        ({}, {"width": 512, "height": 512, "tile_size": 0}, {"tile_size": 0}),
        ({"width": 512, "height": 512}, {"width": 16, "height": 16}, {"tile_size": 0}),
        ({"width": 96, "height": 96}, {"hires_scale": 4.0}, {"tile_size": 192}),
        ({"width": 96, "height": 96, "hires_scale": 4.0}, {"hires_scale": None}, {"tile_size": 0}),
        ({"image": SMALL}, {"image": WIDE}, {"tile_size": 192}),
        ({"image": SMALL}, {"outpaint": (0, 0, 4096, 0)}, {"tile_size": 192}),
    ],
)
def test_fields_replace_what_depends_on_them_in_the_request_of_a_result(made, fields, expected):
    result = resolve(GenerationRequest("red", **made), TINY_SPEC)

    request = resolve(request_from(result, fields), TINY_SPEC)

    assert {name: getattr(request, name) for name in expected} == expected


@pytest.mark.parametrize(
    "given",
    [
        {"sampler": "DPM++ 2M Karras"},
        {"sampler": "ddim", "schedule": "karras"},
        GenerationRequest(sampler="DPM++ 2M Karras"),
        GenerationRequest(sampler="ddim", schedule="karras"),
    ],
)
def test_a_name_that_carries_a_schedule_replaces_sampler_and_schedule(given):
    request = request_from(given, {"sampler": "DPM++ 2M SDE Exponential"})
    explicit = request_from(given, {"sampler": "Heun Exponential", "schedule": "Beta"})

    assert (request.sampler, request.schedule) == ("dpmpp_2m_sde", "exponential")
    assert (explicit.sampler, explicit.schedule) == ("heun", "beta")


@pytest.mark.parametrize("method", ["__call__", "generate", "stream"])
def test_a_misspelt_field_is_said_by_every_call(generator, method):
    with pytest.raises(RequestError, match=r"seeed: unknown field \(did you mean seed"):
        getattr(generator, method)("red", seeed=3)
    with pytest.raises(RequestError, match=r"seeed: unknown field \(did you mean seed"):
        generator.run_many([{"prompt": "red", "seeed": 3}])


def test_several_prompts_are_sent_to_the_call_that_takes_them(generator):
    for call in (generator, generator.generate, generator.stream):
        with pytest.raises(
            RequestError, match=r"prompt: is list; give one .* all of them to run_m"
        ):
            call(["red", "blue"])
        with pytest.raises(RequestError, match="prompt: is tuple; give one prompt"):
            call(prompt=("red", "blue"))


@pytest.mark.parametrize("seconds", ["5", 0, -1.0, True, float("nan")])
def test_a_deadline_that_is_no_number_of_seconds_is_refused_by_every_call(generator, seconds):
    for call in (generator, generator.generate, generator.stream):
        with pytest.raises(RequestError, match="deadline_seconds: must be a number above 0, got"):
            call("red", deadline_seconds=seconds)
    with pytest.raises(RequestError, match="deadline_seconds: must be a number above 0, got"):
        generator.run_many(["red"], deadline_seconds=seconds)


def test_many_requests_have_a_deadline_each(generator):
    results = generator.run_many(["red", "blue"], num_inference_steps=50, deadline_seconds=1e-6)

    with pytest.raises(DeadlineError, match=r"1e-06 s are over after step 1 of 50 of image 1"):
        next(results)
    assert len(list(generator.run_many(["red", "blue"], deadline_seconds=600))) == 2


def test_a_callback_sees_every_step(generator):
    seen = []

    generator("red", num_images=2, num_inference_steps=3, previews=True, on_step=seen.append)

    assert [(step.index, step.images) for step in seen] == [
        (index, range(image, image + 1)) for image in (0, 1) for index in (1, 2, 3)
    ]
    assert all(isinstance(step, Step) and step.previews for step in seen)


def test_an_exception_of_a_callback_ends_the_request_and_is_passed_on(generator):
    class EnoughError(Exception):
        pass

    def stop(step):
        seen.append(step)
        if len(seen) == 2:
            raise EnoughError

    seen = []
    with pytest.raises(EnoughError):
        generator("red", num_inference_steps=4, on_step=stop)

    assert len(seen) == 2
    assert isinstance(generator("red"), Result)


def test_progress_is_a_line_per_image_where_there_is_no_terminal(generator, capsys):
    generator("red", num_images=2, progress=True)

    lines = capsys.readouterr().err.splitlines()
    assert [re.sub(r"[\d.]+ s$", "0 s", line) for line in lines] == [
        "image 1/2      generated in 0 s",
        "image 2/2      generated in 0 s",
    ]


def test_progress_of_many_requests_is_a_line_for_each(generator, capsys):
    list(generator.run_many(["red", "blue"], progress=True))

    assert capsys.readouterr().err.count("generated in") == 2


def test_calls_are_silent_unless_asked(generator, capsys):
    generator("red")
    list(generator.run_many(["red"]))

    assert capsys.readouterr() == ("", "")


class Told:
    """A progress that remembers all it is told."""

    def __init__(self):
        self.events = []

    def plan(self, seconds):
        self.events.append(("plan", *seconds))

    def begin(self, step):
        self.events.append(("begin", step))

    def advance(self, fraction):
        self.events.append(("advance", fraction))

    def end(self, step, outcome):
        self.events.append(("end", step, outcome))


def test_progress_names_images_that_are_sampled_together(tiny_bundle):
    told = Told()
    with Generator(tiny_bundle, threads=1, batch_size=2) as generator:
        events = generator.stream("red", num_images=3, num_inference_steps=2)
        list(report_steps(events, [range(2), range(2, 3)], told))

    assert told.events == [
        ("plan", "images 1-2/3", "image 3/3"),
        ("begin", "images 1-2/3"),
        ("advance", 0.5),
        ("advance", 1.0),
        ("end", "images 1-2/3", "generated"),
        ("begin", "image 3/3"),
        ("advance", 0.5),
        ("advance", 1.0),
        ("end", "image 3/3", "generated"),
    ]


@pytest.mark.parametrize("value", ["2", 1.5, True, -1])
def test_arguments_that_count_are_whole_numbers(tiny_bundle, generator, value):
    for name in ("threads", "batch_size"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1 and whole, got "):
            Generator(tiny_bundle, **{name: value})
    with pytest.raises(ValueError, match="max_batch must be at least 1 and whole, got "):
        generator.run_many(["red"], max_batch=value)


def test_a_tile_size_that_is_no_number_is_refused_when_decoding(generator):
    with pytest.raises(RequestError, match="tile_size: must be a whole number, got '64'"):
        generator.decode(np.zeros((1, 4, 8, 8), dtype=np.float32), tile_size="64")


def test_a_generator_is_shown_by_bundle_task_size_and_backend(tiny_bundle):
    generator = Generator(tiny_bundle, backend="cpu")

    shown = f"Generator({str(tiny_bundle)!r}, text-to-image, 16x16, onnxruntime in fp32)"
    assert repr(generator) == shown
    generator.close()
    assert repr(generator) == shown.replace(", text", ", closed, text")


def test_what_a_session_shows_is_short(generator):
    *steps, result = generator.stream("red", seed=7, num_images=2)

    assert repr(steps[0]) == f"Step(1 of 4, image 0, sigma {steps[0].sigma:.4g}, 1x4x8x8)"
    assert repr(generator.spec) == (
        "ModelSpec(tiny, text-to-image, 16x16, v_prediction; autoencoder, text_encoder, unet)"
    )
    assert repr(result.request) == (
        "ResolvedRequest(text-to-image: prompt='red', height=16, width=16, num_inference_steps=4, "
        "guidance_scale=3.0, sampler='ddim', schedule='leading', eta=0.0, seed=7, num_images=2, "
        "tile_size=0)"
    )
    assert len(repr(generator.manifest)) < 200
    assert len(repr([*steps, result])) < 1000


@pytest.mark.parametrize(
    ("name", "meant"), [("cpuu", "cpu"), ("gpu", "cuda"), ("tensorrtx", "tensorrt")]
)
def test_the_backend_that_was_meant_is_said(tiny_bundle, name, meant):
    with pytest.raises(BackendError, match=rf"unknown backend '{name}' \(did you mean {meant}"):
        Generator(tiny_bundle, backend=name)


def test_a_request_with_nothing_but_defaults_is_one_of_a_model_without_prompts(bundle_of):
    with Generator(bundle_of("unconditional"), threads=1) as generator:
        result = generator(seed=2)
        assert pixels(generator.generate(None, seed=2)) == pixels(result)
        assert pixels(generator(parse_request({"seed": 2}))) == pixels(result)
    assert set(FIELDS) > {"prompt", "seed"}
