"""Whole requests of every task on the tiny bundles: bytes, batches, streams, files and checks."""

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest

from ldm_runtime import GenerationRequest, Generator, Result, Step
from ldm_runtime.backends import get_backend
from ldm_runtime.bundle.manifest import encode_manifest, load_manifest
from ldm_runtime.conditioning import conditioning_components
from ldm_runtime.diagnostics.verify import verify
from ldm_runtime.errors import BundleError, RequestError
from ldm_runtime.latents.codec import to_uint8
from ldm_runtime.pipeline.image_files import read_metadata, save_image
from ldm_runtime.pipeline.passes import open_passes
from ldm_runtime.requests.resolution import resolve
from ldm_runtime.specs.model import Task, components_of
from ldm_runtime.specs.tasks import task_record
from ldm_runtime.testing import (
    FakeEngine,
    tiny_networks,
    tiny_requests,
    tiny_spec,
    write_tiny_bundle,
)
from ldm_runtime.tiling.patches import over_patches

TASKS = get_args(Task)
SAMPLED = [task for task in TASKS if task != "autoencoder"]
UNGUIDED = ["unconditional", "semantic-synthesis", "super-resolution", "inpainting"]
RNG = np.random.default_rng(5)
PICTURE = RNG.integers(0, 256, (24, 32, 3), dtype=np.uint8)
LEFT_HALF = np.zeros((24, 32), dtype=np.uint8)
LEFT_HALF[:, :16] = 255


@pytest.fixture(scope="module")
def generator_of(bundle_of):
    """Opens the bundle of a task, once."""
    opened = {}

    def find(task):
        if task not in opened:
            opened[task] = Generator(bundle_of(task), threads=1)
        return opened[task]

    yield find
    for generator in opened.values():
        generator.close()


def request_of(task, **fields):
    return replace(tiny_requests(task)[0], **fields)


def pixels(result):
    return [image.tobytes() for image in result.images]


@pytest.mark.parametrize("task", TASKS)
def test_every_bundle_keeps_its_promises(bundle_of, task):
    checks = list(verify(bundle_of(task), threads=1))

    assert all(check.passed for check in checks)
    components = {check.subject for check in checks if check.measure == "max_relative_error"}
    assert components == {*components_of(tiny_spec(task))}
    pictures = [check for check in checks if check.measure == "psnr"]
    assert len(pictures) == sum(each.num_images for each in tiny_requests(task))


@pytest.mark.parametrize("task", SAMPLED)
def test_the_conditioning_that_golden_requests_were_drawn_with_is_kept(bundle_of, task):
    spec = tiny_spec(task)

    with np.load(bundle_of(task) / "golden/0/golden.npz") as arrays:
        names = {*arrays}

    assert ("context" in names) == (spec.unet.context_dim is not None)
    assert ("concat" in names) == (spec.unet.concat_channels > 0)


@pytest.mark.parametrize("task", TASKS)
def test_a_request_drawn_again_gives_the_same_bytes(generator_of, task):
    generator = generator_of(task)

    first = generator.generate(request_of(task))
    again = generator.generate(first.request)

    assert pixels(again) == pixels(first)
    assert again.latents.tobytes() == first.latents.tobytes()
    assert first.request == resolve(first.request, generator.spec)


@pytest.mark.parametrize("task", SAMPLED)
def test_the_seed_changes_the_picture_and_image_i_is_that_of_seed_plus_i(generator_of, task):
    generator = generator_of(task)

    both = generator.generate(request_of(task, seed=7, num_images=2))
    second = generator.generate(request_of(task, seed=8, num_images=1))

    assert pixels(both)[1] == pixels(second)[0] != pixels(both)[0]


@pytest.mark.parametrize("task", SAMPLED)
def test_a_larger_batch_draws_the_same_pictures(bundle_of, generator_of, task):
    request = request_of(task, num_images=3)

    with Generator(bundle_of(task), threads=1, batch_size=3) as generator:
        together = generator.generate(request)

    alone = generator_of(task).generate(request)
    np.testing.assert_allclose(together.latents, alone.latents, rtol=0, atol=1e-5)


@pytest.mark.parametrize("task", TASKS)
def test_requests_drawn_together_are_bit_for_bit_what_they_are_alone(generator_of, task):
    generator = generator_of(task)
    requests = [*tiny_requests(task), request_of(task, seed=11 if task in SAMPLED else None)]
    alone = [generator.generate(request) for request in requests]

    together = list(generator.run_many(requests, max_batch=2))

    for ours, expected in zip(together, alone, strict=True):
        assert ours.latents.tobytes() == expected.latents.tobytes()
        assert pixels(ours) == pixels(expected)


@pytest.mark.parametrize("task", SAMPLED)
def test_a_stream_has_a_step_for_each_and_may_be_left(generator_of, task):
    request = request_of(task, num_inference_steps=3, num_images=1)

    *steps, result = generator_of(task).stream(request, previews=True)

    assert [(step.index, step.total) for step in steps] == [(1, 3), (2, 3), (3, 3)]
    assert isinstance(result, Result)
    height, width = result.latents.shape[2:]
    assert {step.previews[0].size for step in steps} == {(width, height)}
    stream = generator_of(task).stream(request)
    assert isinstance(next(stream), Step)
    stream.close()


def test_a_first_stage_alone_has_a_result_without_steps(generator_of):
    (result,) = generator_of("autoencoder").stream(request_of("autoencoder"), previews=True)

    assert isinstance(result, Result)
    assert {*result.timings} == {"vae_encoder", "vae_decoder", "total"}


@pytest.mark.parametrize("task", SAMPLED)
def test_timings_name_the_networks_that_a_request_takes(generator_of, task):
    timings = generator_of(task).generate(request_of(task)).timings

    expected = {*conditioning_components(tiny_spec(task)), "unet", "vae_decoder", "total"}
    starts = task_record(tiny_spec(task)).image == "start"
    encodes = starts and request_of(task).image is not None
    assert {*timings} == expected | ({"vae_encoder"} if encodes else set())


@pytest.mark.parametrize("task", TASKS)
def test_a_picture_says_how_it_was_made(generator_of, tmp_path, task):
    result = generator_of(task).generate(request_of(task))

    save_image(result.images[0], tmp_path / "0.png", result.metadata(0))

    stored = read_metadata(tmp_path / "0.png")["request"]
    assert stored["seed"] == result.request.seed
    for name in ("image", "mask_image", "segmentation", "embeddings", "depth_map"):
        value = getattr(result.request.as_request(), name)
        assert value is None or stored[name]["sha256"] == value.sha256


@pytest.mark.parametrize("task", TASKS)
def test_only_the_networks_that_requests_take_are_opened_at_first(bundle_of, monkeypatch, task):
    opened = []
    backend = get_backend("onnxruntime")
    open_engine = backend.open_engine

    def record(source):
        opened.append(source.component.name)
        return open_engine(source)

    monkeypatch.setattr(backend, "open_engine", record)
    with Generator(bundle_of(task), backend="onnxruntime", threads=1):
        pass

    waits = {"vae_encoder"} - {*conditioning_components(tiny_spec(task))}
    assert opened == [name for name in components_of(tiny_spec(task)) if name not in waits]


@pytest.mark.parametrize("task", TASKS)
def test_a_picture_is_encoded_and_decoded_by_every_bundle(generator_of, task):
    generator, spec = generator_of(task), tiny_spec(task)

    latents = generator.encode(PICTURE)
    (image,) = generator.decode(latents)

    scale = spec.autoencoder.latent_scale_factor
    networks = tiny_networks(task)
    moments = networks["vae_encoder"](
        {"image": (PICTURE.transpose(2, 0, 1)[None] / 127.5 - 1).astype(np.float32)}
    )["moments"]
    np.testing.assert_allclose(
        latents, scale * moments[:, : spec.autoencoder.embed_dim], rtol=0, atol=1e-5
    )
    expected = to_uint8(networks["vae_decoder"]({"latents": latents / scale})["image"])[0]
    assert np.abs(np.asarray(image).astype(int) - expected).max() <= 1


def test_what_cannot_be_encoded_or_decoded_is_refused(generator_of):
    generator = generator_of("autoencoder")

    with pytest.raises(RequestError, match=r"image: .*31x24 pixels; make both sides multiples"):
        generator.encode(PICTURE[:, 1:])
    with pytest.raises(RequestError, match="image: 5 is not an image"):
        generator.encode(5)
    with pytest.raises(RequestError, match=r"latents: are float\d\d of shape \(1, 4, 8, 8\)"):
        generator.decode(np.zeros((1, 4, 8, 8), dtype=np.float32))
    with pytest.raises(RequestError, match="tile_size: "):
        generator.decode(np.zeros((1, 3, 8, 8), dtype=np.float32), tile_size=15)
    with pytest.raises(RequestError, match="latents: hold NaN or infinity"):
        generator.decode(np.full((1, 3, 8, 8), np.nan))
    with pytest.raises(RequestError, match=r"latents: are <U1 of shape \(1,\)"):
        generator.decode(["a"])
    with pytest.raises(RequestError, match="tile_size: means nothing to a bundle for super-res"):
        generator_of("super-resolution").decode(np.zeros((1, 3, 8, 8)), tile_size=16)


def test_a_first_stage_returns_what_encode_and_decode_do(generator_of):
    generator = generator_of("autoencoder")

    result = generator(image=PICTURE)

    assert result.latents.tobytes() == generator.encode(PICTURE).tobytes()
    assert pixels(result) == [image.tobytes() for image in generator.decode(result.latents)]


def test_a_first_stage_pads_a_picture_of_odd_sides_and_crops_what_comes_back(
    generator_of,
):
    odd = PICTURE[:, :31]
    grown = np.concatenate([odd, odd[:, -1:]], axis=1)

    result, whole = (generator_of("autoencoder")(image=each) for each in (odd, grown))

    assert result.images[0].size == (31, 24)
    np.testing.assert_array_equal(result.images[0], np.asarray(whole.images[0])[:, :31])


@pytest.mark.parametrize("task", ["inpainting", "unconditional"])
def test_what_is_kept_of_a_picture_of_any_size_is_kept_to_the_last_bit(generator_of, task):
    picture, mask = PICTURE[:23, :29], LEFT_HALF[:23, :29]

    result = generator_of(task)(image=picture, mask_image=mask, seed=1, num_inference_steps=2)

    found = np.asarray(result.images[0])
    assert found.shape == picture.shape
    np.testing.assert_array_equal(found[:, 16:], picture[:, 16:])
    assert (found[:, :16] != picture[:, :16]).mean() > 0.5


@pytest.mark.parametrize("task", ["inpainting", "unconditional"])
def test_pixels_up_to_half_of_a_soft_mask_are_known_and_kept_to_the_last_bit(generator_of, task):
    ramp = np.broadcast_to(np.linspace(0, 252, 32).astype(np.uint8), (24, 32))

    result = generator_of(task)(image=PICTURE, mask_image=ramp, seed=1, num_inference_steps=2)

    found, known = np.asarray(result.images[0]), ramp < 128
    np.testing.assert_array_equal(found[known], PICTURE[known])
    assert (found[~known] != PICTURE[~known]).mean() > 0.5


def test_an_inpainting_model_takes_a_soft_mask_for_the_mask_in_two_colours(generator_of):
    soft = RNG.integers(0, 256, (24, 32), dtype=np.uint8)
    fields = {"image": PICTURE, "seed": 1, "num_inference_steps": 2}

    binary = np.where(soft < 128, 0, 255).astype(np.uint8)
    results = [generator_of("inpainting")(mask_image=each, **fields) for each in (soft, binary)]

    np.testing.assert_array_equal(*(each.images[0] for each in results))


def test_a_scene_has_the_size_of_its_map_whatever_that_is(generator_of):
    ids = RNG.integers(0, 3, (23, 29), dtype=np.uint8)

    result = generator_of("semantic-synthesis")(segmentation=ids, seed=1, num_inference_steps=2)

    assert result.images[0].size == (29, 23)


@pytest.mark.parametrize("size", [(4, 4), (5, 7), (1, 1), (9, 14), (150, 131)])
def test_a_picture_of_any_size_is_enlarged_to_twice_its_sides(generator_of, size):
    picture = RNG.integers(0, 256, (*size, 3), dtype=np.uint8)

    result = generator_of("super-resolution")(image=picture, num_inference_steps=1, seed=1)

    assert result.images[0].size == (2 * size[1], 2 * size[0])
    assert all(length % 2 == 0 for length in result.latents.shape[2:])


def test_a_large_picture_is_enlarged_and_decoded_patch_by_patch(generator_of):
    picture = RNG.integers(0, 256, (132, 40, 3), dtype=np.uint8)
    generator = generator_of("super-resolution")

    result = generator(image=picture, num_inference_steps=2, seed=1)

    decoder = FakeEngine(tiny_networks("super-resolution")["vae_decoder"])
    image = over_patches(lambda part: decoder.run({"latents": part})["image"], result.latents, 2)
    assert {call["latents"].shape[2:] for call in decoder.calls} == {(128, 40)}
    difference = np.asarray(result.images[0]).astype(int) - to_uint8(image)[0]
    assert np.abs(difference).max() <= 1


def test_the_unet_of_a_large_picture_never_sees_more_than_a_patch(bundle_of, monkeypatch):
    shapes = []
    backend = get_backend("onnxruntime")

    def fake(source):
        engine = FakeEngine(tiny_networks("super-resolution")[source.component.name])
        if source.component.name == "unet":
            shapes.append(engine.calls)
        return engine

    monkeypatch.setattr(backend, "open_engine", fake)
    picture = RNG.integers(0, 256, (200, 129, 3), dtype=np.uint8)
    with Generator(bundle_of("super-resolution"), backend="onnxruntime") as generator:
        generator(image=picture, num_inference_steps=1)

    # 200 rows take patches at 0, 64 and 72; 129 columns, padded to 130, at 0 and 2.
    assert [call["latents"].shape for call in shapes[0]] == [(1, 6, 128, 128)] * 6


def test_where_nothing_is_to_be_filled_the_picture_is_kept_to_the_last_bit(generator_of):
    result = generator_of("inpainting")(image=PICTURE, mask_image=LEFT_HALF, seed=1)

    found = np.asarray(result.images[0])
    np.testing.assert_array_equal(found[:, 16:], PICTURE[:, 16:])
    assert (found[:, :16] != PICTURE[:, :16]).mean() > 0.5


def test_a_hole_is_filled_from_noise_whatever_was_in_it(generator_of):
    other = PICTURE.copy()
    other[:, :16] = 255 - other[:, :16]

    first, second = (
        generator_of("inpainting")(image=picture, mask_image=LEFT_HALF, seed=1)
        for picture in (PICTURE, other)
    )

    assert pixels(first) == pixels(second)
    assert first.request.as_request().strength is None


def test_the_region_of_an_inpainting_model_may_be_blurred(generator_of):
    """What the model sees has two colours, and what it generates fades out beyond the edge."""
    sharp, blurred = (
        generator_of("inpainting")(image=PICTURE, mask_image=LEFT_HALF, mask_blur=blur, seed=1)
        for blur in (None, (2, 2))
    )

    found = np.asarray(blurred.images[0])
    assert (blurred.latents == sharp.latents).all()
    assert (found[:, 21:] == PICTURE[:, 21:]).all()
    assert (found[:, :16] == np.asarray(sharp.images[0])[:, :16]).all()
    assert (found[:, 16] != PICTURE[:, 16]).mean() > 0.5


def test_an_inpainting_model_draws_around_a_picture(generator_of):
    result = generator_of("inpainting")(image=PICTURE, outpaint=(8, 0, 0, 4), seed=1)

    assert result.images[0].size == (40, 28)
    np.testing.assert_array_equal(np.asarray(result.images[0])[:24, 8:], PICTURE)


@pytest.mark.parametrize("task", ["unconditional", "class-to-image", "semantic-synthesis"])
def test_models_without_prompts_start_from_pictures_and_masks_as_well(generator_of, task):
    fields = {"image": GenerationRequest(image=PICTURE).image, "num_images": 1}
    mask = GenerationRequest(image=LEFT_HALF).image

    less = generator_of(task).generate(request_of(task, **fields, strength=0.3))
    masked = generator_of(task).generate(request_of(task, **fields, mask_image=mask))

    image = fields["image"].to_image()
    latents = generator_of(task).encode(image.resize(less.images[0].size))
    assert "vae_encoder" in less.timings
    assert np.abs(less.latents - latents).mean() < 1
    kept = np.asarray(masked.images[0])[:, masked.images[0].width // 2 + 2 :]
    original = np.asarray(image.resize(masked.images[0].size, 1))
    np.testing.assert_array_equal(kept, original[:, masked.images[0].width // 2 + 2 :])


@pytest.mark.parametrize("task", UNGUIDED)
def test_what_conditions_the_latents_lies_behind_every_row_and_is_never_scaled(task):
    spec = tiny_spec(task)
    request = resolve(request_of(task, num_images=2, num_inference_steps=2), spec)
    networks = {name: FakeEngine(each) for name, each in tiny_networks(task).items()}
    passes = open_passes(networks.__getitem__, None, request, spec)
    wanted = next(passes.run(range(2)))

    from ldm_runtime.pipeline.sampling import sample_latents

    list(sample_latents(networks["unet"], wanted.conditioning, wanted.request, spec, range(2)))

    for call in networks["unet"].calls:
        assert {*call} == {"latents", "timesteps"}
        assert call["latents"].shape[:2] == (2, spec.unet.in_channels)
        for row in call["latents"][:, spec.unet.out_channels :]:
            if passes.conditioning.concat is not None:
                np.testing.assert_array_equal(row, passes.conditioning.concat[0])


def test_a_call_without_a_prompt_says_what_is_missing(generator_of):
    with pytest.raises(RequestError, match="class_label: this bundle is class-to-image: give"):
        generator_of("class-to-image")()
    with pytest.raises(RequestError, match="prompt: means nothing to this bundle"):
        generator_of("unconditional")("a red circle")
    assert generator_of("unconditional")().images


def test_a_bundle_that_lacks_a_network_of_its_model_does_not_open(tmp_path):
    write_tiny_bundle(tmp_path, "class-to-image")
    manifest = load_manifest(tmp_path)
    left = tuple(each for each in manifest.components if each.name != "class_embedder")
    (tmp_path / "manifest.json").write_bytes(encode_manifest(replace(manifest, components=left)))

    with pytest.raises(BundleError, match="no component 'class_embedder'"):
        Generator(tmp_path)
