import threading
from collections import defaultdict
from dataclasses import replace

import pytest

from ldm_runtime import GenerationRequest, Generator
from ldm_runtime.backends.onnxruntime import cpu
from ldm_runtime.errors import DeadlineError, RequestError
from ldm_runtime.pipeline.results import Result
from ldm_runtime.pipeline.sampling import Step
from ldm_runtime.testing import tiny_requests
from tests.runtime.task_cases import NEEDED

REQUESTS = [
    GenerationRequest("red", height=24, seed=1, num_inference_steps=5),
    GenerationRequest("red", height=24, seed=2, sampler="heun", num_inference_steps=3),
    GenerationRequest("red", height=24, seed=3, guidance_scale=1.0),
    GenerationRequest("blue", seed=4, sampler="dpmpp_sde", num_images=3),
    GenerationRequest("red", seed=6, hires_scale=2.0),
]


@pytest.fixture(scope="module")
def generator(tiny_bundle):
    with Generator(tiny_bundle, threads=1) as generator:
        yield generator


def pixels(result):
    return [image.tobytes() for image in result.images]


def finish(batch, found=None):
    """Run a batch until all its requests have ended; return the events of each."""
    found = defaultdict(list) if found is None else found
    while batch:
        for number, event in batch.advance():
            found[number].append(event)
    return found


def threads_of_loops():
    return [each for each in threading.enumerate() if each.name == "ldm-loop"]


@pytest.mark.parametrize("max_batch", [1, 2, 4])
@pytest.mark.parametrize("wait", [0, 1, 3])
def test_requests_that_come_one_by_one_are_to_the_last_bit_as_alone(generator, max_batch, wait):
    alone = [generator.generate(request) for request in REQUESTS]
    found = defaultdict(list)

    with generator.open_batch(max_batch=max_batch) as batch:
        for request in REQUESTS:
            batch.add(request)
            for _ in range(wait):
                for number, event in batch.advance():
                    found[number].append(event)
        finish(batch, found)

    for number, expected in enumerate(alone):
        *steps, result = found[number]
        assert pixels(result) == pixels(expected)
        assert result.latents.tobytes() == expected.latents.tobytes()
        assert {type(each) for each in steps} == {Step}
        assert steps[-1].index == steps[-1].total
    assert threads_of_loops() == []


@pytest.mark.parametrize("task", NEEDED)
def test_every_task_can_be_batched(bundle_of, task):
    requests = tiny_requests(task)
    with Generator(bundle_of(task), threads=1) as generator, generator.open_batch() as batch:
        for request in requests:
            batch.add(request)

        found = finish(batch)

        for number, request in enumerate(requests):
            assert pixels(found[number][-1]) == pixels(generator.generate(request))


@pytest.fixture
def sizes(generator, monkeypatch):
    """The samples of every call of the UNet."""
    sizes = []
    unet = type(generator._network("unet"))
    run = unet.run

    def recorded(self, inputs):
        if "timesteps" in inputs:
            sizes.append(len(inputs["latents"]))
        return run(self, inputs)

    monkeypatch.setattr(unet, "run", recorded)
    return sizes


@pytest.mark.parametrize(("kept", "most"), [(1, 2), (2, 4)])
def test_a_backend_that_keeps_few_shapes_is_given_one(generator, sizes, monkeypatch, kept, most):
    """Or it would compile the UNet again whenever the number of requests changes."""
    monkeypatch.setattr(cpu, "ABILITIES", replace(cpu.ABILITIES, kept_shapes=lambda _: kept))

    with generator.open_batch(max_batch=2) as batch:
        for prompt in ("red", "blue"):
            batch.add(GenerationRequest(prompt, seed=1, num_inference_steps=2))
        batch.advance()
        finish(batch)

    assert max(sizes) == most


def test_requests_take_turns_at_calls_of_one_image(generator, monkeypatch):
    monkeypatch.setattr(cpu, "ABILITIES", replace(cpu.ABILITIES, kept_shapes=lambda _: 2))

    with generator.open_batch(max_batch=4) as batch:
        assert batch.max_begun == 2
        long, short, late = (
            batch.add(GenerationRequest("red", seed=1, num_inference_steps=steps))
            for steps in (12, 2, 1)
        )
        ends = [(number, type(event)) for _ in range(6) for number, event in batch.advance()]

    # a third begins when one of two has ended: they may have no more shapes than are kept
    assert [number for number, _ in ends] == [long, short, long, short, short, long, late, late]
    assert ends.count((short, Result)) == ends.count((late, Result)) == 1


def test_requests_share_calls_of_the_unet(generator, sizes):
    with generator.open_batch(max_batch=2) as batch:
        batch.add(GenerationRequest("red", seed=1, num_inference_steps=4))
        batch.advance()
        batch.add(GenerationRequest("blue", seed=2, num_inference_steps=4, sampler="dpmpp_2m"))
        finish(batch)

    assert sizes == [2, 4, 4, 4, 2]  # two samples each, with guidance; the second came a step late


def test_networks_that_take_turns_are_shared_and_kept_for_no_image(tiny_bundle, sizes):
    requests = [GenerationRequest("red", seed=seed, num_inference_steps=3) for seed in range(4)]
    kept = []

    with (
        Generator(tiny_bundle, threads=1, low_memory=True) as generator,
        generator.open_batch(max_batch=2) as batch,
    ):
        for request in requests:
            batch.add(request)
        while batch:
            batch.advance()
            kept.append(len(batch._scheduler._networks))

    assert sizes == [4] * 6  # two images of two samples, twice three steps
    assert kept == [1, 1, 0] * 2


def test_no_request_waits_for_the_end_of_another_size(generator):
    with generator.open_batch(max_batch=4) as batch:
        long = batch.add(GenerationRequest("red", height=24, num_inference_steps=50))
        batch.advance()
        short = batch.add(GenerationRequest("red", num_inference_steps=3))
        events = [event for _ in range(6) for event in batch.advance()]

        assert [type(event) for number, event in events if number == short][-1] is Result
        assert sum(number == long for number, _ in events) == 3


def test_a_cancelled_request_has_no_more_events_and_leaves_the_others(generator):
    expected = generator.generate(REQUESTS[0])
    with generator.open_batch(max_batch=8) as batch:
        numbers = [batch.add(request) for request in (REQUESTS[3], REQUESTS[0], REQUESTS[3])]
        batch.advance()

        batch.cancel(numbers[0])
        batch.cancel(numbers[0])
        found = finish(batch)

        assert set(found) == {numbers[1], numbers[2]}
        assert pixels(found[numbers[1]][-1]) == pixels(expected)
        batch.cancel(numbers[1])
    assert threads_of_loops() == []


def test_a_request_that_fails_leaves_the_others(generator):
    expected = generator.generate(REQUESTS[0])
    with generator.open_batch() as batch:
        late = batch.add(REQUESTS[3], deadline_seconds=1e-6)
        good = batch.add(REQUESTS[0])

        found = finish(batch)

    assert isinstance(found[late][-1], DeadlineError)
    assert len([each for each in found[late] if isinstance(each, Exception)]) == 1
    assert pixels(found[good][-1]) == pixels(expected)


def test_a_shared_call_that_fails_is_made_one_by_one(generator, monkeypatch, caplog):
    alone = [generator.generate(request) for request in REQUESTS[:2]]
    run = fail_above(generator, monkeypatch, 2)

    with generator.open_batch() as batch:
        for request in REQUESTS[:2]:
            batch.add(request)
        found = finish(batch)

    assert run["failed"]
    assert "2 images are computed one by one: not enough memory" in caplog.text
    for number, expected in enumerate(alone):
        assert pixels(found[number][-1]) == pixels(expected)


def test_a_network_that_always_fails_ends_every_request(generator, monkeypatch):
    fail_above(generator, monkeypatch, 0)

    with generator.open_batch() as batch:
        for request in (REQUESTS[3], REQUESTS[0]):
            batch.add(request)
        found = finish(batch)

    for number in range(2):
        assert [type(event) for event in found[number]] == [MemoryError]
    monkeypatch.undo()
    assert isinstance(generator.generate(REQUESTS[0]), Result)


def fail_above(generator, monkeypatch, most):
    """Let the UNet fail with more samples than `most`."""
    seen = {"failed": 0}
    unet = type(generator._network("unet"))
    run = unet.run

    def fail(self, inputs):
        if "timesteps" in inputs and len(inputs["latents"]) > most:
            seen["failed"] += 1
            raise MemoryError("not enough memory")
        return run(self, inputs)

    monkeypatch.setattr(unet, "run", fail)
    return seen


def test_a_wrong_request_is_refused_at_once(generator):
    with generator.open_batch() as batch:
        with pytest.raises(RequestError, match="height: 17"):
            batch.add(GenerationRequest("red", height=17))
        with pytest.raises(RequestError, match="deadline_seconds"):
            batch.add(REQUESTS[0], deadline_seconds=0)

        assert len(batch) == 0
        assert batch.advance() == []
    with pytest.raises(ValueError, match="max_batch must be at least 1"):
        generator.open_batch(max_batch=0)


def test_previews_come_with_steps_when_asked_for(generator):
    with generator.open_batch() as batch:
        plain, previewed = batch.add(REQUESTS[0]), batch.add(REQUESTS[1], previews=True)
        found = finish(batch)

    assert {step.previews for step in found[plain][:-1]} == {()}
    assert {step.previews[0].size for step in found[previewed][:-1]} == {(8, 12)}


def test_closing_stops_all(generator):
    batch = generator.open_batch()
    for request in REQUESTS:
        batch.add(request)
    batch.advance()
    assert threads_of_loops()

    batch.close()
    batch.close()

    assert threads_of_loops() == []
    assert batch.advance() == []
