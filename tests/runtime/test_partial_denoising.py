"""Runs that stop before the noise is gone, and runs that go on from their latents."""

from dataclasses import replace

import numpy as np
import pytest

from ldm_runtime import Generator, RequestError
from ldm_runtime.pipeline.sampling import Step
from ldm_runtime.requests.request import parse_request
from ldm_runtime.requests.resolution import resolve
from ldm_runtime.requests.sizes import latent_size
from ldm_runtime.samplers import SAMPLERS
from ldm_runtime.schedules import steps_until, timestep_at, training_sigmas
from ldm_runtime.specs.tasks import TASKS
from ldm_runtime.testing import TINY_SPEC, tiny_requests, tiny_spec

PICTURE = np.full((16, 16, 3), 99, dtype=np.uint8)
LATENTS = np.ones((1, 4, 8, 8), dtype=np.float32)
#: Deterministic samplers that look at nothing but the latents of a step.
MEMORYLESS = ["ddim", "euler", "heun", "dpm2"]
#: Tasks whose image is a condition, and not where sampling starts.
BY_IMAGE = [name for name, task in TASKS.items() if task.samples and task.image != "start"]
FIELDS = {"prompt": "red", "seed": 5, "num_inference_steps": 10, "schedule": "trailing"}


@pytest.fixture(scope="module")
def generator(tiny_bundle):
    with Generator(tiny_bundle, threads=1) as generator:
        yield generator


def resolved(**fields):
    return resolve(parse_request(FIELDS | fields), TINY_SPEC)


def steps_of(generator, **fields):
    return [each for each in generator.stream(**FIELDS | fields) if isinstance(each, Step)]


@pytest.mark.parametrize(("share", "timestep"), [(0.0, 1000), (0.8, 200), (0.8005, 200), (1.0, 0)])
def test_a_share_of_the_schedule_is_a_training_timestep(share, timestep):
    assert timestep_at(training_sigmas(TINY_SPEC.alphas_cumprod), share) == timestep


@pytest.mark.parametrize(("share", "steps"), [(0.0, 0), (0.001, 1), (0.5, 5), (0.501, 6), (1, 10)])
def test_a_step_belongs_to_the_share_that_it_starts_in(share, steps):
    """Ten steps of the schedule "trailing" start at the timesteps 999, 899, …, 99."""
    table = training_sigmas(TINY_SPEC.alphas_cumprod)

    assert steps_until(table, share, resolved().sigmas) == steps


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_run_that_stops_early_makes_the_first_steps_of_the_whole_run(generator, sampler):
    whole = steps_of(generator, sampler=sampler)
    part = steps_of(generator, sampler=sampler, denoising_end=0.7)

    assert [each.total for each in part] == [7] * 7
    for step, same in zip(part, whole, strict=False):
        np.testing.assert_array_equal(step.latents, same.latents)


@pytest.mark.parametrize("sampler", MEMORYLESS)
def test_two_runs_one_after_the_other_are_one(generator, sampler):
    fields = FIELDS | {"sampler": sampler, "num_images": 2}
    whole = generator(**fields)
    first = generator(**fields, denoising_end=0.7)

    second = generator(**fields, denoising_start=0.7, latents=first.latents)

    assert np.abs(first.latents - whole.latents).max() > 0.1
    np.testing.assert_allclose(second.latents, whole.latents, atol=1e-5)


@pytest.mark.parametrize("task", BY_IMAGE)
def test_two_runs_with_an_image_as_their_condition_are_one(bundle_of, task):
    with Generator(bundle_of(task), threads=1) as generator:
        for request in tiny_requests(task):
            fields = {"sampler": "ddim", "schedule": "trailing", "num_inference_steps": 10}
            whole = generator(request, **fields)
            first = generator(request, **fields, denoising_end=0.7)

            second = generator(request, **fields, denoising_start=0.7, latents=first.latents)

            assert np.abs(first.latents - whole.latents).max() > 0.1
            np.testing.assert_allclose(second.latents, whole.latents, atol=1e-5)
            for image, expected in zip(second, whole, strict=True):
                np.testing.assert_allclose(np.int16(image), np.int16(expected), atol=1)


@pytest.mark.parametrize("task", BY_IMAGE)
def test_the_second_part_of_a_run_with_an_image_as_its_condition_resolves_once(task):
    spec, request = tiny_spec(task), tiny_requests(task)[1]
    size = latent_size(resolve(request, spec), spec)
    latents = np.ones((1, spec.autoencoder.embed_dim, *size), np.float32)

    second = resolve(replace(request, latents=latents, denoising_start=0.5), spec)

    assert resolve(second, spec) == second


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_goes_on_from_latents(generator, sampler):
    first = generator(**FIELDS, sampler=sampler, denoising_end=0.7)

    steps = steps_of(generator, sampler=sampler, denoising_start=0.7, latents=first.latents)

    assert len(steps) == 3
    assert steps[-1].sigma == resolved(sampler=sampler).sigmas[-1]


def test_an_image_to_start_from_counts_its_strength_from_the_end(generator):
    steps = steps_of(generator, image=PICTURE, strength=0.5, denoising_end=0.7)

    assert [each.index for each in steps] == [1, 2]


@pytest.mark.parametrize(
    "fields",
    [
        {"denoising_end": 0.5},
        {"denoising_end": 0.9, "denoising_start": 0.5, "latents": LATENTS},
        {"denoising_end": 0.5, "image": PICTURE},
    ],
)
def test_a_part_of_a_run_resolves_once_and_for_all(fields):
    request = resolved(**fields)

    assert resolve(request, TINY_SPEC) == request
    assert resolve(request.of_image(0), TINY_SPEC) == request


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            {"denoising_start": 0.5},
            "denoising_start: means nothing without latents; give those of a run with "
            "denoising_end",
        ),
        (
            {"denoising_start": 0.5, "latents": LATENTS, "image": PICTURE},
            "denoising_start: does not go with image; leave one of them out",
        ),
        (
            {"denoising_end": 0.5, "hires_scale": 2.0},
            "denoising_end: does not go with hires_scale; leave one of them out",
        ),
        (
            {"denoising_end": 0.0},
            "denoising_end: 0 of the noise schedule leaves no step to make; raise it",
        ),
        (
            {"denoising_end": 0.5, "image": PICTURE, "strength": 0.4},
            "denoising_end: 0.5 of the noise schedule leaves no step to make; raise it",
        ),
        (
            {"denoising_start": 1.0, "latents": LATENTS},
            "denoising_start: after 1 of the noise schedule there is no step to make; lower it",
        ),
        (
            {"denoising_start": 0.8, "denoising_end": 0.5, "latents": LATENTS},
            "denoising_start: after 0.8 of the noise schedule there is no step to make; lower it",
        ),
    ],
)
def test_parts_without_a_step_or_a_beginning_are_refused(fields, sentence):
    with pytest.raises(RequestError) as caught:
        resolved(**fields)

    assert str(caught.value) == sentence
