import dataclasses
import logging
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError
from typing import get_args

import numpy as np
import onnxruntime
import pytest

from ldm_runtime.backends import BackendEntry, choose_backend
from ldm_runtime.backends.contract import EngineSource, RunOptions
from ldm_runtime.backends.onnxruntime import cuda
from ldm_runtime.backends.onnxruntime import tensorrt as tensorrt_ort
from ldm_runtime.backends.onnxruntime import tensorrt_rtx as rtx_ort
from ldm_runtime.backends.onnxruntime.cuda import CudaOptions, cuda_provider
from ldm_runtime.backends.onnxruntime.device import MAX_SLOTS, DeviceEngine
from ldm_runtime.backends.onnxruntime.packages import conflict, installed_packages
from ldm_runtime.backends.onnxruntime.providers import (
    OrtSession,
    Provider,
    check_placement,
    driver_fault,
    gpu_fault,
    library_folders,
    open_on,
    preload_libraries,
    provider_fault,
)
from ldm_runtime.backends.onnxruntime.session import describe
from ldm_runtime.bundle.manifest import GraphRecord, load_manifest
from ldm_runtime.engines.gpu import Gpu
from ldm_runtime.errors import BackendError, ShapeError
from ldm_runtime.specs.model import Task, axis_sizes, components_of
from ldm_runtime.testing import TINY_SPEC, tiny_networks, tiny_spec

FACTOR = TINY_SPEC.autoencoder.factor
CPU = Provider(name="CPUExecutionProvider", options={}, memory="cpu")
GPU = Gpu(name="Big Card", compute_capability=(9, 0), driver_version="12.4")


class FakeBuffer:
    def __init__(self, session, shape, dtype):
        self.array = np.zeros(shape, dtype)
        self._session = session

    def write(self, array):
        assert (array.shape, array.dtype) == (self.array.shape, self.array.dtype)
        self.array[...] = array
        self._session.writes.append(self)

    def read(self):
        return self.array.copy()


class FakeSession:
    """A device: a call reads and writes the buffers it was prepared with, and no others."""

    def __init__(self, function, *, records_graphs=True):
        self.records_graphs = records_graphs
        self.writes, self.prepared, self.calls, self.threads = [], [], [], set()
        self.forgotten, self.closed, self.failure = [], False, None
        self._function = function

    def allocate(self, shape, dtype):
        return FakeBuffer(self, shape, dtype)

    def prepare(self, inputs, outputs, graph_id):
        self.prepared.append((dict(inputs), dict(outputs), graph_id))

        def call():
            self.calls.append(graph_id)
            self.threads.add(threading.current_thread())
            if self.failure is not None:
                raise self.failure
            results = self._function({name: buffer.array for name, buffer in inputs.items()})
            for name, buffer in outputs.items():
                buffer.array[...] = results[name]

        return call

    def forget(self, graph_id):
        self.forgotten.append(graph_id)

    def close(self):
        self.closed = True

    def written(self, name):
        """How many times each set of buffers got a new value of an input."""
        return [self.writes.count(inputs[name]) for inputs, _, _ in self.prepared]


def open_fake(bundle, name="unet", task="text-to-image", **options):
    session = FakeSession(tiny_networks(task)[name], **options)
    record = load_manifest(bundle).component(name)
    return session, DeviceEngine(
        session, record, axis_sizes(tiny_spec(task), record.name), factor=FACTOR
    )


def open_real(bundle, name="unet"):
    """The engine over ONNX Runtime itself, on the device that every machine has."""
    manifest = load_manifest(bundle)
    record = manifest.component(name)
    session = OrtSession(bundle / record.graphs[0].file, CPU, records_graphs=False)
    return DeviceEngine(session, record, axis_sizes(manifest.spec, record.name), factor=FACTOR)


def unet_inputs(seed=0, *, batch=2, height=4, width=6):
    rng = np.random.default_rng(seed)
    return {
        "latents": rng.standard_normal((batch, 4, height, width), dtype=np.float32),
        "timesteps": rng.uniform(0, 999, batch).astype(np.float32),
        "context": rng.standard_normal((batch, 16, 8), dtype=np.float32),
    }


def apart(inputs):
    """Split inputs into what a step brings and what a request keeps."""
    context = {"context": inputs["context"]}
    return {name: inputs[name] for name in ("latents", "timesteps")}, context


def shaped(name, *, spec=TINY_SPEC, batch, height, width):
    sizes = dict(axis_sizes(spec, name)) | {
        "batch": batch,
        "height": height,
        "width": width,
        "image_height": FACTOR * height,
        "image_width": FACTOR * width,
        "context_tokens": 32,
    }
    rng = np.random.default_rng(1)
    return {
        each.name: rng.integers(0, 5, [sizes[axis] for axis in each.axes])
        if each.dtype == "int64"
        else rng.standard_normal([sizes[axis] for axis in each.axes], dtype=np.float32)
        for each in components_of(spec)[name].inputs
    }


@pytest.fixture
def fp16_bundle(tiny_bundle):
    """The tiny bundle and a manifest that calls its graphs fp16."""
    manifest = load_manifest(tiny_bundle)
    components = tuple(
        dataclasses.replace(
            each, graphs=(GraphRecord(variant="fp16", file=f"{each.name}/model.cpu.onnx"),)
        )
        for each in manifest.components
    )
    return tiny_bundle, dataclasses.replace(manifest, components=components)


def source_of(fp16_bundle, name="unet", **options):
    bundle, manifest = fp16_bundle
    return EngineSource(
        bundle=bundle, manifest=manifest, component=manifest.component(name), **options
    )


# The plan: which buffers there are, what lies in them, which graph is replayed


@pytest.mark.parametrize(
    ("task", "name"),
    [(task, name) for task in get_args(Task) for name in components_of(tiny_spec(task))],
)
@pytest.mark.parametrize("size", [(1, 4, 4), (3, 6, 2)])
def test_every_input_and_output_has_a_buffer_of_its_shape(bundle_of, task, name, size):
    spec = tiny_spec(task)
    inputs = shaped(name, spec=spec, batch=size[0], height=size[1], width=size[2])
    expected = tiny_networks(task)[name](inputs)

    for engine in (open_fake(bundle_of(task), name, task)[1], open_real(bundle_of(task), name)):
        with engine:
            outputs = engine.run(inputs)

        assert list(outputs) == [each.name for each in components_of(spec)[name].outputs]
        for key, array in expected.items():
            assert outputs[key].dtype == np.float32
            np.testing.assert_allclose(outputs[key], array, rtol=1e-4, atol=1e-6)


def test_the_caller_owns_what_an_engine_returns(tiny_bundle):
    with open_real(tiny_bundle) as engine:
        first = engine.run(unet_inputs(0))["prediction"]
        before = first.copy()

        engine.run(unet_inputs(1))

        np.testing.assert_array_equal(first, before)
        first[...] = 0  # and may write to it


def test_a_shape_keeps_its_buffers_and_another_gets_its_own_graph(tiny_bundle):
    session, engine = open_fake(tiny_bundle)

    with engine:
        for height in (4, 4, 8, 4):
            engine.run(unet_inputs(height=height))

    assert len(session.prepared) == 2
    assert session.calls == [1, 1, 2, 1]


def test_without_cuda_graphs_no_call_has_a_number(tiny_bundle):
    session, engine = open_fake(tiny_bundle, records_graphs=False)

    with engine:
        engine.run(unet_inputs(height=4))
        engine.run(unet_inputs(height=8))

    assert session.calls == [None, None]


def test_constants_are_uploaded_once_a_request(tiny_bundle):
    session, engine = open_fake(tiny_bundle)
    step, constants = apart(unet_inputs())

    with engine:
        bound = engine.bind(constants)
        for _ in range(5):
            bound.run(step)

    assert session.written("context") == [1]
    assert session.written("latents") == [5]


def test_every_bound_runner_computes_with_its_own_constants(tiny_bundle):
    (step, one), (_, other) = apart(unet_inputs(0)), apart(unet_inputs(1))
    network = tiny_networks()["unet"]

    with open_real(tiny_bundle) as engine:
        runners = [(engine.bind(constants), constants) for constants in (one, other)]
        for bound, constants in [*runners, *runners]:
            found = bound.run(step)["prediction"]

            expected = network(step | constants)["prediction"]
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_an_unbound_run_does_not_leave_its_inputs_to_a_bound_one(tiny_bundle):
    _, engine = open_fake(tiny_bundle)
    step, constants = apart(unet_inputs(0))

    with engine:
        bound = engine.bind(constants)
        before = bound.run(step)["prediction"]
        engine.run(unet_inputs(1))

        np.testing.assert_array_equal(bound.run(step)["prediction"], before)


def test_bound_constants_are_those_of_the_moment(tiny_bundle):
    _, engine = open_fake(tiny_bundle)
    step, constants = apart(unet_inputs())
    expected = tiny_networks()["unet"](step | constants)["prediction"]

    with engine:
        bound = engine.bind(constants)
        constants["context"][...] = 7

        np.testing.assert_array_equal(bound.run(step)["prediction"], expected)


def test_an_input_that_is_bound_is_not_given_again(tiny_bundle):
    _, engine = open_fake(tiny_bundle)

    with engine, pytest.raises(BackendError, match="context of unet is bound already"):
        engine.bind({"context": unet_inputs()["context"]}).run(unet_inputs())


def test_threads_get_their_own_results_from_one_worker(tiny_bundle):
    session, engine = open_fake(tiny_bundle)
    network = tiny_networks()["unet"]

    def draw(seed):
        step, constants = apart(unet_inputs(seed))
        bound = engine.bind(constants)
        results = [bound.run(step)["prediction"] for _ in range(20)]
        expected = network(step | constants)["prediction"]
        return all(np.array_equal(result, expected) for result in results)

    with engine, ThreadPoolExecutor(4) as pool:
        assert all(pool.map(draw, range(4)))

    assert len(session.threads) == 1  # CUDA graphs are kept per thread


def test_shapes_used_longest_ago_make_room(tiny_bundle):
    session, engine = open_fake(tiny_bundle)
    heights = range(1, MAX_SLOTS + 1)

    with engine:
        for height in (*heights, 1, MAX_SLOTS + 1, 1, 2):
            engine.run(unet_inputs(height=height))

    assert session.forgotten == [2, 3]  # the first was used again, so the second made room
    assert session.calls[-2:] == [1, MAX_SLOTS + 2]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"latents": np.zeros((2, 3, 4, 6), np.float32)}, ShapeError, "'latents' has shape 2x3x4"),
        ({"latents": np.zeros((2, 4, 4, 6))}, BackendError, "must be float32, is float64"),
        ({"noise": np.zeros(1)}, BackendError, "unet takes latents, timesteps, context; it was"),
    ],
)
def test_inputs_are_checked_before_anything_is_reserved(tiny_bundle, change, error, message):
    session, engine = open_fake(tiny_bundle)

    with engine, pytest.raises(error, match=message):
        engine.run(unet_inputs() | change)

    assert not session.prepared


def test_a_closed_engine_says_so_and_has_let_go(tiny_bundle):
    session, engine = open_fake(tiny_bundle)
    with engine:
        bound = engine.bind({"context": unet_inputs()["context"]})
    engine.close()

    for runner, inputs in ((engine, unet_inputs()), (bound, apart(unet_inputs())[0])):
        with pytest.raises(BackendError, match="the unet engine is closed; open the bundle"):
            runner.run(inputs)
    assert session.closed


# Failures


def test_a_failure_is_one_sentence_and_its_buffers_are_not_used_again(tiny_bundle):
    session, engine = open_fake(tiny_bundle)
    session.failure = RuntimeError("CUDA failure 2: out of memory ; GPU=0\nat cuda_call.cc:129")

    with engine:
        with pytest.raises(BackendError, match="ask for fewer or smaller images") as caught:
            engine.run(unet_inputs())
        session.failure = None
        engine.run(unet_inputs())

    assert "failed in unet with latents (2, 4, 4, 6)" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is not None
    assert session.forgotten == [1]
    assert session.calls == [1, 2]


@pytest.mark.parametrize(
    ("message", "advice"),
    [
        ("BFCArena: Failed to allocate memory for requested buffer of size 9", "smaller images"),
        ("CUDNN_STATUS_NOT_INITIALIZED", r"pip install 'onnxruntime-gpu\[cuda,cudnn\]'"),
        ("libcublasLt.so.13: cannot open shared object file", r"onnxruntime-gpu\[cuda,cudnn\]"),
        ("libnvinfer.so.10: cannot open shared object file", r"'tensorrt-cu13==10\.\*'"),
        ("CUDA driver version is insufficient for CUDA runtime version", "update the NVIDIA dri"),
        ("no kernel image is available for execution on the device", "no code for this GPU"),
    ],
)
def test_a_message_of_the_vendor_comes_with_what_to_do(message, advice):
    with pytest.raises(BackendError, match=advice):
        raise BackendError(describe(RuntimeError(f"{message}\nmore")))


def test_a_message_that_nobody_knows_is_passed_on_as_it_is():
    assert describe(RuntimeError("the moon is full.\nat night")) == "the moon is full"
    assert describe(RuntimeError()) == "RuntimeError"


# Where a session really runs


def test_a_silent_fall_to_the_cpu_is_an_error(tmp_path):
    with pytest.raises(BackendError, match=r"on CPUExecutionProvider and not on CUDAExec"):
        check_placement(tmp_path, "CUDAExecutionProvider", ["CPUExecutionProvider"], [])


def test_a_provider_that_runs_nothing_is_an_error(tmp_path):
    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]

    with pytest.raises(BackendError, match="gave CUDAExecutionProvider nothing"):
        check_placement(tmp_path, providers[0], providers, [(providers[1], "Add")])


def test_heavy_operators_on_the_cpu_are_an_error_and_shapes_are_not(tmp_path):
    gpu, cpu = "CUDAExecutionProvider", "CPUExecutionProvider"
    placed = [(gpu, "Conv"), (cpu, "Gather"), (cpu, "Concat")]

    check_placement(tmp_path, gpu, [gpu, cpu], placed)
    with pytest.raises(BackendError, match=r"would leave Attention, FusedMatMul of .* to the CPU"):
        check_placement(
            tmp_path, gpu, [gpu, cpu], [*placed, (cpu, "Attention"), (cpu, "FusedMatMul")]
        )


def test_a_provider_that_is_missing_raises_and_prints_nothing(fp16_bundle, capfd):
    missing = Provider(name="AbacusExecutionProvider", options={"beads": "10"})

    with pytest.raises(BackendError, match="AbacusExecutionProvider"):
        open_on(missing, source_of(fp16_bundle))

    assert capfd.readouterr().out == ""


def test_a_graph_that_does_not_load_is_one_sentence(fp16_bundle, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"not a graph")

    with pytest.raises(BackendError, match=r"CPUExecutionProvider cannot load .*model\.onnx: "):
        OrtSession(path, CPU, records_graphs=False)


def test_the_backend_opens_fp16_graphs_and_checks_their_names(fp16_bundle):
    source = source_of(fp16_bundle)
    component = dataclasses.replace(source.component, inputs=source.component.inputs[:1])

    with open_on(CPU, source) as engine:
        found = engine.run(unet_inputs())["prediction"]

    expected = tiny_networks()["unet"](unet_inputs())["prediction"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(BackendError, match="but the manifest says latents; export"):
        open_on(CPU, dataclasses.replace(source, component=component))


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("unet", RunOptions(), True),
        ("unet", RunOptions(cuda_graphs=False), False),
        ("vae_decoder", RunOptions(), False),  # called once a picture
    ],
)
def test_cuda_graphs_are_for_the_network_in_the_loop_and_can_be_turned_off(
    fp16_bundle, monkeypatch, name, options, expected
):
    asked = []

    class Session(OrtSession):
        def __init__(self, path, provider, *, records_graphs, weights):
            asked.append(records_graphs)
            super().__init__(path, CPU, records_graphs=False, weights=weights)

    monkeypatch.setattr("ldm_runtime.backends.onnxruntime.providers.OrtSession", Session)

    with cuda.open_engine(source_of(fp16_bundle, name, options=options)):
        pass

    assert asked == [expected]


@pytest.mark.parametrize("message", ["cannot use the graph capture feature as", "is out of order"])
def test_only_a_graph_that_cannot_be_recorded_is_run_without(
    fp16_bundle, monkeypatch, caplog, message
):
    class Session(OrtSession):
        def __init__(self, path, provider, *, records_graphs, weights):
            if records_graphs:
                raise BackendError(f"this session {message}")
            super().__init__(path, CPU, records_graphs=False, weights=weights)

    monkeypatch.setattr("ldm_runtime.backends.onnxruntime.providers.OrtSession", Session)
    source = source_of(fp16_bundle)

    if "capture" in message:
        with caplog.at_level(logging.WARNING), tensorrt_ort.open_engine(source) as engine:
            engine.run(unet_inputs())
        assert caplog.messages == [f"this session {message}; running without CUDA graphs"]
    else:
        with pytest.raises(BackendError, match=message):
            cuda.open_engine(source)


def test_a_graph_number_reaches_onnx_runtime_and_an_unknown_one_is_forgotten(tiny_bundle):
    path = tiny_bundle / "vae_decoder/model.cpu.onnx"
    session = OrtSession(path, CPU, records_graphs=False)
    latents, image = (
        session.allocate((1, 4, 2, 2), "float32"),
        session.allocate((1, 3, 4, 4), "float32"),
    )
    latents.write(np.full((1, 4, 2, 2), 0.5, np.float32))

    session.prepare({"latents": latents}, {"image": image}, 3)()
    session.forget(3)

    assert np.any(image.read())


# Options


def test_options_are_spelled_as_onnx_runtime_does():
    plain = cuda_provider(CudaOptions())
    tuned = cuda_provider(
        CudaOptions(
            device=1,
            conv_search="EXHAUSTIVE",
            prefer_nhwc=True,
            attention="flash",
            use_tf32=False,
            memory_limit=1 << 30,
        )
    )

    assert plain.options == {
        "device_id": "0",
        "cudnn_conv_algo_search": "HEURISTIC",
        "prefer_nhwc": "0",
        "use_tf32": "1",
    }
    assert tuned.options == {
        "device_id": "1",
        "cudnn_conv_algo_search": "EXHAUSTIVE",
        "prefer_nhwc": "1",
        "use_tf32": "0",
        "sdpa_kernel": "1",
        "gpu_mem_limit": "1073741824",
    }
    assert tuned.device == 1


def test_tensorrt_may_leave_the_rest_to_cuda():
    assert [each.name for each in tensorrt_ort.PROVIDER.fallbacks] == ["CUDAExecutionProvider"]


# Why not


@pytest.mark.parametrize("backend", [cuda, tensorrt_ort, rtx_ort])
def test_a_bundle_without_fp16_graphs_is_refused_by_name(tiny_bundle, backend):
    reason = backend.why_not(load_manifest(tiny_bundle))

    assert reason is not None
    assert "needs an fp16 graph, which text_encoder lacks; export without --no-fp16" in reason
    assert backend.version() == onnxruntime.__version__


@pytest.mark.skipif(gpu_fault("cuda") is None, reason="there is a GPU")
@pytest.mark.parametrize("name", ["cuda", "tensorrt-ort", "tensorrt-rtx-ort"])
def test_without_a_gpu_each_says_so(fp16_bundle, name):
    with pytest.raises(BackendError, match=f"{name} needs an NVIDIA GPU, .*nvidia-smi"):
        choose_backend(name, fp16_bundle[1])


def test_a_gpu_whose_driver_is_too_old_gives_both_versions():
    assert driver_fault("cuda", GPU, "") is None
    assert driver_fault("cuda", GPU, "12.8") is None
    reason = driver_fault("cuda", GPU, "13.0")

    assert reason is not None
    assert "CUDA 13.0" in reason
    assert "of the Big Card serves 12.4; update the driver" in reason


def test_a_gpu_that_is_there_is_no_reason_for_a_package_built_for_no_cuda(monkeypatch):
    monkeypatch.setattr(onnxruntime, "cuda_version", "", raising=False)

    assert gpu_fault("cuda", lambda: GPU) is None
    assert "needs an NVIDIA GPU" in str(gpu_fault("cuda", lambda: None))


@pytest.mark.parametrize(
    ("packages", "message"),
    [
        ({"onnxruntime": "1.31.1"}, "onnxruntime 1.31.1 does not have; run `pip uninstall onnxr"),
        ({}, "this onnxruntime does not have; install the extra 'cuda' of ldm-deploy"),
        (
            {"onnxruntime": "1.31.1", "onnxruntime-gpu": "1.31.1"},
            "missing: onnxruntime 1.31.1 and onnxruntime-gpu 1.31.1 are installed together",
        ),
    ],
)
def test_a_missing_provider_is_explained_by_what_is_installed(packages, message):
    assert provider_fault("cuda", "CPUExecutionProvider", packages) is None
    with pytest.raises(BackendError, match=message):
        raise BackendError(provider_fault("cuda", "AbacusExecutionProvider", packages))


def test_one_package_of_onnx_runtime_is_no_conflict_and_two_name_the_one_to_keep():
    def find(name):
        if name == "onnxruntime-openvino":
            raise PackageNotFoundError(name)
        return "1.31.1"

    installed = installed_packages(find)

    assert installed == {"onnxruntime": "1.31.1", "onnxruntime-gpu": "1.31.1"}
    assert conflict({"onnxruntime": "1.31.1"}) is None
    assert str(conflict(installed)).endswith(
        "run `pip uninstall onnxruntime onnxruntime-gpu` and then `pip install onnxruntime-gpu`"
    )


def test_the_rtx_plugin_says_what_is_wrong_with_it(tmp_path, monkeypatch):
    (tmp_path / "half_a_plugin.py").write_text(
        "def get_library_path():\n    raise FileNotFoundError('no library here')"
    )
    (tmp_path / "broken_plugin.py").write_text(
        f"def get_library_path():\n    return {str(tmp_path / 'libgone.so')!r}"
    )
    monkeypatch.syspath_prepend(str(tmp_path))

    with pytest.raises(BackendError, match="run `pip install onnxruntime-ep-nv-tensorrt-rtx`"):
        rtx_ort.register("plugin_that_is_not_there")
    with pytest.raises(BackendError, match="is not complete: no library here"):
        rtx_ort.register("half_a_plugin")
    with pytest.raises(BackendError, match=r"cannot load .*libgone\.so"):
        rtx_ort.register("broken_plugin")


def test_the_rtx_provider_is_used_through_the_devices_that_it_offers(fp16_bundle, monkeypatch):
    stand_in = dataclasses.replace(rtx_ort.PROVIDER, name=CPU.name)  # which has a device, too
    monkeypatch.setattr(rtx_ort, "PROVIDER", stand_in)
    monkeypatch.setattr(rtx_ort, "gpu_fault", lambda _: None)
    monkeypatch.setattr(onnxruntime, "get_available_providers", list)

    assert rtx_ort.why_not(fp16_bundle[1]) is None
    with rtx_ort.open_engine(source_of(fp16_bundle)) as engine:
        found = engine.run(unet_inputs())["prediction"]

    expected = tiny_networks()["unet"](unet_inputs())["prediction"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_the_rtx_provider_without_its_package_or_without_an_rtx_card_says_so(tmp_path, monkeypatch):
    (tmp_path / "onnxruntime_ep_nv_tensorrt_rtx.py").write_text(
        "def get_library_path():\n    return 'plugin.so'"
    )
    monkeypatch.setattr(rtx_ort, "gpu_fault", lambda _: None)
    monkeypatch.setattr(rtx_ort, "plugin_devices", lambda _: [])
    monkeypatch.setattr(onnxruntime, "register_execution_provider_library", lambda *_: None)

    assert "ep-nv-tensorrt-rtx" in str(rtx_ort.why_not(None))
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "supports no GPU of this machine, only" in str(rtx_ort.why_not(None))


def test_what_preloading_prints_is_not_printed(monkeypatch, capsys, caplog):
    monkeypatch.setattr(
        onnxruntime, "preload_dlls", lambda: sys.stdout.write("Failed to load libmoon.so\n")
    )

    with caplog.at_level(logging.DEBUG, logger="ldm_runtime"):  # a command may have raised it
        preload_libraries()
        monkeypatch.delattr(onnxruntime, "preload_dlls")
        preload_libraries()

    assert capsys.readouterr().out == ""
    assert caplog.messages == ["onnxruntime.preload_dlls: Failed to load libmoon.so"]


@pytest.mark.skipif(sys.platform == "win32", reason="folders of libraries are called otherwise")
def test_libraries_of_nvidia_are_found_elsewhere_on_the_path(tmp_path, monkeypatch):
    for folder in ("cu13/lib", "cudnn/lib", "cu13/include"):
        (tmp_path / "nvidia" / folder).mkdir(parents=True)
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    asked = []
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda directory=None: asked.append(directory))

    preload_libraries()

    assert asked == [str(tmp_path / "nvidia/cu13/lib"), str(tmp_path / "nvidia/cudnn/lib"), None]
    assert library_folders(tmp_path) == []  # there, ONNX Runtime finds them itself
    monkeypatch.setattr(sys, "path", [])
    assert library_folders(tmp_path) == []


@pytest.mark.usefixtures("free_choice")
@pytest.mark.parametrize("prepared", [True, False])
def test_auto_steps_down_in_one_sentence_if_the_gpu_was_expected(
    tiny_bundle, monkeypatch, caplog, prepared
):
    monkeypatch.setattr(
        cuda, "installed_packages", lambda: {"onnxruntime-gpu": "1"} if prepared else {}
    )
    monkeypatch.setattr(cuda, "has_provider", lambda _: False)
    entries = {
        name: BackendEntry(module=f"ldm_runtime.backends.{module}", extra="", automatic=automatic)
        for name, module, automatic in (
            ("tensorrt-ort", "onnxruntime.tensorrt", False),
            ("cuda", "onnxruntime.cuda", True),
            ("onnxruntime", "onnxruntime.cpu", True),
        )
    }

    with caplog.at_level(logging.WARNING):
        assert choose_backend("auto", load_manifest(tiny_bundle), entries) == "onnxruntime"

    assert len(caplog.messages) == int(prepared)
    assert all(
        each.startswith("cuda needs an fp16 graph, which text_encoder lacks")
        and each.endswith("; using onnxruntime")
        for each in caplog.messages
    )
