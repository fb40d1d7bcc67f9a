import dataclasses
import logging
import sys

import numpy as np
import pytest

from ldm_runtime.backends import BACKENDS, BackendEntry, choose_backend, get_backend
from ldm_runtime.backends.contract import EngineSource, bind_constants
from ldm_runtime.bundle.files import checked_file
from ldm_runtime.bundle.manifest import GraphRecord, load_manifest
from ldm_runtime.diagnostics.verify import BOUNDS, _bounds
from ldm_runtime.errors import BackendError, BundleError
from ldm_runtime.testing import FakeEngine, tiny_networks

PRESENT = BACKENDS["onnxruntime"]

pytestmark = pytest.mark.usefixtures("free_choice")
UNINSTALLED = BackendEntry(module="ldm_runtime_package_that_is_not_there", extra="faster")


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """An entry whose module exists but does not load."""
    (tmp_path / "broken_backend_module.py").write_text("raise ImportError('libfast.so.9: gone')")
    monkeypatch.syspath_prepend(str(tmp_path))
    return BackendEntry(module="broken_backend_module", extra="broken")


@pytest.fixture(params=["fake", "onnxruntime"])
def engine(request, tiny_bundle):
    if request.param == "fake":
        return FakeEngine(tiny_networks()["vae_decoder"])
    manifest = load_manifest(tiny_bundle)
    return get_backend(request.param).open_engine(
        EngineSource(
            bundle=tiny_bundle, manifest=manifest, component=manifest.component("vae_decoder")
        )
    )


def latents(value):
    return {"latents": np.full((1, 4, 2, 2), value, dtype=np.float32)}


def test_the_caller_owns_what_an_engine_returns(engine):
    first = engine.run(latents(0.5))["image"]
    before = first.copy()

    engine.run(latents(-0.5))

    np.testing.assert_array_equal(first, before)
    first[...] = 0  # and may write to it
    np.testing.assert_array_equal(engine.run(latents(0.5))["image"], before)


def test_a_closed_engine_says_so(engine):
    with engine:
        engine.run(latents(0.5))
    engine.close()

    with pytest.raises(BackendError, match="closed"):
        engine.run(latents(0.5))


def test_bound_inputs_travel_with_every_run_and_leave_the_engine_alone(engine):
    bound = engine.bind(latents(0.5))

    once, twice = bound.run({}), bound.run({})

    np.testing.assert_array_equal(once["image"], engine.run(latents(0.5))["image"])
    np.testing.assert_array_equal(once["image"], twice["image"])
    assert not np.array_equal(engine.run(latents(0.1))["image"], once["image"])


def test_binding_works_for_anything_that_can_run():
    class OnlyRuns:
        def run(self, inputs):
            return inputs

    bound = bind_constants(OnlyRuns(), {"context": 1})

    assert bound.run({"latents": 2}) == {"context": 1, "latents": 2}


def test_an_unknown_name_and_a_missing_package_are_different_sentences():
    entries = {"fast": UNINSTALLED}

    with pytest.raises(BackendError, match="unknown backend 'slow'; choose auto, fast"):
        get_backend("slow", entries)
    with pytest.raises(BackendError, match=r"not installed; install the extra 'faster' of"):
        get_backend("fast", entries)


def test_a_package_that_does_not_load_is_not_called_missing(broken):
    with pytest.raises(BackendError, match=r"installed but does not load: libfast\.so\.9: gone"):
        get_backend("broken", {"broken": broken})


def test_looking_for_one_backend_imports_no_other(broken):
    get_backend("onnxruntime", {"broken": broken, "onnxruntime": PRESENT})

    assert broken.module not in sys.modules


def test_auto_takes_the_first_that_can_run_and_logs_each_step_down(tiny_bundle, broken, caplog):
    entries = {"fast": UNINSTALLED, "broken": broken, "onnxruntime": PRESENT}

    with caplog.at_level(logging.WARNING):
        name = choose_backend("auto", load_manifest(tiny_bundle), entries)

    assert name == "onnxruntime"
    assert len(caplog.messages) == 2
    assert all(message.endswith("using onnxruntime") for message in caplog.messages)
    assert "libfast.so.9" in caplog.messages[1]


def test_auto_is_silent_when_the_first_can_run(tiny_bundle, caplog):
    choose_backend("auto", load_manifest(tiny_bundle))

    assert not caplog.messages


def test_a_backend_asked_for_by_name_is_never_replaced():
    with pytest.raises(BackendError, match="not installed"):
        choose_backend("fast", None, {"fast": UNINSTALLED, "onnxruntime": PRESENT})


def test_auto_with_nothing_that_can_run_gives_every_reason(broken):
    with pytest.raises(BackendError, match=r"no backend can run here: .*faster.*libfast"):
        choose_backend("auto", None, {"fast": UNINSTALLED, "broken": broken})


def test_a_bundle_without_graphs_for_the_cpu_is_refused_before_it_is_opened(tiny_bundle):
    manifest = load_manifest(tiny_bundle)
    unet = dataclasses.replace(
        manifest.component("unet"), graphs=(GraphRecord(variant="fp16", file="unet/model.onnx"),)
    )
    manifest = dataclasses.replace(manifest, components=(unet,))
    source = EngineSource(bundle=tiny_bundle, manifest=manifest, component=unet)

    with pytest.raises(BackendError, match="fp32 graph, which unet lacks"):
        choose_backend("onnxruntime", manifest)
    with pytest.raises(BackendError, match=r"'unet' .* has no fp32 graph"):
        source.graph("fp32")


def test_a_graph_is_only_opened_if_it_and_its_weights_are_as_recorded(own_bundle):
    manifest = load_manifest(own_bundle)
    source = EngineSource(
        bundle=own_bundle, manifest=manifest, component=manifest.component("unet")
    )
    weights = own_bundle / "unet/weights.bin"
    data = bytearray(weights.read_bytes())
    data[0] ^= 1

    intact = source.graph("fp32")
    weights.write_bytes(data)

    assert intact == own_bundle / "unet/model.cpu.onnx"
    with pytest.raises(BundleError, match=r"weights\.bin has sha256"):
        source.graph("fp32")
    dataclasses.replace(source, check_hashes=False).graph("fp32")  # the size is still right


@pytest.mark.parametrize("path", ["../secret", "/etc/passwd", "unet/../../secret"])
def test_a_path_that_leaves_the_bundle_is_refused(tiny_bundle, path):
    with pytest.raises(BundleError, match="outside the bundle"):
        checked_file(tiny_bundle, load_manifest(tiny_bundle), path)


def test_a_file_that_the_manifest_does_not_list_is_refused(own_bundle):
    (own_bundle / "extra.bin").touch()

    with pytest.raises(BundleError, match=r"lists no file 'extra\.bin'"):
        checked_file(own_bundle, load_manifest(own_bundle), "extra.bin")


@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "tensorrt"])
def test_the_graphs_that_a_backend_states_are_those_that_it_asks_for(name, tiny_bundle):
    manifest = load_manifest(tiny_bundle)
    bare = dataclasses.replace(
        manifest,
        components=tuple(dataclasses.replace(each, graphs=()) for each in manifest.components),
    )
    backend = get_backend(name)

    assert f"needs an {backend.ABILITIES.variant} graph" in backend.why_not(bare)


def test_fp16_graphs_over_fp32_weights_are_held_to_the_bounds_of_fp16(tiny_bundle):
    manifest = dataclasses.replace(load_manifest(tiny_bundle), weights_dtype="float32")
    bounds = {name: _bounds(get_backend(name), manifest) for name in ("onnxruntime", "cuda")}

    assert bounds == {"onnxruntime": BOUNDS["float32"], "cuda": BOUNDS["float16"]}
