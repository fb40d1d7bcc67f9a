import gc
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

import ldm_runtime
from ldm_runtime.backends.onnxruntime import cpu, session
from ldm_runtime.backends.onnxruntime.cpu import OnnxRuntimeEngine
from ldm_runtime.backends.processors import default_threads
from ldm_runtime.bundle.manifest import ComponentRecord, load_manifest
from ldm_runtime.errors import BackendError, ShapeError
from ldm_runtime.specs.components import TensorSignature
from ldm_runtime.specs.model import Task, axis_sizes, components_of
from ldm_runtime.testing import TINY_SPEC, tiny_networks, tiny_spec
from ldm_runtime.testing.onnx_bytes import Node, encode_model

TASKS = get_args(Task)

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the switch is Linux's")


def open_component(bundle, name, **options):
    manifest = load_manifest(bundle)
    record = manifest.component(name)
    path = bundle / record.graphs[0].file
    return OnnxRuntimeEngine(path, record, axis_sizes(manifest.spec, record.name), **options)


def random_inputs(name, *, spec=TINY_SPEC, batch=2, height=6, width=8):
    sizes = dict(axis_sizes(spec, name)) | {
        "batch": batch,
        "height": height,
        "width": width,
        "image_height": 2 * height,
        "image_width": 2 * width,
        "context_tokens": 32,
    }
    rng = np.random.default_rng(0)
    return {
        each.name: rng.integers(0, 5, [sizes[axis] for axis in each.axes])
        if each.dtype == "int64"
        else rng.standard_normal([sizes[axis] for axis in each.axes], dtype=np.float32)
        for each in components_of(spec)[name].inputs
    }


@pytest.fixture
def squarer(tmp_path):
    """Opens an engine that multiplies its one input with itself."""
    signatures = [TensorSignature(name=name, axes=("batch",), dtype="float32") for name in "xy"]
    path = tmp_path / "square.onnx"
    node = Node(op="Mul", inputs=("x", "x"), output="y")
    path.write_bytes(encode_model([node], signatures[:1], signatures[1:], {}, {}))
    record = ComponentRecord(
        name="square",
        inputs=tuple(signatures[:1]),
        outputs=tuple(signatures[1:]),
        graphs=(),
        weights_file="",
        fp32_islands=(),
        parity=(),
        key="",
    )
    return lambda: OnnxRuntimeEngine(path, record, {}, threads=1)


@pytest.mark.parametrize(
    ("options", "threads", "spinning"),
    [({}, default_threads(), "0"), ({"threads": 3}, 3, "0"), ({"spinning": True}, None, "1")],
)
def test_threads_are_those_that_may_be_used_and_do_not_spin(
    tiny_bundle, options, threads, spinning
):
    with open_component(tiny_bundle, "unet", **options) as engine:
        found = engine._loaded.session.get_session_options()

    assert found.intra_op_num_threads == (threads or default_threads())
    assert found.get_session_config_entry("session.intra_op.allow_spinning") == spinning


def test_more_threads_than_any_machine_has_cores_are_refused(tiny_bundle):
    with pytest.raises(
        BackendError, match="threads must be at most 1024, got 100000; one per core"
    ):
        open_component(tiny_bundle, "unet", threads=100_000)


@pytest.mark.parametrize(
    ("task", "name"), [(task, name) for task in TASKS for name in components_of(tiny_spec(task))]
)
def test_a_component_computes_what_its_numpy_twin_does_at_any_size(bundle_of, task, name):
    inputs = random_inputs(name, spec=tiny_spec(task))

    with open_component(bundle_of(task), name) as engine:
        outputs = engine.run(inputs)

    expected = tiny_networks(task)[name](inputs)
    assert list(outputs) == [each.name for each in components_of(tiny_spec(task))[name].outputs]
    for key, array in expected.items():
        assert outputs[key].dtype == np.float32
        np.testing.assert_allclose(outputs[key], array, rtol=1e-4, atol=1e-6)


def test_inputs_need_not_be_contiguous(tiny_bundle):
    inputs = random_inputs("vae_decoder")
    reversed_columns = {"latents": inputs["latents"][..., ::-1]}

    with open_component(tiny_bundle, "vae_decoder") as engine:
        image = engine.run(reversed_columns)["image"]

    expected = tiny_networks()["vae_decoder"](reversed_columns)["image"]
    np.testing.assert_allclose(image, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("latents", (2, 3, 6, 8), "input 'latents' has shape 2x3x6x8, .* batchx4xheightxwidth"),
        ("latents", (2, 4, 6), "input 'latents' has shape 2x4x6,"),
        ("latents", (0, 4, 6, 8), "input 'latents' has shape 0x4x6x8,"),
        ("timesteps", (1,), "input 'timesteps' has shape 1, but this engine takes 2"),
        ("context", (2, 16, 9), "input 'context' has shape 2x16x9, .* 2xcontext_tokensx8"),
    ],
)
def test_a_shape_that_does_not_fit_is_refused_before_running(tiny_bundle, name, shape, message):
    inputs = random_inputs("unet") | {name: np.zeros(shape, dtype=np.float32)}

    with open_component(tiny_bundle, "unet") as engine, pytest.raises(ShapeError, match=message):
        engine.run(inputs)


def test_another_element_type_is_refused(tiny_bundle):
    inputs = random_inputs("unet")
    inputs["latents"] = inputs["latents"].astype(np.float64)

    with (
        open_component(tiny_bundle, "unet") as engine,
        pytest.raises(BackendError, match="input 'latents' must be float32, is float64"),
    ):
        engine.run(inputs)


@pytest.mark.parametrize("change", [{"timesteps": None}, {"noise": np.zeros(1)}])
def test_a_missing_or_unknown_input_is_refused(tiny_bundle, change):
    inputs = {
        key: array for key, array in (random_inputs("unet") | change).items() if array is not None
    }

    with (
        open_component(tiny_bundle, "unet") as engine,
        pytest.raises(BackendError, match="unet takes latents, timesteps, context; it was given"),
    ):
        engine.run(inputs)


def test_a_failure_inside_is_one_sentence_and_prints_nothing(tiny_bundle, capfd):
    inputs = {
        "tokens": np.full((1, 16), 10**6),
        "learned_embeddings": np.zeros((1, 16, 8), dtype=np.float32),
        "clip_skip": np.zeros(1, dtype=np.int64),
    }

    with (
        open_component(tiny_bundle, "text_encoder") as engine,
        pytest.raises(
            BackendError, match=r"failed in text_encoder with tokens \(1, 16\),"
        ) as caught,
    ):
        engine.run(inputs)

    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is not None
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("damage", ["graph", "no graph", "no weights", "short weights"])
def test_a_graph_that_does_not_load_is_one_sentence_and_prints_nothing(own_bundle, damage, capfd):
    graph, weights = own_bundle / "unet/model.cpu.onnx", own_bundle / "unet/weights.bin"
    match damage:
        case "graph":
            graph.write_bytes(b"not a graph")
        case "no graph":
            graph.unlink()
        case "no weights":
            weights.unlink()
        case "short weights":
            weights.write_bytes(b"\0" * 100)

    with pytest.raises(BackendError, match=r"cannot load .*model\.cpu\.onnx: ") as caught:
        open_component(own_bundle, "unet")

    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_graph_with_other_inputs_than_the_manifest_says_is_refused(tiny_bundle):
    record = load_manifest(tiny_bundle).component("unet")

    with pytest.raises(BackendError, match="takes latents, but the manifest says context, lat"):
        OnnxRuntimeEngine(
            tiny_bundle / "vae_decoder/model.cpu.onnx", record, axis_sizes(TINY_SPEC, record.name)
        )


@linux
def test_denormals_are_flushed_on_every_thread_and_only_while_running(squarer):
    tiny = np.full(8, 1e-20, dtype=np.float32)
    seen = {}

    def use(name):
        with squarer() as engine:
            seen[name, "engine"] = engine.run({"x": tiny})["y"].max()
        seen[name, "numpy"] = (tiny * tiny).max()

    waiting = threading.Event()
    early = threading.Thread(target=lambda: (waiting.wait(), use("early")))
    early.start()  # before any session, so that it inherits no processor flags
    use("first")
    waiting.set()
    early.join()

    assert seen["first", "engine"] == seen["early", "engine"] == 0
    assert seen["first", "numpy"] == seen["early", "numpy"] > 0


@linux
@pytest.mark.parametrize("threads", [1, 3])
def test_the_thread_count_includes_the_caller(tiny_bundle, threads):
    code = (  # in a process of its own, where no other test's threads come to an end
        "import os, sys; from ldm_runtime import Generator\n"
        "import ldm_runtime.backends.onnxruntime.cpu\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        "with Generator(sys.argv[1], threads=int(sys.argv[2])):\n"
        "    print(len(os.listdir('/proc/self/task')) - before)"
    )

    started = subprocess.run(
        [sys.executable, "-c", code, tiny_bundle, str(threads)],
        capture_output=True,
        check=True,
        cwd=Path(ldm_runtime.__file__).parents[1],
    ).stdout

    assert int(started) == 3 * (threads - 1)  # for each of the three networks


@pytest.fixture
def adder(tmp_path):
    """Opens an engine that adds ones out of a file of weights to its one input."""
    signatures = [
        TensorSignature(name=name, axes=("batch", "height"), dtype="float32") for name in "xy"
    ]
    weights = {"w": np.ones((1, 1 << 20), dtype=np.float32)}
    node = Node(op="Add", inputs=("x", "w"), output="y")
    (tmp_path / "weights.bin").write_bytes(weights["w"].tobytes())
    path = tmp_path / "add.onnx"
    path.write_bytes(encode_model([node], signatures[:1], signatures[1:], weights, {}))
    record = ComponentRecord(
        name="add",
        inputs=tuple(signatures[:1]),
        outputs=tuple(signatures[1:]),
        graphs=(),
        weights_file="weights.bin",
        fp32_islands=(),
        parity=(),
        key="",
    )
    return lambda **options: OnnxRuntimeEngine(path, record, {}, threads=1, **options)


@linux
def test_weights_are_mapped_and_not_read(adder, tmp_path):
    with adder():
        assert str(tmp_path / "weights.bin") in Path("/proc/self/maps").read_text()


def test_a_closed_engine_keeps_its_weights_until_its_calls_are_over(adder, monkeypatch):
    kept = []

    def take_weights(*arguments):
        values = session.take_weights(*arguments)
        kept.extend(map(weakref.ref, values))
        return values

    monkeypatch.setattr(cpu, "take_weights", take_weights)
    engine = adder(weights={"w": np.full((1, 1 << 20), 2, dtype=np.float32)})
    call = engine._opened()  # what a call that is running keeps

    engine.close()
    gc.collect()

    assert [value() is None for value in kept] == [False]
    outputs = call({"x": np.zeros((1, 1 << 20), dtype=np.float32)})
    assert (outputs["y"] == 2).all()
    del call
    gc.collect()
    assert [value() is None for value in kept] == [True]
    with pytest.raises(BackendError, match="the add engine is closed"):
        engine.run({"x": np.zeros((1, 1), dtype=np.float32)})


@pytest.mark.parametrize(
    ("claimed", "sentence"),
    [
        (("batch", "width"), "gives y as float32 of shape 2x3x4, not float32 of 2xwidth"),
        (("batch", "width", "channels"), "of shape 2x3x4, not float32 of 2xwidthx5"),
        ((), "of shape 2x3x4, not float32 of "),
    ],
)
def test_a_graph_that_gives_another_shape_than_its_manifest_says_is_one_sentence(
    tmp_path, claimed, sentence
):
    axes = ("batch", "height", "width")
    x, y = (TensorSignature(name=name, axes=axes, dtype="float32") for name in "xy")
    path = tmp_path / "square.onnx"
    node = Node(op="Mul", inputs=("x", "x"), output="y")
    path.write_bytes(encode_model([node], [x], [y], {}, {}))
    record = ComponentRecord(
        name="square",
        inputs=(TensorSignature(name="x", axes=("batch", "height", "depth"), dtype="float32"),),
        outputs=(TensorSignature(name="y", axes=claimed, dtype="float32"),),
        graphs=(),
        weights_file="",
        fp32_islands=(),
        parity=(),
        key="",
    )

    with (
        OnnxRuntimeEngine(path, record, {"channels": 5, "depth": 4}) as engine,
        pytest.raises(BackendError, match=sentence),
    ):
        engine.run({"x": np.zeros((2, 3, 4), dtype=np.float32)})
