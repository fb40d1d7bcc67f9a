"""TensorRT engines on a real GPU: built for it, run, compared with torch, and refused."""

import logging
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from ldm_runtime import Generator
from ldm_runtime.backends import get_backend, tensorrt
from ldm_runtime.backends.contract import EngineSource, RunOptions
from ldm_runtime.bundle.manifest import load_manifest
from ldm_runtime.diagnostics.verify import verify
from ldm_runtime.engines.build_specs import TARGETS
from ldm_runtime.engines.gpu import find_gpu
from ldm_runtime.errors import BackendError, ShapeError
from ldm_runtime.specs.model import axis_sizes
from tests.gpu.conftest import build_engines

pytestmark = pytest.mark.gpu


def open_unet(bundle, backend="tensorrt", **options):
    manifest = load_manifest(bundle)
    source = EngineSource(
        bundle=bundle,
        manifest=manifest,
        component=manifest.component("unet"),
        options=RunOptions(**options),
    )
    return get_backend(backend).open_engine(source)


def unet_inputs(bundle, seed=0, *, batch=2, larger=0):
    spec = load_manifest(bundle).spec
    sizes = axis_sizes(spec, "unet")
    height = spec.defaults.height // spec.autoencoder.factor + larger
    width = spec.defaults.width // spec.autoencoder.factor
    rng = np.random.default_rng(seed)
    return {
        "latents": rng.standard_normal(
            (batch, sizes["unet_channels"], height, width), dtype=np.float32
        ),
        "timesteps": rng.uniform(0, 999, batch).astype(np.float32),
        "context": rng.standard_normal(
            (batch, sizes["tokens"], sizes["context_dim"]), dtype=np.float32
        ),
    }


def assert_close(found, expected):
    assert np.linalg.norm(found - expected) <= 5e-3 * np.linalg.norm(expected)


def test_engines_built_here_can_run_here(engine_bundle):
    assert tensorrt.why_not(load_manifest(engine_bundle), engine_bundle) is None
    with Generator(engine_bundle) as generator:
        assert generator.backend == "tensorrt"


def test_the_golden_outputs_are_within_the_fp16_promise(engine_bundle):
    checks = list(verify(engine_bundle, backend="tensorrt"))

    assert checks
    assert not [check for check in checks if not check.passed]


def test_every_shape_is_right_and_stays_right_when_shapes_alternate(engine_bundle):
    cases = [
        unet_inputs(engine_bundle, seed, batch=batch, larger=larger)
        for seed, (batch, larger) in enumerate(((1, 0), (2, 0), (4, 4), (2, 0), (1, 0)))
    ]
    with open_unet(engine_bundle, "onnxruntime") as reference:
        expected = [reference.run(each)["prediction"] for each in cases]

    with open_unet(engine_bundle) as engine:
        for _ in range(3):  # run, record, replay
            for inputs, right in zip(cases, expected, strict=True):
                assert_close(engine.run(inputs)["prediction"], right)


def test_cuda_graphs_change_nothing(engine_bundle):
    inputs = [unet_inputs(engine_bundle, seed) for seed in range(4)]

    with open_unet(engine_bundle, cuda_graphs=False, specialization="eager") as engine:
        plain = [engine.run(each)["prediction"] for each in inputs]
    with open_unet(engine_bundle, cuda_graphs=True, specialization="eager") as engine:
        recorded = [engine.run(each)["prediction"] for each in inputs]

    for one, other in zip(plain, recorded, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("specialization", ["lazy", "eager", "none"])
def test_every_way_to_compile_kernels_computes_the_same_within_fp16(engine_bundle, specialization):
    inputs = unet_inputs(engine_bundle)
    with open_unet(engine_bundle, "onnxruntime") as reference:
        expected = reference.run(inputs)["prediction"]

    with open_unet(engine_bundle, specialization=specialization) as engine:
        for _ in range(5):
            assert_close(engine.run(inputs)["prediction"], expected)


def test_bound_constants_do_not_leak_between_threads(engine_bundle):
    def draw(engine, seed):
        inputs = unet_inputs(engine_bundle, seed)
        expected = engine.run(inputs)["prediction"]
        bound = engine.bind({"context": inputs.pop("context")})
        for _ in range(10):
            assert_close(bound.run(inputs)["prediction"], expected)

    with open_unet(engine_bundle) as engine, ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(draw, engine, seed) for seed in range(4)]:
            done.result()


def test_a_shape_outside_the_profiles_is_our_error(engine_bundle):
    with open_unet(engine_bundle) as engine, pytest.raises(ShapeError, match="ldm build-engines"):
        engine.run(unet_inputs(engine_bundle, batch=64))


def test_two_generators_in_one_process_draw_the_same(engine_bundle):
    options = RunOptions(specialization="eager")
    with (
        Generator(engine_bundle, backend="tensorrt", options=options) as one,
        Generator(engine_bundle, backend="tensorrt", options=options) as two,
    ):
        first = one("a red circle", seed=1, num_inference_steps=3)
        second = two("a red circle", seed=1, num_inference_steps=3)

    np.testing.assert_array_equal(first.latents, second.latents)


def test_engines_for_another_gpu_are_refused_and_auto_steps_down(
    small_bundle_fp16, tmp_path, caplog
):
    mine = find_gpu().target
    other = next(target for target in reversed(TARGETS) if target != mine)
    bundle = build_engines(
        small_bundle_fp16, tmp_path / "engines", builder="tensorrt_rtx", targets=(other,)
    )

    with pytest.raises(BackendError, match=f"was built for {other}, this GPU .* is {mine}"):
        Generator(bundle, backend="tensorrt")
    with caplog.at_level(logging.WARNING), Generator(bundle) as generator:
        assert generator.backend != "tensorrt"
    assert f"this GPU ({find_gpu().name}) is {mine}" in caplog.messages[0]


def test_the_interpreter_ends_well_after_drawing(engine_bundle):
    code = (
        "from ldm_runtime import Generator; "
        f"g = Generator({str(engine_bundle)!r}, backend='tensorrt'); "
        "g('a red circle', num_inference_steps=2)"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)

    assert (done.returncode, done.stderr) == (0, b"")
