"""OpenVINO as a backend: what it computes, what it keeps, and what it leaves on the machine."""

import logging
import os
import shutil
import threading
from dataclasses import replace
from importlib.util import find_spec
from typing import get_args

import numpy as np
import pytest

# Not `importorskip`, which would import it with its telemetry.
if find_spec("openvino") is None:
    pytest.skip("needs the extra openvino", allow_module_level=True)

from ldm_runtime import GenerationRequest, Generator
from ldm_runtime.backends import choose_backend, get_backend, host_memory
from ldm_runtime.backends.contract import EngineSource, RunOptions
from ldm_runtime.backends.openvino import kept_shapes, library
from ldm_runtime.backends.openvino.compiled_models import Latest
from ldm_runtime.backends.openvino.engine import Compilation, OpenVinoEngine
from ldm_runtime.backends.openvino.model_cache import model_cache, remove_oldest
from ldm_runtime.bundle.manifest import load_manifest
from ldm_runtime.diagnostics.measures import psnr, relative_l2
from ldm_runtime.diagnostics.verify import verify
from ldm_runtime.errors import BackendError, ShapeError
from ldm_runtime.pipeline.results import Result
from ldm_runtime.specs.model import Task, axis_sizes, components_of
from ldm_runtime.testing import tiny_networks, tiny_spec
from tests.runtime.sockets import can_forbid_sockets, run_without_sockets
from tests.runtime.test_onnxruntime_backend import random_inputs

PROMPT = "a large red circle"
#: Precisions of every bundle; int8 needs graphs of its own, see tests/export/test_quantize.py.
FLOATING = ("fp32", "bf16")
NEEDS_BF16 = pytest.mark.skipif(not library.has_bf16(), reason="this processor has no bf16")


def open_component(bundle, name, precision="fp32", **compilation):
    manifest = load_manifest(bundle)
    record = manifest.component(name)
    return OpenVinoEngine(
        bundle / record.graphs[0].file,
        record,
        axis_sizes(manifest.spec, name),
        Compilation(precision=precision, threads=1, **compilation),
    )


def pixels_of(result):
    return [image.tobytes() for image in result.images]


def source_of(bundle, name="unet", **changes):
    manifest = load_manifest(bundle)
    source = EngineSource(bundle=bundle, manifest=manifest, component=manifest.component(name))
    return replace(source, **changes)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder of this user."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("task", get_args(Task))
def test_components_compute_what_their_numpy_twins_do_at_any_size(bundle_of, task):
    spec, twins = tiny_spec(task), tiny_networks(task)
    for name in components_of(spec):
        with open_component(bundle_of(task), name) as engine:
            for size in ({}, {"batch": 1, "height": 4, "width": 4}):
                inputs = random_inputs(name, spec=spec, **size)

                outputs = engine.run(inputs)

                for key, array in twins[name](inputs).items():
                    assert outputs[key].dtype == np.float32
                    np.testing.assert_allclose(outputs[key], array, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_images_in_fp32_are_those_of_onnx_runtime(small_bundle_fp32):
    images = []
    for backend in ("onnxruntime", "openvino"):
        with Generator(small_bundle_fp32, backend=backend, precision="fp32", threads=1) as one:
            images.append(np.asarray(one(PROMPT, seed=3, num_inference_steps=6).image))
            assert one.precision == "fp32"

    assert psnr(*images) >= 60


@pytest.mark.slow
@NEEDS_BF16
@pytest.mark.parametrize("name", ["unet", "vae_decoder"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_no_node_has_all_scores_of_an_attention(small_bundle_fp32, name, precision):
    spec = load_manifest(small_bundle_fp32).spec
    inputs = random_inputs(name, spec=spec, height=16, width=16)

    with open_component(small_bundle_fp32, name, precision=precision) as engine:
        engine.run(inputs)
        shapes = tuple(sorted((key, array.shape) for key, array in inputs.items()))
        nodes = engine._compiled[shapes]._compiled.get_runtime_model().get_ops()

    kinds = {each.get_rt_info()["layerType"].astype(str) for each in nodes}
    assert "FullyConnected" in kinds or "Convolution" in kinds
    assert not kinds & {"Softmax", "MatMul"}


@NEEDS_BF16
def test_images_are_not_refused_for_scores_that_are_in_no_memory(tiny_bundle, monkeypatch):
    latents = np.zeros((1, 4, 64, 64), np.float32)
    monkeypatch.setattr(host_memory, "_NEGLIGIBLE_BYTES", 1000)
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 10e6)

    with Generator(tiny_bundle, backend="openvino", threads=1) as generator:
        assert generator.decode(latents)
    with (
        Generator(tiny_bundle, backend="onnxruntime", threads=1) as generator,
        pytest.raises(BackendError, match=r"vae_decoder takes at least 0\.1 GB"),
    ):
        generator.decode(latents)


def test_weights_of_fp16_are_not_held_in_fp32_as_well(small_bundle_fp16):
    """A conversion of weights that OpenVINO computes once takes twice their bytes in addition."""
    spec = load_manifest(small_bundle_fp16).spec
    inputs = random_inputs("unet", spec=spec, height=16, width=16)
    with open_component(small_bundle_fp16, "unet") as engine:
        outputs = engine.run(inputs)["prediction"]
        (compiled,) = engine._compiled._values.values()
        nodes = [each.get_rt_info() for each in compiled._compiled.get_runtime_model().get_ops()]
    with get_backend("onnxruntime").open_engine(source_of(small_bundle_fp16)) as reference:
        expected = reference.run(inputs)["prediction"]

    constants = [each for each in nodes if each["layerType"].value == "Const"]
    halves = [each for each in constants if each["runtimePrecision"].value == "f16"]
    assert len(halves) > 20
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@NEEDS_BF16
def test_bf16_is_what_it_computes_in_unless_told_otherwise_and_says_so(small_bundle_fp32):
    inputs = random_inputs("unet", spec=load_manifest(small_bundle_fp32).spec, height=16, width=16)
    outputs = {}
    for precision in ("fp32", "bf16"):
        with open_component(small_bundle_fp32, "unet", precision) as engine:
            outputs[precision] = engine.run(inputs)["prediction"]
    with Generator(small_bundle_fp32, backend="openvino") as generator:
        assert generator.precision == "bf16"
        assert "openvino in bf16" in repr(generator)

    assert 1e-4 < relative_l2(outputs["bf16"], outputs["fp32"]) < 0.2


def test_a_precision_that_a_backend_has_not_is_refused_in_a_sentence(tiny_bundle, monkeypatch):
    with pytest.raises(BackendError, match="onnxruntime computes in fp32 or int8, not in bf16"):
        Generator(tiny_bundle, backend="onnxruntime", precision="bf16")
    with pytest.raises(
        BackendError, match="openvino computes in fp32 or bf16 or int8, not in fp16"
    ):
        Generator(tiny_bundle, backend="openvino", precision="fp16")
    monkeypatch.setattr(library, "has_bf16", lambda: False)
    with pytest.raises(BackendError, match="this processor has no bf16; use --precision fp32"):
        Generator(tiny_bundle, backend="openvino", precision="bf16")
    with Generator(tiny_bundle, backend="openvino") as generator:
        assert generator.precision == "fp32"


@pytest.mark.usefixtures("free_choice")
def test_auto_prefers_it_to_onnx_runtime_where_it_is_installed(tiny_bundle, monkeypatch, caplog):
    manifest = load_manifest(tiny_bundle)

    assert choose_backend("auto", manifest) == "openvino"

    monkeypatch.setattr("ldm_runtime.backends.openvino.find_spec", lambda _: None)
    assert choose_backend("auto", manifest) == "onnxruntime"
    assert not caplog.messages  # nobody was led to expect it
    with pytest.raises(BackendError, match="is not installed; install the extra 'openvino'"):
        choose_backend("openvino", manifest)


def test_a_bundle_keeps_the_promises_of_fp32_on_it(tiny_bundle):
    checks = list(verify(tiny_bundle, backend="openvino"))

    assert [check for check in checks if not check.passed] == []
    assert any(check.bound is not None and check.measure == "psnr" for check in checks)


@NEEDS_BF16
def test_what_bf16_costs_is_measured_and_not_promised(tiny_bundle):
    checks = list(verify(tiny_bundle, backend="openvino", precision="bf16"))

    assert {check.bound for check in checks} == {None}
    assert max(check.value for check in checks if check.measure == "relative_l2") > 1e-4


@pytest.mark.slow
def test_an_image_does_not_depend_on_how_many_are_generated(small_bundle_fp32):
    inputs = random_inputs(
        "unet", spec=load_manifest(small_bundle_fp32).spec, batch=3, height=8, width=8
    )
    for precision in FLOATING:
        with open_component(small_bundle_fp32, "unet", precision) as engine:
            together = engine.run(inputs)["prediction"]
            alone = [
                engine.run({key: array[row : row + 1] for key, array in inputs.items()})
                for row in range(3)
            ]

        assert np.array_equal(together, np.concatenate([each["prediction"] for each in alone]))


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=NEEDS_BF16)])
def test_images_alone_and_in_company_are_the_same(tiny_bundle, precision):
    requests = [
        GenerationRequest("red", seed=1, num_inference_steps=5),
        GenerationRequest("blue", seed=2, sampler="heun", num_inference_steps=3),
        GenerationRequest("a green square", seed=3, guidance_scale=1.0, num_images=2),
    ]
    with Generator(tiny_bundle, backend="openvino", precision=precision, threads=1) as generator:
        alone = [pixels_of(generator.generate(each)) for each in requests]
        together = [pixels_of(each) for each in generator.run_many(requests)]
        with generator.open_batch() as batch:
            numbers = []
            for request in requests:
                numbers.append(batch.add(request))
                batch.advance()
            ends = {}
            while batch:
                ends |= {
                    number: event for number, event in batch.advance() if isinstance(event, Result)
                }

    assert together == alone
    assert [pixels_of(ends[number]) for number in numbers] == alone


def test_the_number_of_threads_changes_no_byte(tiny_bundle):
    images = []
    for threads in (1, 2):
        with Generator(tiny_bundle, backend="openvino", threads=threads) as generator:
            images.append(generator(PROMPT, seed=1, num_inference_steps=3).image.tobytes())

    assert images[0] == images[1]


def test_threads_share_an_engine_and_get_their_own_results(tiny_bundle):
    inputs = [random_inputs("unet") for _ in range(6)]
    for number, each in enumerate(inputs):
        each["latents"] = each["latents"] * np.float32(number + 1)
    results = {}
    with open_component(tiny_bundle, "unet") as engine:

        def run(number):
            results[number] = engine.run(inputs[number])["prediction"]

        threads = [threading.Thread(target=run, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        expected = [engine.run(each)["prediction"] for each in inputs]

    assert all(np.array_equal(results[number], expected[number]) for number in range(6))


def test_the_thread_of_the_caller_still_has_denormals_afterwards(tiny_bundle):
    smallest = np.float32(1e-45)

    with open_component(tiny_bundle, "unet") as engine:
        engine.run(random_inputs("unet"))

        assert smallest * np.float32(1) > 0


def test_results_belong_to_the_caller(tiny_bundle):
    inputs = random_inputs("unet")
    with open_component(tiny_bundle, "unet") as engine:
        first = engine.run(inputs)["prediction"]
        kept = first.copy()
        engine.run(inputs | {"latents": 2 * inputs["latents"]})

    assert np.array_equal(first, kept)


def test_the_last_shapes_are_kept_and_no_more():
    made = []
    latest = Latest(lambda key: made.append(key) or key, count=2)

    assert [latest[key] for key in "ababcba"] == list("ababcba")
    assert made == list("abca")  # a was the one not used for longest when c came


def test_small_networks_keep_more_shapes_than_large_ones(tiny_bundle, cache):
    with get_backend("openvino").open_engine(source_of(tiny_bundle)) as engine:
        for batch in (1, 2, 3, 4):
            engine.run(random_inputs("unet", batch=batch))
        assert len(engine._compiled._values) == 4

    assert [kept_shapes(size) for size in (0, 10**6, 3 * 10**8, 10**9, 10**10)] == [16, 16, 3, 2, 2]


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (
            {"latents": np.zeros((2, 3, 6, 8), np.float32)},
            ShapeError,
            "shape 2x3x6x8",
        ),
        ({"latents": np.zeros((2, 4, 6, 8))}, BackendError, "must be float32, is float64"),
        ({"noise": np.zeros(1)}, BackendError, "unet takes latents, timesteps, context; it was"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(tiny_bundle, change, kind, message):
    with open_component(tiny_bundle, "unet") as engine, pytest.raises(kind, match=message):
        engine.run(random_inputs("unet") | change)


def test_a_closed_engine_says_so(tiny_bundle):
    engine = open_component(tiny_bundle, "unet")
    engine.close()
    engine.close()

    with pytest.raises(BackendError, match="the unet engine is closed; open the bundle again"):
        engine.run(random_inputs("unet"))


@pytest.mark.parametrize("damage", ["not a graph", "no graph", "no weights"])
def test_a_graph_that_does_not_load_is_one_sentence(own_bundle, damage):
    graph, weights = own_bundle / "unet/model.cpu.onnx", own_bundle / "unet/weights.bin"
    match damage:
        case "not a graph":
            graph.write_bytes(b"not a graph")
        case "no graph":
            graph.unlink()
        case "no weights":
            weights.unlink()

    with pytest.raises(BackendError, match=r"OpenVINO cannot load .*model\.cpu\.onnx: ") as caught:
        open_component(own_bundle, "unet")

    assert "\n" not in str(caught.value)


def run_once(bundle, **changes):
    """Open the UNet, run it once, and return its output and what OpenVINO compiled."""
    with get_backend("openvino").open_engine(source_of(bundle, **changes)) as engine:
        output = engine.run(random_inputs("unet"))["prediction"]
        (shape,) = engine._compiled._values.values()
    return output, shape._compiled


class TestModelsOnDisk:
    """Compiled models in the cache folder of a user."""

    def test_are_read_by_the_next_process(self, tiny_bundle, cache):
        first, _ = run_once(tiny_bundle)
        blobs = list(cache.rglob("*.blob"))
        second, compiled = run_once(tiny_bundle)

        assert compiled.get_property("LOADED_FROM_CACHE")
        assert len(blobs) == 1
        assert list(cache.rglob("*.blob")) == blobs
        assert np.array_equal(first, second)
        (folder,) = (cache / "ldm-deploy/openvino").iterdir()
        assert (folder, 0o700) == (blobs[0].parent, folder.stat().st_mode & 0o777)

    def test_belong_to_what_they_were_compiled_for(self, tiny_bundle, cache, monkeypatch):
        for precision in FLOATING:
            for threads in (1, 2):
                run_once(tiny_bundle, threads=threads, options=RunOptions(precision=precision))
        assert len(list(cache.rglob("*.blob"))) == 2 * len(FLOATING)

        monkeypatch.setattr(library, "processor_name", lambda: "another processor")
        run_once(tiny_bundle, threads=1, options=RunOptions(precision="fp32"))
        assert len(list(cache.rglob("*.blob"))) == 2 * len(FLOATING) + 1

    def test_are_neither_kept_nor_found_without_a_comparison_of_hashes(self, tiny_bundle, cache):
        run_once(tiny_bundle, check_hashes=False)

        assert not list(cache.rglob("*.blob"))

    def test_are_none_of_networks_that_compile_as_fast(self, tiny_bundle, cache, monkeypatch):
        monkeypatch.setattr("ldm_runtime.backends.openvino._LARGE_BYTES", 0)

        run_once(tiny_bundle)

        assert not list(cache.rglob("*.blob"))

    def test_have_another_folder_for_other_weights(self, cache):
        folders = [
            model_cache(hashes).compiled("shape", lambda _: None)
            for hashes in (["a" * 64], ["b" * 64], ["a" * 64])
        ]

        assert folders == [None] * 3
        assert len(list((cache / "ldm-deploy/openvino").iterdir())) == 2

    def test_are_not_read_from_where_others_can_write(self, cache, caplog):
        assert model_cache(["a"]) is not None
        (cache / "ldm-deploy/openvino").chmod(0o777)

        with caplog.at_level(logging.WARNING):
            assert model_cache(["a"]) is None

        assert "others may write to its folder; run `chmod go-w" in caplog.text

    @pytest.mark.skipif(
        not hasattr(os, "getuid") or os.getuid() == 0, reason="root may write anywhere"
    )
    def test_are_not_kept_where_nothing_can_be_written_which_is_a_warning(self, cache, caplog):
        cache.mkdir()
        cache.chmod(0o500)

        with caplog.at_level(logging.WARNING):
            assert model_cache(["a" * 64]) is None

        assert "Permission denied" in caplog.text
        assert "XDG_CACHE_HOME can name another folder" in caplog.text

    def test_appear_complete_or_not_at_all(self, cache):
        """Nothing is left of one that fails, and the first of two processes has its way."""
        kept = model_cache(["a"])

        def fail(folder):
            (folder / "1.blob").write_bytes(b"half")
            raise RuntimeError("no memory")

        with pytest.raises(RuntimeError, match="no memory"):
            kept.compiled("shape", fail)
        assert not list(kept.parent.iterdir())

        def another_process_is_faster(folder):
            (folder / "1.blob").write_bytes(b"second")
            assert kept.compiled("shape", first) == "first"
            return "second"

        def first(folder):
            (folder / "1.blob").write_bytes(b"first")
            return "first"

        assert kept.compiled("shape", another_process_is_faster) == "second"
        (folder,) = kept.parent.iterdir()
        assert (folder / "1.blob").read_bytes() == b"first"
        assert kept.compiled("shape", lambda found: found) == folder

    def test_are_compiled_without_a_folder_that_someone_has_removed(self, cache, caplog):
        kept = model_cache(["a"])
        shutil.rmtree(cache)

        with caplog.at_level(logging.WARNING):
            assert kept.compiled("shape", lambda folder: folder) is None

        assert "no compiled models are kept in" in caplog.text
        assert not cache.exists()

    def test_go_when_there_are_too_many_the_oldest_first(self, cache, monkeypatch):
        monkeypatch.setattr(f"{model_cache.__module__}.MOST_BYTES", 250)
        kept = model_cache(["a"])

        def compile_in(folder):
            (folder / "1.blob").write_bytes(bytes(100))
            return folder

        folders = []
        for age, shape in ((30, "a"), (20, "b")):
            kept.compiled(shape, compile_in)
            folders.append(kept.compiled(shape, lambda folder: folder))
            then = folders[-1].stat().st_mtime - age
            os.utime(folders[-1], (then, then))
        kept.compiled("a", lambda folder: folder)  # used last now

        kept.compiled("c", compile_in)

        last = kept.compiled("c", lambda folder: folder)
        assert [folder.exists() for folder in (*folders, last)] == [True, False, True]

    def test_do_not_mind_what_else_lies_there(self, cache, monkeypatch):
        kept = model_cache(["a"])
        (kept.parent / ".DS_Store").write_bytes(b"")
        monkeypatch.setattr(f"{model_cache.__module__}._STALE_SECONDS", -1.0)
        killed = kept.parent / "partial-1"
        killed.mkdir()

        remove_oldest(kept.parent, but=killed)

        assert [path.name for path in kept.parent.iterdir()] == [".DS_Store"]


@pytest.mark.skipif(not can_forbid_sockets(), reason="needs Linux to forbid sockets")
def test_its_telemetry_is_off(tiny_bundle, tmp_path):
    """Not even where the package is installed that OpenVINO depends on for it."""
    home, packages = tmp_path / "home", tmp_path / "packages"
    home.mkdir()
    spy = packages / "openvino_telemetry/__init__.py"
    spy.parent.mkdir(parents=True)
    spy.write_text("raise SystemExit('telemetry was imported')")
    code = (
        "import sys; from ldm_runtime import Generator\n"
        "with Generator(sys.argv[1], backend='openvino') as generator:\n"
        "    generator('a red circle', num_inference_steps=2)\n"
        "assert 'openvino_telemetry' not in sys.modules"
    )
    path = os.pathsep.join([str(packages), os.environ.get("PYTHONPATH", "")])

    done = run_without_sockets(
        code,
        str(tiny_bundle),
        environment={"PATH": os.environ["PATH"], "PYTHONPATH": path, "HOME": str(home)},
    )

    assert done.returncode == 0, done.stderr
    assert {found.relative_to(home).parts[:3] for found in home.rglob("*.*")} == {
        (".cache",),
        (".cache", "ldm-deploy", "openvino"),
    }


def test_it_needs_no_more_than_the_graphs_for_the_cpu(tiny_bundle, tmp_path):
    bundle = shutil.copytree(tiny_bundle, tmp_path / "engines")
    for path in bundle.glob("*/model.onnx"):
        assert path.name != "model.cpu.onnx"
        path.unlink()

    with Generator(bundle, backend="openvino", check_hashes=False) as generator:
        assert generator(PROMPT, num_inference_steps=2).image.size == (16, 16)


def test_more_threads_than_any_machine_has_cores_are_refused(tiny_bundle):
    with pytest.raises(BackendError, match="threads must be at most 1024, got 100000"):
        Generator(tiny_bundle, backend="openvino", threads=100_000)


def test_options_of_other_backends_are_ignored(tiny_bundle):
    options = RunOptions(cuda_graphs=False, spinning=True)

    with Generator(tiny_bundle, backend="openvino", options=options) as generator:
        assert generator.backend == "openvino"
