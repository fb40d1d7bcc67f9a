"""The CUDA provider on a real GPU. Skipped, with the reason, where there is none."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

pytest.importorskip("onnxruntime")

from ldm_runtime import Generator
from ldm_runtime.backends import choose_backend, get_backend
from ldm_runtime.backends.contract import EngineSource, RunOptions
from ldm_runtime.backends.onnxruntime import cuda
from ldm_runtime.backends.onnxruntime.cuda import CudaOptions
from ldm_runtime.backends.onnxruntime.providers import OrtBuffer
from ldm_runtime.bundle.manifest import load_manifest
from ldm_runtime.diagnostics.verify import verify
from ldm_runtime.errors import BackendError
from ldm_runtime.specs.model import axis_sizes

REASON = cuda.why_not(None)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(REASON is not None, reason=str(REASON))]


def open_unet(bundle, *, options=None, **run_options):
    manifest = load_manifest(bundle)
    source = EngineSource(
        bundle=bundle,
        manifest=manifest,
        component=manifest.component("unet"),
        options=RunOptions(**run_options),
    )
    return cuda.open_engine(source, options)


def unet_inputs(bundle, seed=0, *, batch=2, height=8, width=8):
    spec = load_manifest(bundle).spec
    sizes = {**axis_sizes(spec, "text_encoder"), **axis_sizes(spec, "unet")}
    rng = np.random.default_rng(seed)
    shapes = {
        "latents": (batch, sizes["unet_channels"], height, width),
        "context": (batch, sizes["tokens"], sizes["context_dim"]),
    }
    arrays = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    return arrays | {"timesteps": rng.uniform(0, 999, batch).astype(np.float32)}


def on_the_cpu(bundle, inputs):
    manifest = load_manifest(bundle)
    source = EngineSource(bundle=bundle, manifest=manifest, component=manifest.component("unet"))
    with get_backend("onnxruntime").open_engine(source) as engine:
        return engine.run(inputs)["prediction"]


def relative_l2(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def test_the_golden_outputs_are_within_the_fp16_promise(small_bundle_fp16):
    checks = list(verify(small_bundle_fp16, backend="cuda"))

    assert checks
    assert not [check for check in checks if not check.passed]


def test_auto_prefers_the_gpu_to_the_cpu(small_bundle_fp16):
    assert choose_backend("auto", load_manifest(small_bundle_fp16)) in {"tensorrt", "cuda"}


def test_a_cuda_graph_computes_what_the_kernels_do(small_bundle_fp16):
    inputs = [unet_inputs(small_bundle_fp16, seed) for seed in range(3)]

    with (
        open_unet(small_bundle_fp16, cuda_graphs=True) as recorded,
        open_unet(small_bundle_fp16, cuda_graphs=False) as plain,
    ):
        for each in inputs:
            np.testing.assert_array_equal(
                recorded.run(each)["prediction"], plain.run(each)["prediction"]
            )


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_shapes_may_change_back_and_forth(small_bundle_fp16, cuda_graphs):
    sizes = [(8, 8), (16, 8), (8, 8), (16, 8)]

    with open_unet(small_bundle_fp16, cuda_graphs=cuda_graphs) as engine:
        for seed, (height, width) in enumerate(sizes):
            inputs = unet_inputs(small_bundle_fp16, seed, height=height, width=width)

            found = engine.run(inputs)["prediction"]

            assert relative_l2(found, on_the_cpu(small_bundle_fp16, inputs)) < 5e-3


def test_constants_stay_on_the_device(small_bundle_fp16, monkeypatch):
    inputs = unet_inputs(small_bundle_fp16)
    context = {"context": inputs.pop("context")}
    uploads = []
    write = OrtBuffer.write

    def counted(buffer, array):
        uploads.append(array.shape)
        write(buffer, array)

    monkeypatch.setattr(OrtBuffer, "write", counted)

    with open_unet(small_bundle_fp16) as engine:
        bound = engine.bind(context)
        results = [bound.run(inputs)["prediction"] for _ in range(4)]
        expected = engine.run(inputs | context)["prediction"]

    assert uploads[:-3].count(context["context"].shape) == 1
    for result in results:
        np.testing.assert_array_equal(result, expected)


def test_buffers_are_on_the_gpu():
    assert OrtBuffer((2, 3), "float32", "cuda", 0).value.device_name() == "cuda"


def test_threads_share_an_engine(small_bundle_fp16):
    inputs = [unet_inputs(small_bundle_fp16, seed) for seed in range(4)]

    with open_unet(small_bundle_fp16) as engine, ThreadPoolExecutor(4) as pool:
        alone = [engine.run(each)["prediction"] for each in inputs]
        together = list(pool.map(lambda each: engine.run(each)["prediction"], inputs * 5))

    for index, result in enumerate(together):
        np.testing.assert_array_equal(result, alone[index % len(inputs)])


def test_two_generators_in_one_process_draw_the_same(small_bundle_fp16):
    with (
        Generator(small_bundle_fp16, backend="cuda") as one,
        Generator(small_bundle_fp16, backend="cuda") as other,
    ):
        images = [
            np.asarray(each("red", seed=1, num_inference_steps=3).images[0])
            for each in (one, other, one)
        ]

    np.testing.assert_array_equal(images[0], images[1])
    np.testing.assert_array_equal(images[0], images[2])


@pytest.mark.parametrize(
    "options",
    [
        CudaOptions(prefer_nhwc=True),
        CudaOptions(attention="flash"),
        CudaOptions(attention="math"),
        CudaOptions(conv_search="EXHAUSTIVE"),
        CudaOptions(use_tf32=False),
    ],
    ids=lambda options: f"{options}",
)
def test_every_option_is_taken_and_keeps_the_promise(small_bundle_fp16, options):
    inputs = unet_inputs(small_bundle_fp16)

    with open_unet(small_bundle_fp16, options=options) as engine:
        found = engine.run(inputs)["prediction"]

    assert relative_l2(found, on_the_cpu(small_bundle_fp16, inputs)) < 5e-3


def test_memory_that_runs_out_is_one_sentence_and_not_the_end(small_bundle_fp16):
    limit = CudaOptions(memory_limit=256 << 20)
    small = unet_inputs(small_bundle_fp16)

    with open_unet(small_bundle_fp16, options=limit, cuda_graphs=False) as engine:
        before = engine.run(small)["prediction"]
        with pytest.raises(BackendError, match="ask for fewer or smaller images"):
            engine.run(unet_inputs(small_bundle_fp16, batch=8, height=256, width=256))

        np.testing.assert_array_equal(engine.run(small)["prediction"], before)
