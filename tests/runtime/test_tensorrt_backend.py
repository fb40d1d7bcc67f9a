import logging
import os
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from ldm_runtime.backends import BACKENDS, BackendEntry, choose_backend, get_backend, tensorrt
from ldm_runtime.backends.contract import EngineSource, RunOptions, SharedResources
from ldm_runtime.backends.tensorrt.runtime import cache_path, read_cache, write_cache
from ldm_runtime.bundle.files import sha256_of
from ldm_runtime.bundle.manifest import GraphRecord, load_manifest
from ldm_runtime.diagnostics.verify import BOUNDS, _bounds, _outputs, verify
from ldm_runtime.engines.gpu import find_gpu
from ldm_runtime.engines.trust import cache_folder
from ldm_runtime.errors import BackendError, BundleError, ShapeError
from ldm_runtime.generator import Generator
from ldm_runtime.testing import tiny_networks
from tests.runtime.fake_gpu import GPU, VERSION, FakeDevice, FakeVendor, add_engines

no_gpu = pytest.mark.skipif(find_gpu() is not None, reason="about machines without a GPU")


@pytest.fixture
def machine():
    return FakeVendor()


@pytest.fixture
def bundle(own_bundle):
    """A tiny bundle with engines that fit the fake machine."""
    add_engines(own_bundle)
    return own_bundle


def source_of(bundle, component="unet", **fields):
    manifest = load_manifest(bundle)
    return EngineSource(
        bundle=bundle, manifest=manifest, component=manifest.component(component), **fields
    )


def opened(bundle, machine, component="unet", **fields):
    return tensorrt.open_engine(source_of(bundle, component, **fields), machine.vendor)


def unet_inputs(*, batch=2, height=8, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "latents": rng.standard_normal((batch, 4, height, 8), dtype=np.float32),
        "timesteps": rng.uniform(0, 999, batch).astype(np.float32),
        "context": rng.standard_normal((batch, 16, 8), dtype=np.float32),
    }


def assert_right(outputs, inputs):
    expected = tiny_networks()["unet"](inputs)["prediction"]
    np.testing.assert_allclose(outputs["prediction"], expected, rtol=1e-5)


def uploads(device):
    return [size for of, to, size in device.copies if (of, to) == ("host", "gpu")]


# Running.


def test_an_engine_computes_its_network_again_and_again(bundle, machine):
    with opened(bundle, machine) as engine:
        for seed in range(5):
            inputs = unet_inputs(seed=seed)

            assert_right(engine.run(inputs), inputs)


def test_a_shape_is_recorded_once_and_replayed_from_then_on(bundle, machine):
    with opened(bundle, machine) as engine:
        for seed in range(5):
            engine.run(unet_inputs(seed=seed))

    assert (machine.device.recordings, machine.device.launches) == (1, 4)
    assert machine.plans["unet"].enqueued == 2  # the first call, and the recording


def test_every_shape_has_a_graph_of_its_own(bundle, machine):
    shapes = [unet_inputs(height=height, seed=height) for height in (16, 8)]
    with opened(bundle, machine) as engine:
        for inputs in shapes * 4:
            assert_right(engine.run(inputs), inputs)

    assert machine.device.recordings == 2


def test_buffers_that_grow_make_the_graphs_of_smaller_shapes_be_recorded_again(bundle, machine):
    small, large = unet_inputs(height=8), unet_inputs(height=16, seed=1)
    with opened(bundle, machine) as engine:
        for inputs in (small, small, small, large, small, small, small):
            assert_right(engine.run(inputs), inputs)

    assert machine.device.recordings == 2


def test_buffers_are_reserved_once_for_the_largest_shape(bundle, machine):
    with opened(bundle, machine) as engine:
        engine.run(unet_inputs(height=16))
        before = set(machine.device.memory)
        for height in (4, 8, 12, 16):
            engine.run(unet_inputs(height=height))

        assert set(machine.device.memory) == before


def test_without_cuda_graphs_the_results_are_the_same(bundle, machine):
    plain = FakeVendor()
    inputs = unet_inputs()
    with (
        opened(bundle, machine) as recorded,
        opened(bundle, plain, options=RunOptions(cuda_graphs=False)) as direct,
    ):
        for _ in range(3):
            np.testing.assert_array_equal(
                recorded.run(inputs)["prediction"], direct.run(inputs)["prediction"]
            )

    assert (machine.device.recordings, plain.device.recordings) == (1, 0)


def test_a_gpu_that_cannot_record_runs_without_graphs_and_says_so_once(bundle, caplog):
    machine = FakeVendor(device=FakeDevice(can_record=False))
    inputs = unet_inputs()
    with opened(bundle, machine) as engine, caplog.at_level(logging.WARNING):
        for _ in range(4):
            assert_right(engine.run(inputs), inputs)

    assert len(caplog.messages) == 1
    assert caplog.messages[0].endswith("running without CUDA graphs")


def test_only_the_most_recent_shapes_keep_their_contexts(bundle, machine):
    with opened(bundle, machine) as engine:
        for height in (4, 5, 6, 7, 4, 8):
            engine.run(unet_inputs(height=height))
        contexts = machine.plans["unet"].contexts

        assert [each.shapes["latents"][2] for each in contexts if not each.closed] == [4, 6, 7, 8]


def test_the_caller_owns_what_comes_back(bundle, machine):
    with opened(bundle, machine) as engine:
        first = engine.run(unet_inputs(seed=0))["prediction"]
        before = first.copy()
        engine.run(unet_inputs(seed=1))

    np.testing.assert_array_equal(first, before)
    first[...] = 0


def test_shapes_outside_the_profile_are_refused_before_anything_is_copied(bundle, machine):
    with opened(bundle, machine) as engine:
        with pytest.raises(ShapeError, match="1-8x4x4-16x4-16; run `ldm build-engines"):
            engine.run(unet_inputs(height=32))

        assert machine.device.copies == []


def test_inputs_need_not_be_contiguous(bundle, machine):
    inputs = unet_inputs()
    inputs["latents"] = inputs["latents"].transpose(0, 1, 3, 2)
    with opened(bundle, machine) as engine:
        assert_right(engine.run(inputs), inputs)


# Constants.


def test_bound_constants_are_uploaded_once(bundle, machine):
    inputs = unet_inputs()
    context = inputs.pop("context")
    with opened(bundle, machine) as engine:
        bound = engine.bind({"context": context})
        for _ in range(5):
            assert_right(bound.run(inputs), {**inputs, "context": context})

        assert uploads(machine.device).count(context.nbytes) == 1


def test_a_new_request_replays_the_graphs_of_the_last_one(bundle, machine):
    with opened(bundle, machine) as engine:
        for seed in range(4):
            inputs = unet_inputs(seed=seed)
            bound = engine.bind({"context": inputs.pop("context")})
            for _ in range(3):
                bound.run(inputs)

    assert machine.device.recordings == 1


def test_constants_are_the_callers_of_bind_alone(bundle, machine):
    one, two, plain = (unet_inputs(seed=seed) for seed in range(3))
    rest = {name: one[name] for name in ("latents", "timesteps")}
    with opened(bundle, machine) as engine:
        first = engine.bind({"context": one["context"]})
        second = engine.bind({"context": two["context"]})
        for _ in range(3):
            assert_right(first.run(rest), one)
            assert_right(second.run(rest), {**rest, "context": two["context"]})
            assert_right(first.run(rest), one)
            assert_right(engine.run(plain), plain)


def test_changing_an_array_after_bind_changes_nothing(bundle, machine):
    inputs = unet_inputs()
    context = inputs["context"].copy()
    with opened(bundle, machine) as engine:
        bound = engine.bind({"context": context})
        context[...] = 0

        assert_right(bound.run({k: inputs[k] for k in ("latents", "timesteps")}), inputs)


def test_constants_outlive_a_buffer_that_grows(bundle, machine):
    small, large = unet_inputs(batch=1), unet_inputs(batch=8, seed=1)
    with opened(bundle, machine) as engine:
        bound = engine.bind({"context": small["context"]})
        rest = {name: small[name] for name in ("latents", "timesteps")}
        bound.run(rest)
        engine.bind({"context": large["context"]})  # for which the buffer grows

        assert_right(bound.run(rest), small)


def test_what_is_given_again_wins_over_the_constant(bundle, machine):
    inputs, other = unet_inputs(), unet_inputs(seed=1)
    with opened(bundle, machine) as engine:
        bound = engine.bind({"context": other["context"]})

        assert_right(bound.run(inputs), inputs)


def test_a_constant_that_is_no_input_is_refused(bundle, machine):
    with (
        opened(bundle, machine) as engine,
        pytest.raises(BackendError, match="unet takes no sigma"),
    ):
        engine.bind({"sigma": np.zeros(1, np.float32)})


def test_threads_do_not_meet_each_others_constants(bundle, machine):
    start = threading.Barrier(4)

    def draw(engine, seed):
        inputs = unet_inputs(batch=1 + seed % 2, seed=seed)
        bound = engine.bind({"context": inputs["context"]})
        rest = {name: inputs[name] for name in ("latents", "timesteps")}
        start.wait()
        for _ in range(25):
            assert_right(bound.run(rest), inputs)

    with opened(bundle, machine) as engine, ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(draw, engine, seed) for seed in range(4)]:
            done.result()


def test_every_run_turns_to_the_gpu_in_its_own_thread(bundle, machine):
    with opened(bundle, machine) as engine:
        before = machine.device.currents
        engine.run(unet_inputs())
        engine.bind({"context": unet_inputs()["context"]})

        assert machine.device.currents == before + 2


# Memory.


def scratch_of(device):
    return [each for each in device.memory.values() if each.kind == "gpu"]


def test_engines_of_one_generator_share_device_and_scratch_memory(bundle, machine):
    shared = SharedResources()
    with (
        opened(bundle, machine, "unet", shared=shared) as unet,
        opened(bundle, machine, "vae_decoder", shared=shared) as decoder,
    ):
        latents = {"latents": unet_inputs(batch=1)["latents"]}
        decoder.run(latents)
        unet.run(unet_inputs())  # which takes more scratch memory
        before = len(scratch_of(machine.device))
        for _ in range(3):
            image = decoder.run(latents)["image"]

    assert machine.opened == 1
    assert len(scratch_of(machine.device)) <= before
    expected = tiny_networks()["vae_decoder"](latents)["image"]
    np.testing.assert_allclose(image, expected, rtol=1e-5)


def test_scratch_memory_that_grows_makes_graphs_be_recorded_again(bundle, machine):
    shared = SharedResources()
    latents = {"latents": unet_inputs(batch=1)["latents"]}
    with (
        opened(bundle, machine, "unet", shared=shared) as unet,
        opened(bundle, machine, "vae_decoder", shared=shared) as decoder,
    ):
        for _ in range(3):
            decoder.run(latents)
        unet.run(unet_inputs(batch=8, height=16))
        for _ in range(3):
            decoder.run(latents)

    assert machine.device.recordings == 2


def test_the_last_engine_to_close_frees_everything(bundle, machine):
    shared = SharedResources()
    unet = opened(bundle, machine, "unet", shared=shared)
    decoder = opened(bundle, machine, "vae_decoder", shared=shared)
    unet.run(unet_inputs())

    unet.close()
    unet.close()
    still_open = not machine.device.closed
    decoder.close()

    assert still_open
    assert machine.device.closed
    assert machine.device.memory == {}
    assert all(plan.closed for plan in machine.plans.values())


def test_a_closed_engine_says_so(bundle, machine):
    engine = opened(bundle, machine)
    engine.close()

    with pytest.raises(BackendError, match="the unet engine is closed"):
        engine.run(unet_inputs())
    with pytest.raises(BackendError, match="the unet engine is closed"):
        engine.bind({})


def test_too_little_memory_is_our_error_and_smaller_pictures_still_work(bundle):
    machine = FakeVendor(device=FakeDevice(limit=24_000))
    inputs = unet_inputs()
    with opened(bundle, machine) as engine:
        engine.run(inputs)
        with pytest.raises(BackendError, match=r"out of memory.*fewer or smaller images"):
            engine.run(unet_inputs(batch=8, height=16))

        assert_right(engine.run(inputs), inputs)


def test_two_generators_in_one_process_do_not_share(bundle):
    first, second = FakeVendor(), FakeVendor()
    inputs = unet_inputs()
    with opened(bundle, first) as one, opened(bundle, second) as two:
        assert_right(one.run(inputs), inputs)
        one.close()

        assert_right(two.run(inputs), inputs)
    assert first.opened == second.opened == 1


# Opening.


@pytest.mark.parametrize("check_hashes", [True, False])
def test_an_altered_plan_is_never_loaded(bundle, machine, check_hashes):
    source = source_of(bundle, check_hashes=check_hashes)
    plan = bundle / f"tensorrt/tensorrt_rtx-{VERSION}-sm86-sm89/unet.plan"
    plan.write_bytes(b"plan of anna")

    with pytest.raises(BundleError, match=r"unet\.plan has sha256"):
        tensorrt.open_engine(source, machine.vendor)

    assert machine.loaded == []


def test_a_plan_that_does_not_load_gives_the_gpu_back(bundle, machine):
    def fail(*_):
        raise BackendError("no")

    vendor = replace(machine.vendor, load_engine_file=fail)

    with pytest.raises(BackendError, match="no"):
        tensorrt.open_engine(source_of(bundle), vendor)

    assert machine.device.closed


def test_a_gpu_that_does_not_start_is_given_back(bundle, machine, monkeypatch):
    def fail():
        raise BackendError("CUDA failed selecting the GPU")

    monkeypatch.setattr(machine.device, "make_current", fail)

    with pytest.raises(BackendError, match="selecting the GPU"):
        opened(bundle, machine)

    assert machine.device.closed


def test_options_and_the_place_for_compiled_kernels_reach_the_library(bundle, machine):
    options = RunOptions(specialization="eager")

    opened(bundle, machine, options=options).close()

    ((path, record, received, cache),) = machine.loaded
    assert received is options
    assert record.component == "unet"
    assert cache == cache_folder() / f"{record.plan_sha256[:32]}.nvidia-fake-4000.kernel-cache"
    assert not cache.is_relative_to(bundle)
    assert path.is_relative_to(bundle)


# Whether it can run.


def reason(bundle, machine):
    return tensorrt.why_not(load_manifest(bundle), bundle, vendor=machine.vendor)


def test_a_bundle_whose_engines_fit_can_run(bundle, machine):
    assert reason(bundle, machine) is None


def test_a_bundle_without_engines_says_how_to_build_them(own_bundle, machine):
    manifest = load_manifest(own_bundle)
    components = [
        replace(
            each, graphs=(*each.graphs, GraphRecord(variant="fp16", file=f"{each.name}/model.onnx"))
        )
        for each in manifest.components
    ]
    manifest = replace(manifest, components=tuple(components))

    assert tensorrt.why_not(manifest, own_bundle, vendor=machine.vendor) == (
        f"{own_bundle} has no TensorRT engines; run `ldm build-engines {own_bundle}`"
    )


def test_a_bundle_that_engines_cannot_be_built_from_says_so(own_bundle, machine):
    assert reason(own_bundle, machine) == (
        "tensorrt needs an fp16 graph, which text_encoder lacks; export without --no-fp16"
    )


def test_an_engine_that_was_not_built_here_is_neither_opened_nor_read(bundle):
    machine = FakeVendor(is_trusted=lambda sha256: False)
    sentence = (
        "the text_encoder engine was not built on this machine, and an engine is code; run "
        f"`ldm build-engines {bundle}` to build it here, or say --trust-engines "
        "(trust_engines=True) if you trust who made the bundle"
    )

    assert reason(bundle, machine) == sentence
    with pytest.raises(BackendError) as caught:
        opened(bundle, machine, "text_encoder")
    assert str(caught.value) == sentence
    assert (machine.loaded, machine.opened) == ([], 0)


def test_the_hash_that_is_trusted_is_that_of_the_file(bundle):
    manifest, asked = load_manifest(bundle), []
    machine = FakeVendor(is_trusted=lambda sha256: asked.append(sha256) or True)

    opened(bundle, machine).close()

    ((path, *_),) = machine.loaded
    assert asked == [sha256_of(path)]
    assert asked[0] in {each.sha256 for each in manifest.files}


def test_a_caller_may_trust_the_engines_of_a_bundle(bundle):
    machine = FakeVendor(is_trusted=lambda sha256: False)
    options = RunOptions(trust_engines=True)

    assert tensorrt.why_not(load_manifest(bundle), bundle, options, machine.vendor) is None
    opened(bundle, machine, options=options).close()
    assert len(machine.loaded) == 1


@pytest.mark.usefixtures("free_choice")
def test_engines_of_another_machine_give_way_to_the_next_backend_in_one_warning(
    bundle, monkeypatch, caplog
):
    module = types.ModuleType("tensorrt_of_a_fake_machine")
    vendor = FakeVendor(is_trusted=lambda sha256: False).vendor
    module.ABILITIES = tensorrt.ABILITIES
    module.why_not = partial(tensorrt.why_not, vendor=vendor)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    fake = BackendEntry(module=module.__name__, extra="tensorrt")
    entries = {"tensorrt": fake, "onnxruntime": BACKENDS["onnxruntime"]}
    manifest = load_manifest(bundle)

    with caplog.at_level(logging.WARNING):
        assert choose_backend("auto", manifest, entries, bundle=bundle) == "onnxruntime"

    (message,) = caplog.messages
    assert "was not built on this machine" in message
    assert message.endswith("; using onnxruntime")
    with pytest.raises(BackendError, match="was not built on this machine"):
        choose_backend("tensorrt", manifest, entries, bundle=bundle)
    trusting = RunOptions(trust_engines=True)
    for name in ("auto", "tensorrt"):
        chosen = choose_backend(name, manifest, entries, bundle=bundle, options=trusting)
        assert chosen == "tensorrt"


def test_without_a_gpu_the_sentence_says_so_and_no_library_is_asked(bundle):
    def never(_):
        raise AssertionError("TensorRT is touched without a driver")

    vendor = replace(FakeVendor(gpu=None).vendor, versions=never)

    assert tensorrt.why_not(load_manifest(bundle), bundle, vendor=vendor) == (
        f"the engines of {bundle} (tensorrt_rtx {VERSION}) cannot run: "
        "this machine has no NVIDIA GPU, or no driver for it"
    )


def test_an_engine_for_another_gpu_is_a_reason(bundle):
    other = FakeVendor(gpu=replace(GPU, name="NVIDIA Fake 9000", compute_capability=(9, 0)))

    sentence = (
        "was built for sm86, sm89, this GPU (NVIDIA Fake 9000) is sm90; run `ldm build-engines"
    )
    assert sentence in reason(bundle, other)
    with pytest.raises(BackendError, match=r"this GPU .* is sm90"):
        opened(bundle, other)


def test_the_machine_alone_can_be_asked_about(machine):
    assert tensorrt.why_not(None, None, vendor=machine.vendor) is None
    assert "no NVIDIA GPU" in tensorrt.why_not(None, None, vendor=FakeVendor(gpu=None).vendor)
    bare = FakeVendor(versions={}).vendor
    assert "the extra 'tensorrt-rtx' of ldm-deploy" in tensorrt.why_not(None, None, vendor=bare)


def test_an_altered_record_is_a_reason(bundle, machine):
    record = bundle / load_manifest(bundle).engines[0]
    record.write_bytes(record.read_bytes().replace(b"sm86", b"sm90"))

    assert "has sha256" in reason(bundle, machine)


@no_gpu
@pytest.mark.usefixtures("free_choice")
def test_auto_steps_down_from_engines_in_one_sentence(bundle, caplog):
    with caplog.at_level(logging.WARNING), Generator(bundle) as generator:
        backend = generator.backend

    assert backend in {"openvino", "onnxruntime"}
    (message,) = caplog.messages
    assert message == (
        f"the engines of {bundle} (tensorrt_rtx {VERSION}) cannot run: "
        f"this machine has no NVIDIA GPU, or no driver for it; using {backend}"
    )


@no_gpu
def test_tensorrt_asked_for_by_name_is_never_replaced(bundle):
    with pytest.raises(BackendError, match="no NVIDIA GPU, or no driver"):
        Generator(bundle, backend="tensorrt")


@pytest.mark.usefixtures("free_choice")
@no_gpu
def test_a_bundle_that_nobody_built_engines_for_steps_down_silently(tiny_bundle, caplog):
    with caplog.at_level(logging.WARNING):
        choose_backend("auto", load_manifest(tiny_bundle), bundle=tiny_bundle)

    assert caplog.messages == []


# Comparing.


def test_golden_inputs_outside_the_range_of_an_engine_are_a_sentence_and_no_fault(
    bundle, machine, caplog
):
    inputs = unet_inputs(height=2)

    with opened(bundle, machine) as engine, caplog.at_level(logging.WARNING):
        assert _outputs(tensorrt, engine, "unet", inputs) is None
        with pytest.raises(ShapeError):  # of a backend that takes every shape
            _outputs(get_backend("onnxruntime"), engine, "unet", inputs)

    (message,) = caplog.messages
    assert message.startswith("unet is only compared in whole images, not alone: input 'latents'")


def test_engines_are_held_to_the_promise_of_fp16_whatever_the_weights(bundle):
    manifest = load_manifest(bundle)

    assert manifest.weights_dtype == "float32"
    assert _bounds(tensorrt, manifest) == BOUNDS["float16"]
    assert _bounds(get_backend("onnxruntime"), manifest) == BOUNDS["float32"]


@no_gpu
def test_verify_of_a_bundle_with_engines_still_works_here(bundle):
    assert all(check.passed for check in verify(bundle, backend="onnxruntime"))


# What was compiled.


def test_compiled_kernels_are_kept_whole_or_not_at_all(tmp_path):
    path = tmp_path / "unet.kernel-cache"

    nothing = read_cache(path)
    write_cache(path, b"kernels")
    write_cache(path, b"more kernels")

    assert nothing == b""
    assert read_cache(path) == b"more kernels"
    assert os.listdir(tmp_path) == ["unet.kernel-cache"]


def test_kernels_that_cannot_be_kept_are_one_logged_sentence(tmp_path, caplog):
    path = tmp_path / f"{'x' * 300}.kernel-cache"

    with caplog.at_level(logging.WARNING):
        write_cache(path, b"kernels")

    assert caplog.messages[-1].startswith(f"{path} cannot be written (File name too long); ")


def test_a_cache_that_cannot_be_read_is_one_logged_sentence(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        assert read_cache(tmp_path) == b""

    assert "kernels are compiled again" in caplog.messages[0]


def test_kernels_of_different_gpus_and_engines_do_not_overwrite_each_other():
    engine, other = "a" * 64, "b" * 64

    assert cache_path(engine, GPU) != cache_path(engine, replace(GPU, name="NVIDIA Fake 4000 Ti"))
    assert cache_path(engine, GPU) != cache_path(other, GPU)
