"""Networks that take turns in memory: one is open at a time, and every image stays the same."""

import threading

import numpy as np
import pytest

from ldm_runtime import GenerationRequest, Generator
from ldm_runtime.backends import get_backend
from ldm_runtime.backends.networks import OpenNetworks
from ldm_runtime.backends.turns import Turns
from ldm_runtime.errors import BackendError, BundleError
from ldm_runtime.testing import FakeEngine

REQUEST = {"seed": 3, "num_inference_steps": 2, "height": 16, "width": 16}


@pytest.fixture
def opened(monkeypatch):
    """The names of the networks that are open, in every state since the beginning."""
    states = [()]
    module = get_backend("onnxruntime")
    plain = module.open_engine

    def open_engine(source):
        name, engine = source.component.name, plain(source)
        states.append((*states[-1], name))
        close = engine.close

        def closed():
            close()
            states.append(tuple(each for each in states[-1] if each != name))

        engine.close = closed
        return engine

    monkeypatch.setattr(module, "open_engine", open_engine)
    return states


def in_turns(engines, **options):
    """Open networks that note every engine."""

    def open_engine(name):
        engines.append(FakeEngine(lambda _: {"x": np.zeros(1)}))
        engines[-1].name = name
        return engines[-1]

    options = {"survives_fork": True, "turns": Turns(), **options}
    return OpenNetworks(open_engine, "the generator", **options)


def test_one_network_at_a_time_is_open_and_the_image_is_the_same(tiny_bundle, opened):
    with Generator(tiny_bundle, backend="onnxruntime") as generator:
        expected = generator("a red circle", **REQUEST).image.tobytes()
    del opened[1:]

    with Generator(tiny_bundle, backend="onnxruntime", low_memory=True) as generator:
        assert opened == [()]  # none before a request
        images = [generator("a red circle", **REQUEST).image.tobytes() for _ in range(2)]

    assert images == [expected, expected]
    assert max(map(len, opened)) == 1
    once = ["text_encoder", "unet", "vae_decoder"]
    assert [names[0] for names in opened if names] == [*once, *once]
    assert opened[-1] == ()  # the last is closed with the generator


def test_a_second_pass_and_requests_together_open_again_what_they_need(tiny_bundle):
    larger = {**REQUEST, "hires_scale": 2.0}
    with Generator(tiny_bundle, backend="onnxruntime") as generator:
        expected = [each.image.tobytes() for each in generator.run_many(["a", "b"], **larger)]

    with Generator(tiny_bundle, backend="onnxruntime", low_memory=True) as generator:
        found = [each.image.tobytes() for each in generator.run_many(["a", "b"], **larger)]

    assert found == expected


def test_requests_of_a_batch_do_not_open_base_and_refiner_in_turn(tiny_bundle, opened):
    request = {"num_inference_steps": 10, "refiner_start": 0.5, "height": 16, "width": 16}
    options = {"refiner": tiny_bundle, "backend": "onnxruntime", "low_memory": True}

    with Generator(tiny_bundle, **options) as generator, generator.open_batch() as batch:
        batch.add(GenerationRequest("a", seed=1, **request))
        for _ in range(6):  # it has come to its refiner
            batch.advance()
        batch.add(GenerationRequest("b", seed=2, **request))
        while batch:
            batch.advance()

    # two of each request, and one again after the second prompt was encoded
    assert [names[-1] for names in opened if names].count("unet") == 5


def test_threads_wait_for_the_network_that_another_one_runs():
    running, may_end, order = threading.Event(), threading.Event(), []

    def slow(_inputs):
        running.set()
        assert may_end.wait(10)
        order.append("slow")
        return {"x": np.zeros(1)}

    networks = OpenNetworks(
        lambda name: FakeEngine(slow if name == "unet" else lambda _: {"x": np.ones(1)}),
        "the generator",
        survives_fork=True,
        turns=Turns(),
    )

    def other():
        networks("vae_decoder").run({})
        order.append("other")

    first = threading.Thread(target=lambda: networks("unet").run({}))
    first.start()
    assert running.wait(10)
    second = threading.Thread(target=other)
    second.start()
    may_end.set()
    for thread in (first, second):
        thread.join(10)

    assert order == ["slow", "other"]


def test_two_bundles_that_share_turns_are_not_open_at_once():
    engines, turns = [], Turns()
    base, refiner = in_turns(engines, turns=turns), in_turns(engines, turns=turns)

    for networks in (base, refiner, base):
        networks("unet").run({})

    assert len(engines) == 3
    for engine in engines[:2]:
        with pytest.raises(BackendError, match="closed"):
            engine.run({})
    engines[2].run({})


def test_a_closed_owner_opens_nothing_again():
    engines = []
    networks = in_turns(engines)
    unet = networks("unet")

    networks.close()
    with pytest.raises(BackendError, match="the generator is closed; open it again"):
        unet.run({})

    assert engines == []


def test_a_forked_process_leaves_the_network_of_its_parent_open():
    engines = []
    networks = in_turns(engines)
    networks("unet").run({})

    networks.abandon()
    networks("unet").run({})
    networks.close()

    engines[0].run({})
    with pytest.raises(BackendError, match="closed"):
        engines[1].run({})


def test_a_spoilt_file_is_found_when_it_is_needed(own_bundle):
    weights = own_bundle / "vae_decoder/weights.bin"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)

    with (
        Generator(own_bundle, backend="onnxruntime", low_memory=True) as generator,
        pytest.raises(BundleError, match=r"weights\.bin has sha256"),
    ):
        generator("a red circle", **REQUEST)
