"""Latents that a request brings, in place of the noise of its seed."""

import io
import json

import numpy as np
import pytest

from ldm_runtime import GenerationRequest, Generator, RequestError
from ldm_runtime.inputs.initial_latents import InitialLatents
from ldm_runtime.noise import TorchCpuGenerator
from ldm_runtime.requests.resolution import resolve
from ldm_runtime.testing import TINY_SPEC

SHAPE = (1, 4, 8, 8)


@pytest.fixture(scope="module")
def generator(tiny_bundle):
    with Generator(tiny_bundle, threads=1) as generator:
        yield generator


def noise(*seeds, shape=SHAPE):
    return np.concatenate([TorchCpuGenerator(seed).randn(shape) for seed in seeds])


def pixels(result):
    return [image.tobytes() for image in result]


@pytest.mark.parametrize("schedule", ["leading", "karras"])
def test_the_noise_of_a_seed_gives_the_images_of_that_seed(generator, schedule):
    fields = {"prompt": "red", "num_images": 2, "schedule": schedule}

    given = generator(**fields, latents=noise(5, 6), seed=1)

    assert pixels(given) == pixels(generator(**fields, seed=5))


def test_the_noise_of_later_steps_is_the_seed_s_from_its_start(generator):
    fields = {"prompt": "red", "sampler": "euler_ancestral", "latents": noise(5)}

    one, same, other = (generator(**fields, seed=seed) for seed in (1, 1, 2))

    assert pixels(one) == pixels(same) != pixels(other)


def test_every_image_has_its_own_latents_whatever_it_is_batched_with(generator, tiny_bundle):
    latents = noise(5, 6, 7)
    alone = [pixels(generator("red", latents=latents[i : i + 1], seed=i))[0] for i in range(3)]

    (together,) = generator.run_many(["red"], latents=latents, num_images=3, seed=0)

    assert pixels(together) == alone
    with Generator(tiny_bundle, threads=1, batch_size=3) as batched:
        result = batched("red", latents=latents, num_images=3, seed=0)
    assert np.abs(np.asarray(result[2], int) - np.asarray(together[2], int)).max() <= 1


def test_an_image_is_noised_with_them(generator):
    image = np.full((16, 16, 3), 99, dtype=np.uint8)
    fields = {"prompt": "red", "image": image, "strength": 0.5}

    given = generator(**fields, latents=noise(5), seed=1)

    assert pixels(given) == pixels(generator(**fields, seed=5))


def test_a_second_pass_has_noise_of_its_own_size(generator):
    result = generator("red", latents=noise(5), seed=5, hires_scale=2.0)

    assert result.image.size == (32, 32)


def test_metadata_names_the_latents_of_its_image_by_their_hash(generator):
    result = generator("red", latents=noise(5, 6), num_images=2, seed=1)

    request = json.loads(json.dumps(result.metadata(1)))["request"]

    kept = InitialLatents(noise(6))
    assert request["latents"] == {"sha256": kept.sha256, "shape": list(SHAPE)}
    assert pixels(generator(**request | {"latents": kept}))[0] == pixels(result)[1]
    with pytest.raises(RequestError, match="latents: is known by its hash alone"):
        generator(**request)


def test_files_and_arrays_of_other_types_are_read(tmp_path):
    array = noise(3)
    file = io.BytesIO()
    np.save(file, array.astype(np.float64))
    (tmp_path / "noise.npy").write_bytes(file.getvalue())

    values = (array, array.astype(">f8"), file.getvalue(), tmp_path / "noise.npy")

    assert {GenerationRequest("red", latents=value).latents for value in values} == {
        InitialLatents(array)
    }


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "holds no latents; give a path"),
        ([[1.0]], "holds no latents; give a path"),
        (np.zeros((4, 8, 8), np.float32), r"of float32 and shape \(4, 8, 8\); give floating"),
        (np.zeros(SHAPE, np.int64), "of int64 and shape"),
        (np.zeros((0, 4, 8, 8), np.float32), "give 1 to"),
        (np.full(SHAPE, np.nan), "NaN, infinity"),
        (np.full(SHAPE, 1e300), "too large for float32"),
        (b"no array", "is not a readable .npy file"),
        ("no/such/file.npy", "cannot be read"),
    ],
)
def test_what_holds_no_latents_is_refused(value, message):
    with pytest.raises(RequestError, match=f"^latents: .*{message}"):
        GenerationRequest("red", latents=value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_images": 3}, "latents: are 1, but num_images is 3; give one for each image"),
        ({"height": 24}, r"latents: have shape 1x4x8x8; 16x24 pixels of this model take 1x4x12x8"),
        ({"variation_strength": 0.5}, "variation_strength: does not go with latents"),
    ],
)
def test_latents_that_do_not_fit_the_request_are_refused(fields, message):
    with pytest.raises(RequestError, match=message):
        resolve(GenerationRequest("red", latents=noise(1), **fields), TINY_SPEC)
