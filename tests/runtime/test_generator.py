import dataclasses
import gc
import json
import logging
import math
import threading
import time

import numpy as np
import pytest

from ldm_runtime import GenerationRequest, Generator, Result, Step
from ldm_runtime.conditioning import Conditioning, encode_conditioning, open_tokenizer
from ldm_runtime.errors import BackendError, BundleError, ManifestError, RequestError
from ldm_runtime.latents.codec import decode_latents
from ldm_runtime.noise import TorchCpuGenerator
from ldm_runtime.pipeline.image_files import read_metadata
from ldm_runtime.pipeline.sampling import batches, sample_latents
from ldm_runtime.requests.resolution import resolve
from ldm_runtime.samplers import SAMPLERS
from ldm_runtime.schedules import initial_scale
from ldm_runtime.testing import TINY_SPEC, FakeEngine, tiny_networks


@pytest.fixture(scope="module")
def generator(tiny_bundle):
    with Generator(tiny_bundle, threads=1) as generator:
        yield generator


def resolved(**fields):
    return resolve(GenerationRequest(prompt="a red circle", **fields), TINY_SPEC)


def pixels(result):
    return [image.tobytes() for image in result.images]


def test_a_prompt_becomes_pictures_of_the_requested_size(generator):
    result = generator(prompt="a red circle", height=24, width=32, seed=1, num_images=2)

    assert [image.size for image in result.images] == [(32, 24), (32, 24)]
    assert {image.mode for image in result.images} == {"RGB"}
    assert result.latents.shape == (2, 4, 12, 16)
    assert result.latents.dtype == np.float32


def test_the_result_says_what_was_drawn(generator):
    result = generator(prompt="a red circle")

    assert result.request == resolve(result.request, TINY_SPEC)
    assert (result.request.sampler, result.request.height) == ("ddim", 16)
    assert pixels(generator.generate(result.request)) == pixels(result)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_and_prompt_part_and_seed_changes_the_picture(generator, sampler):
    base = {"prompt": "a red circle", "sampler": sampler, "seed": 1}
    changes = [{}, {"prompt": "blue"}, {"negative_prompt": "blue"}, {"seed": 2}]
    changes += [{"guidance_scale": 1}, {"num_inference_steps": 5}]

    pictures = {pixels(generator(**(base | change)))[0] for change in changes}

    assert len(pictures) == len(changes)


def test_the_negative_prompt_does_not_matter_without_guidance(generator):
    fields = {"prompt": "red", "seed": 1, "guidance_scale": 1}

    assert pixels(generator(**fields)) == pixels(generator(**fields, negative_prompt="blue"))


@pytest.mark.parametrize("sampler", ["ddim", "euler_ancestral"])
def test_image_i_is_what_seed_plus_i_draws_alone(generator, sampler):
    together = generator(prompt="red", seed=40, num_images=3, sampler=sampler)
    alone = [generator(prompt="red", seed=40 + i, sampler=sampler) for i in range(3)]

    assert pixels(together) == [pixels(each)[0] for each in alone]
    assert [together.metadata(i)["request"]["seed"] for i in range(3)] == [40, 41, 42]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_batch_size_does_not_change_a_picture(tiny_bundle, generator, sampler):
    request = resolved(seed=3, num_images=5, sampler=sampler, height=12)

    with Generator(tiny_bundle, threads=1, batch_size=3) as in_threes:
        result = in_threes.generate(request)

    assert pixels(result) == pixels(generator.generate(request))


def test_ddim_without_noise_is_euler(generator):
    ddim = sample_latents(*_unet(), resolved(sampler="ddim", seed=1), TINY_SPEC)
    euler = sample_latents(*_unet(), resolved(sampler="euler", seed=1), TINY_SPEC)

    for mine, theirs in list(zip(ddim, euler, strict=True))[:-1]:  # their ends differ
        np.testing.assert_array_equal(mine.latents, theirs.latents)


def _unet():
    context = np.ones((2, 16, 8), dtype=np.float32)
    return FakeEngine(tiny_networks()["unet"]), Conditioning(context=context)


def test_sampling_starts_from_torchs_noise_of_each_seed():
    engine, conditioning = _unet()
    request = resolved(seed=6, num_images=2)
    sigmas = request.sigmas

    next(sample_latents(engine, conditioning, request, TINY_SPEC))

    noise = np.stack([TorchCpuGenerator(seed).randn((4, 8, 8)) for seed in (6, 7)])
    first = noise * initial_scale(sigmas, "leading") / math.hypot(1, sigmas[0])
    np.testing.assert_allclose(engine.calls[0]["latents"], np.concatenate([first, first]))


def test_guidance_runs_both_halves_in_one_call_and_none_runs_one_half():
    engine, conditioning = _unet()
    cond = Conditioning(context=conditioning.context[1:])

    list(sample_latents(engine, conditioning, resolved(num_images=3), TINY_SPEC))
    list(sample_latents(engine, cond, resolved(guidance_scale=1), TINY_SPEC))

    assert [len(call["latents"]) for call in engine.calls] == [6] * 4 + [1] * 4
    assert [len(call["context"]) for call in engine.calls] == [6] * 4 + [1] * 4
    assert all(call["timesteps"].dtype == np.float32 for call in engine.calls)


def test_steps_count_up_and_end_with_what_is_decoded(generator):
    request = resolved(seed=1, sampler="ddim", num_inference_steps=5)
    sigmas = request.sigmas

    *steps, result = generator.stream(request)

    assert all(type(step) is Step for step in steps)
    assert [(step.index, step.total) for step in steps] == [(i, 5) for i in range(1, 6)]
    assert [step.sigma for step in steps] == list(sigmas[1:])
    assert type(result) is Result
    np.testing.assert_array_equal(steps[-1].latents, result.latents)


def test_the_latents_of_a_step_are_what_the_network_is_fed_next():
    engine, conditioning = _unet()

    steps = list(sample_latents(engine, conditioning, resolved(guidance_scale=3), TINY_SPEC))

    for step, call in zip(steps[:-1], engine.calls[1:], strict=True):
        np.testing.assert_array_equal(np.split(call["latents"], 2)[1], step.latents)


@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpmpp_2m"])
def test_a_network_that_always_sees_the_same_picture_draws_it_along_a_straight_line(sampler):
    spec = dataclasses.replace(TINY_SPEC, prediction_type="sample")
    engine = FakeEngine(lambda inputs: {"prediction": np.full_like(inputs["latents"], 0.25)})
    request = resolved(sampler=sampler, guidance_scale=1, seed=3)
    sigmas = request.sigmas
    start = TorchCpuGenerator(3).randn((1, 4, 8, 8)) * initial_scale(sigmas, "leading")

    steps = list(
        sample_latents(engine, Conditioning(context=np.ones((1, 16, 8), dtype="f4")), request, spec)
    )

    for step in steps:
        expected = 0.25 + (start - 0.25) * step.sigma / sigmas[0]
        expected /= math.hypot(1, step.sigma)
        np.testing.assert_allclose(step.latents, expected, rtol=1e-5, atol=1e-5)
    assert (steps[-1].sigma > 0) == (sampler == "ddim")


def test_steps_of_several_batches_say_which_images_they_are_of(tiny_bundle):
    request = resolved(seed=1, num_images=3, num_inference_steps=2)

    with Generator(tiny_bundle, batch_size=2) as generator:
        *steps, result = generator.stream(request)

    assert [step.images for step in steps] == [range(2)] * 2 + [range(2, 3)] * 2
    assert [len(step.latents) for step in steps] == [2, 2, 1, 1]
    assert len(result.images) == 3


def test_a_step_belongs_to_the_caller(generator):
    request = resolved(seed=1)
    stream = generator.stream(request)

    for event in stream:
        if isinstance(event, Step):
            event.latents[...] = np.nan

    assert isinstance(event, Result)
    assert pixels(event) == pixels(generator.generate(request))


def test_closing_a_stream_cancels_the_rest():
    engine, conditioning = _unet()
    steps = sample_latents(engine, conditioning, resolved(num_inference_steps=50), TINY_SPEC)

    next(steps)
    steps.close()

    assert len(engine.calls) == 1
    assert list(steps) == []


def test_a_cancelled_stream_leaves_the_generator_usable(generator):
    request = resolved(seed=1)
    stream = generator.stream(request)

    next(stream)
    stream.close()

    assert list(stream) == []
    assert len(generator.generate(request).images) == 1


def test_a_bad_request_is_refused_before_the_first_step(generator):
    with pytest.raises(RequestError, match="height: 17"):
        generator.stream(GenerationRequest(prompt="red", height=17))


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"prompt": 3}, "prompt"),
        ({"prompt": "red", "guidance_scale": math.nan}, "guidance_scale"),
        ({"prompt": "red", "steps": 3}, "steps"),
    ],
)
def test_calling_with_a_bad_field_names_it(generator, fields, field):
    with pytest.raises(RequestError) as caught:
        generator(**fields)

    assert caught.value.field == field


def test_threads_share_a_generator_and_draw_what_each_draws_alone(generator):
    requests = [resolved(seed=seed, sampler="euler_ancestral") for seed in range(8)]
    alone = [pixels(generator.generate(request)) for request in requests]
    together = {}
    start = threading.Barrier(4)

    def draw(first):
        start.wait()
        for index in range(first, 8, 4):
            together[index] = pixels(generator.generate(requests[index]))

    threads = [threading.Thread(target=draw, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert [together[index] for index in range(8)] == alone


def test_interleaved_streams_do_not_meet(generator):
    requests = [resolved(seed=seed, num_inference_steps=3) for seed in (1, 2)]
    alone = [pixels(generator.generate(request)) for request in requests]

    pairs = list(zip(*map(generator.stream, requests), strict=True))

    assert [pixels(result) for result in pairs[-1]] == alone


def test_a_closed_generator_says_so(tiny_bundle):
    generator = Generator(tiny_bundle)

    generator.close()
    generator.close()

    with pytest.raises(BackendError, match="closed"):
        generator(prompt="red")
    with pytest.raises(BackendError, match="closed"):
        generator.encode(np.zeros((16, 16, 3), dtype=np.uint8))


@pytest.mark.parametrize("method", ["__call__", "generate", "stream"])
def test_what_is_no_request_is_refused_by_its_type(generator, method):
    with pytest.raises(RequestError, match="prompt: is int; give text, a GenerationRequest"):
        getattr(generator, method)(3)


@pytest.mark.parametrize("given", ["red", {"prompt": "red"}, GenerationRequest("red")])
def test_a_single_request_is_no_list_of_them(generator, given):
    with pytest.raises(RequestError, match=r"requests: is one \w+; give a list of them"):
        generator.run_many(given)


def test_a_saved_picture_says_how_to_draw_it_again(generator, tmp_path):
    result = generator(prompt="red", seed=3, num_images=2)

    result.save(tmp_path / "second.png", 0)
    result.save(tmp_path / "second.png", 1)

    metadata = read_metadata(tmp_path / "second.png")
    again = generator(**metadata["request"])
    assert metadata["request"]["seed"] == 4
    assert pixels(again) == pixels(result)[1:]


def test_timings_add_up_to_less_than_the_whole(generator):
    timings = generator(prompt="red").timings

    assert set(timings) == {"text_encoder", "unet", "vae_decoder", "total"}
    assert all(seconds > 0 for seconds in timings.values())
    assert sum(timings.values()) <= 2 * timings["total"]


def test_the_consumer_of_a_stream_does_not_count_as_the_network(generator):
    stream = generator.stream(resolved(num_inference_steps=2))

    for _step in (next(stream), next(stream)):
        time.sleep(0.1)
    result = next(stream)

    assert result.timings["total"] > 0.2
    assert sum(result.timings.values()) - result.timings["total"] < 0.1


def test_metadata_draws_the_same_picture_again(generator):
    result = generator(prompt="rot, größer", seed=9, num_images=2)

    metadata = json.loads(json.dumps(result.metadata(1)))

    assert pixels(generator(**metadata["request"]))[0] == pixels(result)[1]
    assert metadata["bundle_sha256"] == result.bundle_sha256


def test_every_call_makes_the_steps_of_ldm_for_the_number_asked_for(generator):
    fields = {"schedule": "ldm", "num_inference_steps": 30, "seed": 3}
    made = []

    called = generator("red", **fields, on_step=made.append)
    (shared,) = generator.run_many(["red"], **fields)
    again = generator(**called.metadata()["request"])

    assert len(made) == 31  # range(0, 1000, 1000 // 30), as LDM's make_ddim_timesteps has it
    assert called.metadata()["request"]["num_inference_steps"] == 30
    for other in (shared, again):
        np.testing.assert_array_equal(other.latents, called.latents)


@pytest.mark.parametrize("steps", [26, 35])
def test_ldm_s_schedule_makes_numbers_of_steps_next_to_those_off_its_table(generator, steps):
    result = generator("red", schedule="ldm", num_inference_steps=steps)

    assert result.request.num_steps == len(range(0, 1000, 1000 // steps))


def test_an_over_long_prompt_is_cut_with_a_warning_that_shows_what_was_cut(generator, caplog):
    with caplog.at_level(logging.WARNING):
        generator(
            prompt="red " * 14 + "the end",
            negative_prompt="red " * 14 + "of it",
            literal_prompt=True,
        )

    assert caplog.messages == [
        "negative_prompt is longer than 14 tokens; left out: 'of it'",
        "prompt is longer than 14 tokens; left out: 'the end'",
    ]


def test_a_prompt_that_fits_logs_nothing(generator, caplog):
    generator(prompt="red " * 14)

    assert not caplog.messages


def test_the_context_has_the_negative_prompt_first(tiny_bundle):
    engine = FakeEngine(tiny_networks()["text_encoder"])
    tokenizer = open_tokenizer(tiny_bundle / "tokenizer/merges.txt", TINY_SPEC)
    request = resolved(negative_prompt="blue")

    unguided = dataclasses.replace(request, guidance_scale=1)
    guided, plain = (
        encode_conditioning(lambda _: engine, tokenizer, each, TINY_SPEC).context
        for each in (request, unguided)
    )

    assert guided.shape == (2, 16, 8)
    np.testing.assert_array_equal(guided[1:], plain)
    assert tuple(engine.calls[0]["tokens"][0]) == tokenizer.encode("blue", 16).ids


def test_the_phases_draw_what_the_generator_draws(tiny_bundle, generator):
    request = resolved(seed=4, num_images=2)
    tokenizer = open_tokenizer(tiny_bundle / "tokenizer/merges.txt", TINY_SPEC)
    engines = {name: FakeEngine(network) for name, network in tiny_networks().items()}

    conditioning = encode_conditioning(engines.__getitem__, tokenizer, request, TINY_SPEC)
    *_, last = sample_latents(engines["unet"], conditioning, request, TINY_SPEC)
    images = decode_latents(engines["vae_decoder"], last.latents, TINY_SPEC)

    assert [image.tobytes() for image in images] == pixels(generator.generate(request))


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_network_that_produces_nan_or_infinity_is_an_error_and_no_picture(value):
    def broken(inputs):
        return {"prediction": np.full_like(inputs["latents"], value)}

    conditioning = Conditioning(context=np.ones((2, 16, 8), dtype=np.float32))
    steps = sample_latents(FakeEngine(broken), conditioning, resolved(), TINY_SPEC)

    with pytest.raises(BackendError, match="NaN or infinity after step 1 of 4"):
        next(steps)


@pytest.mark.parametrize("name", ["text_encoder", "vae_encoder", "unet", "vae_decoder"])
def test_a_network_that_answers_nan_is_named_and_delivers_no_image(own_bundle, name):
    weights = own_bundle / name / "weights.bin"
    weights.write_bytes(np.full(weights.stat().st_size // 4, np.nan, dtype=np.float32).tobytes())
    image = np.zeros((16, 16, 3), dtype=np.uint8)

    with (
        Generator(own_bundle, threads=1, check_hashes=False) as generator,
        pytest.raises(BackendError, match=f"^{name} produced NaN or infinity; run `ldm verify`"),
    ):
        generator("a red circle", image=image, strength=0.5)


@pytest.mark.parametrize(
    ("images", "size", "expected"),
    [(1, 1, [range(1)]), (3, 2, [range(2), range(2, 3)]), (2, 5, [range(2)])],
)
def test_batches_cover_every_image_once(images, size, expected):
    assert list(batches(images, size)) == expected


@pytest.mark.parametrize(
    "path", ["unet/weights.bin", "vae_decoder/model.cpu.onnx", "tokenizer/merges.txt"]
)
@pytest.mark.parametrize("damage", ["missing", "short", "altered"])
def test_a_bundle_with_a_spoilt_file_does_not_open(own_bundle, path, damage):
    file = own_bundle / path
    data = file.read_bytes()
    match damage:
        case "missing":
            file.unlink()
        case "short":
            file.write_bytes(data[:-1])
        case "altered":
            file.write_bytes(bytes([data[0] ^ 1]) + data[1:])

    with pytest.raises(BundleError, match=f"{file.name} (is missing|has)"):
        Generator(own_bundle)


def test_a_spoilt_file_that_no_request_needs_does_not_matter(own_bundle):
    (own_bundle / "vae_encoder/weights.bin").unlink()
    (own_bundle / "golden/0/0.png").unlink()

    with Generator(own_bundle) as generator:
        assert len(generator(prompt="red").images) == 1


def test_a_relative_bundle_stays_itself_when_the_working_directory_changes(own_bundle, monkeypatch):
    monkeypatch.chdir(own_bundle.parent)
    image = np.zeros((16, 16, 3), dtype=np.uint8)

    with Generator(own_bundle.name, threads=1) as generator:
        monkeypatch.chdir("/")
        result = generator("red", image=image, num_inference_steps=2)  # opens the image encoder

    assert len(result.images) == 1


def test_hashes_can_be_skipped(own_bundle):
    file = own_bundle / "unet/weights.bin"
    data = bytearray(file.read_bytes())
    data[0] ^= 1
    file.write_bytes(data)

    with Generator(own_bundle, check_hashes=False) as generator:
        assert len(generator(prompt="red").images) == 1


def test_a_vocabulary_larger_than_the_text_encoder_does_not_open(tiny_bundle):
    small = dataclasses.replace(TINY_SPEC.networks["text_encoder"], vocab_size=100)

    with pytest.raises(BundleError, match="521 tokens, the text encoder knows 100"):
        open_tokenizer(
            tiny_bundle / "tokenizer/merges.txt",
            TINY_SPEC.with_networks(text_encoder=small),
        )


def test_a_vocabulary_that_is_none_is_an_error_of_the_bundle(tmp_path):
    (tmp_path / "merges.txt").write_text("hello\n")

    with pytest.raises(BundleError, match=r"merges\.txt, line 1"):
        open_tokenizer(tmp_path / "merges.txt", TINY_SPEC)


def test_a_folder_that_is_no_bundle_is_one_sentence(tmp_path):
    with pytest.raises(ManifestError, match=r"manifest\.json not found; is "):
        Generator(str(tmp_path))


def test_a_generator_that_fails_to_open_closes_what_it_had_opened(own_bundle):
    (own_bundle / "vae_decoder/model.cpu.onnx").write_bytes(b"")
    before = open_sessions()

    with pytest.raises(BundleError):
        Generator(own_bundle, check_hashes=False)

    assert open_sessions() == before


def open_sessions():
    gc.collect()
    return sum(type(each).__name__ == "InferenceSession" for each in gc.get_objects())


@pytest.mark.parametrize("option", ["threads", "batch_size"])
def test_counts_start_at_one(tiny_bundle, option):
    with pytest.raises(ValueError, match=f"{option} must be at least 1 and whole, got 0"):
        Generator(tiny_bundle, **{option: 0})
