"""Engines built for real by TensorRT-RTX, which needs no GPU for that."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from benchmarks.graph_quality import count_layers
from ldm_export.bundle import export_bundle
from ldm_export.detection.overrides import Overrides
from ldm_export.source import ExportOptions
from ldm_runtime import Generator
from ldm_runtime.bundle.files import check_file
from ldm_runtime.bundle.manifest import load_manifest
from ldm_runtime.diagnostics.inspection import inspect, readable
from ldm_runtime.engines.build import _attach_timing_cache, build_engine
from ldm_runtime.engines.build_specs import (
    TARGETS,
    EngineOptions,
    choose_toolchain,
    make_build_specs,
)
from ldm_runtime.engines.gpu import find_gpu
from ldm_runtime.engines.library import import_builder, library_logger
from ldm_runtime.engines.profiles import SizeRange
from ldm_runtime.engines.records import EngineBuildSpec, ProfileRecord, load_engine_records
from ldm_runtime.engines.store import add_engines, component_files
from ldm_runtime.errors import EngineBuildError
from ldm_runtime.progress import Silent
from ldm_runtime.specs.model import components_of
from tests.export.small_checkpoint import SIZE
from tests.runtime.ctrl_c import output_of_interrupted

pytest.importorskip("tensorrt_rtx", reason="needs the extra tensorrt-rtx")

RTX = EngineOptions(builder="tensorrt_rtx")
#: One small shape, so that a build is short.
STATIC = replace(RTX, sizes=SizeRange(static=True), targets=("sm86",))


@pytest.fixture(scope="module")
def built_bundle(small_bundle_fp16, tmp_path_factory):
    """The small bundle with engines for the default targets and sizes; do not change it."""
    bundle = shutil.copytree(small_bundle_fp16, tmp_path_factory.mktemp("built") / "engines")
    add_engines(bundle, RTX)
    return bundle


def recipes_for(bundle, options):
    manifest = load_manifest(bundle)
    toolchain = choose_toolchain(options)
    files = component_files(manifest.components, manifest.files)
    return make_build_specs(toolchain, options.sizes, manifest.spec, files)


def build_spec(*, targets=("sm86",), **lengths):
    """A recipe for a hand-written graph whose inputs have these shapes, whatever their sizes."""
    return EngineBuildSpec(
        component="unet",
        builder="tensorrt_rtx",
        builder_version=str(import_builder("tensorrt_rtx").__version__),
        graph_sha256="",
        weights_sha256="",
        flags=(),
        profiles=tuple(
            ProfileRecord(input=name, min=shape, opt=shape, max=shape)
            for name, shape in lengths.items()
        ),
        targets=targets,
        gpu_name=None,
    )


def write_graph(path, node, shape, weights=()):
    """Write a graph of one node from `x` to `y` with a constant `w`."""
    graph = helper.make_graph(
        [node],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(each, "w") for each in weights],
    )
    opsets = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_component_builds_for_every_target_from_a_clean_state(
    target, small_bundle_fp16, tmp_path
):
    options = replace(STATIC, targets=(target,))

    for each in recipes_for(small_bundle_fp16, options):
        plan = tmp_path / f"{each.component}.plan"
        build_engine(small_bundle_fp16 / each.component / "model.onnx", each, plan)
        weights = (small_bundle_fp16 / each.component / "weights.bin").stat().st_size
        assert each.targets == (target,)
        assert plan.stat().st_size > 0.9 * weights


@pytest.mark.slow
def test_a_bundle_gets_engines_that_its_manifest_vouches_for(built_bundle):
    manifest = load_manifest(built_bundle)

    records = load_engine_records(built_bundle, manifest)

    for file in manifest.files:
        check_file(built_bundle, file)
    hashes = {file.path: file.sha256 for file in manifest.files}
    assert {record.component for record in records} == components_of(manifest.spec).keys()
    for record in records:
        assert record.graph_sha256 == hashes[f"{record.component}/model.onnx"]
        assert record.weights_sha256 == hashes[f"{record.component}/weights.bin"]
        assert record.plan_sha256 == hashes[record.engine_path]
        assert record.seconds > 0
    assert "unet for sm80, sm86, sm89, sm120, sm121" in readable(inspect(built_bundle, {}))


@pytest.mark.slow
def test_a_bundle_with_engines_still_draws_on_the_cpu(built_bundle, small_bundle_fp16):
    images = []
    for bundle in (built_bundle, small_bundle_fp16):
        with Generator(bundle, backend="onnxruntime") as generator:
            result = generator(prompt="a red circle", seed=7, num_inference_steps=2)
        images.append(np.asarray(result.images[0]))

    assert np.array_equal(*images)


@pytest.mark.slow
def test_engines_are_taken_over_until_their_weights_change(built_bundle, tmp_path):
    bundle = shutil.copytree(built_bundle, tmp_path / "engines")
    labels = []
    add_engines(bundle, RTX, on_write=labels.append)
    assert labels == []
    manifest = load_manifest(bundle)
    records = load_engine_records(bundle, manifest)

    changed = replace(records[1].build_spec, weights_sha256="0" * 64)

    assert changed != records[1].build_spec
    assert recipes_for(bundle, RTX)[1] == records[1].build_spec


@pytest.mark.slow
def test_progress_grows_to_the_end(small_bundle_fp16, tmp_path):
    (text_encoder, *_) = recipes_for(small_bundle_fp16, STATIC)
    seen = []

    build_engine(
        small_bundle_fp16 / "text_encoder/model.onnx",
        text_encoder,
        tmp_path / "a.plan",
        on_progress=seen.append,
    )

    assert len(seen) > 10
    assert seen == sorted(seen)
    assert 0 <= seen[0] < 0.5 < seen[-1] <= 1


@pytest.mark.slow
def test_ctrl_c_ends_a_build_without_a_plan_and_the_next_build_works(small_bundle_fp16, tmp_path):
    plan = tmp_path / "a.plan"
    code = f"""
from pathlib import Path
from ldm_runtime.engines.build import build_engine
from tests.export.test_engine_build import STATIC, recipes_for

bundle, plan = Path({str(small_bundle_fp16)!r}), Path({str(plan)!r})
text_encoder, unet, *_ = recipes_for(bundle, STATIC)
signals = iter([signal.SIGINT])

def interrupt(_):
    for number in signals:
        os.kill(os.getpid(), number)

try:
    build_engine(bundle / "unet/model.onnx", unet, plan, on_progress=interrupt)
except KeyboardInterrupt:
    print("interrupted", [each.name for each in threading.enumerate()], plan.exists())

build_engine(bundle / "text_encoder/model.onnx", text_encoder, plan)
"""

    assert output_of_interrupted(code, seconds=300) == "interrupted ['MainThread'] False\n"
    assert plan.stat().st_size > 0


# Engines as a part of an export


class Outcomes(Silent):
    """Remembers what became of each stage."""

    def __init__(self):
        self.steps, self.estimates = {}, {}

    def plan(self, seconds):
        self.estimates = dict(seconds)

    def end(self, step, outcome):
        self.steps[step] = outcome


def export_over(bundle, checkpoint, engines, **arguments):
    """Export again over a bundle of the same checkpoint, so that only engines are new."""
    options = ExportOptions(
        checkpoint=checkpoint,
        out=bundle,
        overrides=Overrides(height=SIZE, width=SIZE),
        engines=engines,
    )
    outcomes = Outcomes()
    export_bundle(options, progress=outcomes, **arguments)
    return outcomes


@pytest.mark.slow
def test_an_export_publishes_engines_and_the_next_one_takes_them_over(
    small_bundle_fp16, small_checkpoint_path, tmp_path
):
    bundle = shutil.copytree(small_bundle_fp16, tmp_path / "engines")

    first = export_over(bundle, small_checkpoint_path, STATIC)
    second = export_over(bundle, small_checkpoint_path, STATIC)
    manifest = load_manifest(bundle)
    records = load_engine_records(bundle, manifest)
    third = export_over(bundle, small_checkpoint_path, EngineOptions(builder="none"))

    engines = {f"{name} engine sm86" for name in ("text_encoder", "unet", "vae_decoder")}
    assert {name for name, outcome in first.steps.items() if outcome == "built"} >= engines
    assert {name for name, outcome in second.steps.items() if outcome == "reused"} >= engines
    assert engines <= first.estimates.keys()
    assert [second.estimates[name] for name in engines] == [0.0] * 3
    assert [record.build_spec for record in records] == recipes_for(bundle, STATIC)
    assert engines.isdisjoint(third.steps)
    assert load_manifest(bundle).engines == ()
    assert not (bundle / "tensorrt").exists()


@pytest.mark.slow
def test_an_export_interrupted_between_engines_goes_on_with_the_next(
    small_bundle_fp16, small_checkpoint_path, tmp_path
):
    bundle = shutil.copytree(small_bundle_fp16, tmp_path / "engines")

    def interrupt(label):
        if label == "build vae_decoder engine sm86":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_over(bundle, small_checkpoint_path, STATIC, on_write=interrupt)
    assert load_manifest(bundle).engines == ()

    outcomes = export_over(bundle, small_checkpoint_path, STATIC)

    assert outcomes.steps["unet engine sm86"] == "reused"
    assert outcomes.steps["vae_decoder engine sm86"] == "built"
    for file in load_manifest(bundle).files:
        check_file(bundle, file)


@pytest.mark.slow
def test_engines_that_were_added_later_do_not_forbid_another_export(
    built_bundle, small_checkpoint_path, tmp_path
):
    bundle = shutil.copytree(built_bundle, tmp_path / "engines")
    (bundle / "tensorrt/left.partial").mkdir()
    (bundle / "tensorrt/left.partial/unet.plan").write_bytes(b"half")

    outcomes = export_over(bundle, small_checkpoint_path, RTX)

    assert outcomes.steps["unet engine"] == "reused"
    assert not (bundle / "tensorrt/left.partial").exists()


def test_impossible_sizes_are_refused_before_anything_is_exported(small_checkpoint_path, tmp_path):
    impossible = replace(STATIC, sizes=SizeRange(opt_size=(100, 100)))

    with pytest.raises(EngineBuildError, match="opt_size: 100"):
        export_over(tmp_path / "engines", small_checkpoint_path, impossible)

    assert list(tmp_path.iterdir()) == []


# What the library says


def test_an_operator_that_the_parser_does_not_know_is_named_with_its_node(tmp_path):
    node = helper.make_node("Det", ["x"], ["y"], name="the_determinant")
    graph = write_graph(tmp_path / "a.onnx", node, ["b", 4, 4])

    with pytest.raises(EngineBuildError, match=r"node 'the_determinant' \(Det\)"):
        build_engine(graph, build_spec(x=(1, 4, 4)), tmp_path / "a.plan")

    assert not (tmp_path / "a.plan").exists()


def test_two_precisions_at_one_node_are_an_error_because_networks_are_strongly_typed(tmp_path):
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="mixed")
    graph = write_graph(tmp_path / "a.onnx", node, ["b", 4], [np.ones((4, 4), np.float16)])

    with pytest.raises(EngineBuildError, match=r"node 'mixed' .* same input types"):
        build_engine(graph, build_spec(x=(1, 4)), tmp_path / "a.plan")


def test_a_node_that_fails_in_the_builder_is_named(tmp_path):
    node = helper.make_node("Conv", ["x", "w"], ["y"], name="late_conv")
    weights = np.ones((8, 3, 3, 3), np.float32)
    graph = write_graph(tmp_path / "a.onnx", node, ["b", 3, "h", "w"], [weights])

    with pytest.raises(EngineBuildError, match=r"late_conv: .* cannot be negative"):
        build_engine(graph, build_spec(x=(1, 3, 1, 1)), tmp_path / "a.plan")


def test_a_profile_of_another_shape_is_an_error(tmp_path):
    node = helper.make_node("Relu", ["x"], ["y"])
    graph = write_graph(tmp_path / "a.onnx", node, ["b", 4])

    with pytest.raises(EngineBuildError, match="profile has min=5"):
        build_engine(graph, build_spec(x=(1, 5)), tmp_path / "a.plan")


@pytest.mark.parametrize("content", [None, b"", b"not a graph"])
def test_a_missing_or_damaged_graph_is_an_error(content, tmp_path):
    graph = tmp_path / "a.onnx"
    if content is not None:
        graph.write_bytes(content)

    with pytest.raises(EngineBuildError, match=r"cannot build the unet engine from .*a\.onnx: "):
        build_engine(graph, build_spec(x=(1, 4)), tmp_path / "a.plan")


def test_an_error_of_one_build_is_not_told_by_the_next(tmp_path):
    bad = write_graph(tmp_path / "bad.onnx", helper.make_node("Det", ["x"], ["y"]), ["b", 4, 4])
    good = write_graph(tmp_path / "good.onnx", helper.make_node("Relu", ["x"], ["y"]), ["b", 4])
    with pytest.raises(EngineBuildError):
        build_engine(bad, build_spec(x=(1, 4, 4)), tmp_path / "a.plan")

    with pytest.raises(EngineBuildError) as caught:
        build_engine(good, build_spec(x=(1, 5)), tmp_path / "a.plan")

    assert "Det" not in str(caught.value)


@pytest.mark.skipif(find_gpu() is not None, reason="there is a GPU")
def test_refittable_engines_are_refused_without_a_gpu_before_any_build():
    with pytest.raises(EngineBuildError, match="only on a machine with a GPU"):
        choose_toolchain(replace(RTX, refittable=True))


@pytest.mark.filterwarnings("ignore:Use Deprecated:DeprecationWarning")  # RTX keeps no times
def test_the_library_takes_a_timing_cache_as_we_give_it(tmp_path):
    module = import_builder("tensorrt_rtx")
    config = module.Builder(library_logger(module)).create_builder_config()
    (tmp_path / "timing").write_bytes(b"")

    cache = _attach_timing_cache(config, tmp_path / "timing")

    assert bytes(cache.serialize())


def test_every_target_is_one_of_the_librarys():
    capabilities = import_builder("tensorrt_rtx").ComputeCapability.__members__

    assert {target.upper() for target in TARGETS} == set(capabilities) - {"NONE", "CURRENT"}


# What the parser makes of the fp16 UNet


@pytest.fixture(scope="module")
def unet_counts(small_bundle_fp16):
    """Layers of the fp16 UNet in the library's eyes."""
    return count_layers(small_bundle_fp16 / "unet/model.onnx")


@pytest.mark.slow
def test_the_fp16_unet_computes_no_convolution_or_matrix_product_in_fp32(unet_counts):
    assert unet_counts.fp32_products == ()
    assert unet_counts.by_type["CONVOLUTION", "HALF"] > 20
    assert unet_counts.by_type["MATRIX_MULTIPLY", "HALF"] > 20


@pytest.mark.slow
def test_the_fp16_unet_casts_only_into_and_out_of_its_islands(unet_counts):
    normalisations = unet_counts.by_type["NORMALIZATION", "FLOAT"]

    ends = 3  # latents and context come in fp32, the prediction leaves so
    timestep_features = 2  # sine and cosine
    assert normalisations == unet_counts.of_type("NORMALIZATION") > 20
    assert len(unet_counts.float_casts) == 2 * normalisations + ends + timestep_features


@pytest.mark.slow
def test_the_fp16_unet_does_nothing_else_in_fp32(unet_counts):
    in_fp32 = {kind for kind, dtype in unet_counts.by_type if dtype == "FLOAT"}

    # The sinusoid is one product and two functions; the rest moves or holds numbers.
    moves = {"CAST", "CONSTANT", "SHUFFLE", "UNSQUEEZE", "SQUEEZE"}
    assert in_fp32 - moves == {"NORMALIZATION", "ELEMENTWISE", "UNARY"}
    assert unet_counts.by_type["ELEMENTWISE", "FLOAT"] == 1
    assert unet_counts.by_type["UNARY", "FLOAT"] == 2


def test_a_stray_fp32_product_would_be_counted(tmp_path):
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="stray")
    graph = write_graph(tmp_path / "a.onnx", node, ["b", 4], [np.ones((4, 4), np.float32)])

    counts = count_layers(Path(graph))

    assert counts.fp32_products == ("stray",)
