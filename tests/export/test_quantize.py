"""Graphs in 8 bits: what they compute, how layers are chosen, and what they leave in a bundle."""

import io
import json
import shutil
from dataclasses import replace

import numpy as np
import onnx
import onnx.reference
import pytest

from ldm_export import export
from ldm_export.detection.overrides import Overrides
from ldm_export.workspace import check_destination
from ldm_runtime import Generator
from ldm_runtime.backends.onnxruntime.tensorrt import PROVIDER, provider_for
from ldm_runtime.bundle.files import check_file
from ldm_runtime.bundle.manifest import MANIFEST_NAME, encode_manifest, load_manifest, without_int8
from ldm_runtime.bundle.quantized_graphs import (
    CANDIDATE_FILE,
    GRAPH_FILE,
    Layer,
    Range,
    error_outputs,
    layers_of,
    quantized_graph,
    range_outputs,
    with_errors,
    with_ranges,
)
from ldm_runtime.cli.commands import main
from ldm_runtime.cli.quantize import _prompts
from ldm_runtime.diagnostics.golden_outputs import GoldenOutput
from ldm_runtime.diagnostics.measures import psnr, relative_l2
from ldm_runtime.diagnostics.verify import QUANTIZED_MARGIN, verify
from ldm_runtime.durable import locked_folder
from ldm_runtime.engines.build_specs import EngineOptions
from ldm_runtime.errors import BackendError, BundleError, ManifestError, RequestError
from ldm_runtime.quantization import quantize
from ldm_runtime.quantization.quantize import QuantizationOptions, quantize_bundle
from ldm_runtime.quantization.recording import RangeRecorder
from ldm_runtime.quantization.requests import SampleOptions, make_samples
from ldm_runtime.requests.resolution import resolve
from ldm_runtime.specs.tasks import TASKS, task_record
from ldm_runtime.testing import tiny_requests, tiny_spec
from tests.export.small_checkpoint import SIZE
from tests.serve.adapter_files import write_lora

BACKENDS = ("onnxruntime", "openvino")
FIELDS = {"prompt": "red", "num_inference_steps": 3, "height": SIZE, "width": SIZE, "seed": 5}
#: Tasks whose golden requests have an image or a map of the size of the result.
GIVEN_SIZES = {
    *("semantic-synthesis", "super-resolution", "text-super-resolution", "inpainting"),
    *("text-inpainting", "image-editing", "depth-to-image"),
}
NO_ENGINES = EngineOptions(builder="none")
SAMPLES = SampleOptions(measured=2, compared=1, steps=3)


def quantized(bundle, **options):
    settings = {"backend": "onnxruntime", "threads": 1, "samples": SAMPLES, "least_psnr": 20.0}
    return quantize_bundle(bundle, QuantizationOptions(**(settings | options)))


def contents(bundle):
    return {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()}


def unet_of(bundle):
    """The UNet's fp32 graph and weights, and its golden inputs and output."""
    component = load_manifest(bundle).component("unet")
    (graph,) = (bundle / each.file for each in component.graphs if each.variant == "fp32")
    with np.load(bundle / "golden/components/unet.npz") as file:
        arrays = dict(file)
    inputs = {name[3:]: array for name, array in arrays.items() if name.startswith("in.")}
    return graph, bundle / component.weights_file, inputs, arrays["out.prediction"]


def run_in_onnx(graph, data, inputs):
    """Outputs of a graph by name, in ONNX's own reference implementation."""
    model = onnx.load_model_from_string(data)
    onnx.load_external_data_for_model(model, str(graph.parent))
    names = [each.name for each in model.graph.output]
    return dict(zip(names, onnx.reference.ReferenceEvaluator(model).run(None, inputs), strict=True))


def pixels_of(bundle, **options):
    with Generator(bundle, threads=1, **options) as generator:
        return np.asarray(generator(**FIELDS).image)


@pytest.fixture
def bundle(small_bundle_fp16, tmp_path):
    return shutil.copytree(small_bundle_fp16, tmp_path / "engines")


@pytest.fixture(scope="module")
def ready(small_bundle_fp16, tmp_path_factory):
    """A bundle with graphs in 8 bits; do not change it."""
    folder = shutil.copytree(small_bundle_fp16, tmp_path_factory.mktemp("int8") / "engines")
    quantized(folder)
    return folder


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request):
    if request.param == "openvino":
        pytest.importorskip("openvino", reason="needs the extra openvino")
    return request.param


def test_a_level_is_the_nearest_one_and_zero_is_exact():
    seen = Range(minimum=-1.0, maximum=4.1)

    assert seen.scale == pytest.approx(5.1 / 255)
    assert seen.zero_point == 50
    assert Range(minimum=0.0, maximum=0.0).scale > 0
    assert seen.joined(Range(minimum=0.0, maximum=9.0)) == Range(minimum=-1.0, maximum=9.0)


def test_ranges_are_those_of_what_goes_into_every_layer(small_bundle_fp32):
    """Against the tensors themselves, which ONNX's reference implementation hands out."""
    graph, _, inputs, expected = unet_of(small_bundle_fp32)
    layers = layers_of(graph)
    model = onnx.load(graph)
    names = list(dict.fromkeys(layer.activation for layer in layers))
    known = {each.name for each in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=each) for each in names if each not in known)
    tensors = dict(
        zip(
            [each.name for each in model.graph.output],
            onnx.reference.ReferenceEvaluator(model).run(None, inputs),
            strict=True,
        )
    )

    found = run_in_onnx(graph, with_ranges(graph, layers), inputs)

    assert relative_l2(found["prediction"], expected) < 1e-4
    for layer in layers:
        smallest, largest = (float(found[each]) for each in range_outputs(layer.activation))
        tensor = tensors.get(layer.activation, inputs.get(layer.activation))
        assert (smallest, largest) == (tensor.min(), tensor.max())


def test_layers_are_the_convolutions_and_matrices_of_the_network(small_bundle_fp32):
    graph, _, _, _ = unet_of(small_bundle_fp32)
    model = onnx.load(graph, load_external_data=False)
    external = {each.name for each in model.graph.initializer if each.external_data}
    wanted = {
        Layer(weight=node.input[1], activation=node.input[0], operator=node.op_type)
        for node in model.graph.node
        if node.op_type in ("Conv", "MatMul") and node.input[1] in external
    }

    assert set(layers_of(graph)) == wanted
    assert {each.operator for each in wanted} == {"Conv", "MatMul"}


def test_the_error_of_a_layer_is_that_of_8_bits_in_it_alone(small_bundle_fp32):
    graph, weights, inputs, expected = unet_of(small_bundle_fp32)
    layers = layers_of(graph)
    seen = run_in_onnx(graph, with_ranges(graph, layers), inputs)
    ranges = {
        layer: Range(
            minimum=min(0.0, float(seen[smallest])), maximum=max(0.0, float(seen[largest]))
        )
        for layer in layers
        for smallest, largest in [range_outputs(layer.activation)]
    }
    coarse = layers[3]
    wide = {**ranges, coarse: Range(minimum=-1e3, maximum=1e3)}

    found = run_in_onnx(graph, with_errors(graph, weights, ranges), inputs)
    worse = run_in_onnx(graph, with_errors(graph, weights, wide), inputs)

    assert relative_l2(found["prediction"], expected) < 1e-4  # the network itself is as it was
    errors = {
        layer: float(found[error] / found[power])
        for layer in layers
        for error, power in [error_outputs(layer)]
    }
    assert all(0 < error < 0.01 for error in errors.values())
    error, power = error_outputs(coarse)
    assert worse[error] / worse[power] > 100 * errors[coarse]
    alone = run_in_onnx(graph, quantized_graph(graph, weights, {coarse: ranges[coarse]}), inputs)
    assert 0 < relative_l2(alone["prediction"], expected) < 0.1


def test_a_bundle_says_what_8_bits_cost_its_images(ready):
    manifest = load_manifest(ready)
    record = manifest.quantization

    assert record.layers == len(layers_of(unet_of(ready)[0]))
    assert (record.kept, record.backend, record.least_psnr) == ((), "onnxruntime", 20.0)
    assert record.calls == SAMPLES.measured * SAMPLES.steps
    goldens = [json.loads((ready / each / "request.json").read_bytes()) for each in manifest.golden]
    images = sum(each["num_images"] for each in goldens)
    assert len(record.psnr) == images + SAMPLES.compared
    assert min(record.psnr) >= 20
    for file in manifest.files:
        check_file(ready, file)


def test_verification_compares_8_bits_with_torch(ready, backend):
    checks = list(verify(ready, backend=backend, precision="int8", threads=1))

    images = [check for check in checks if check.measure == "psnr"]
    assert {check.bound for check in images} == {20.0 - QUANTIZED_MARGIN}
    assert all(check.passed for check in checks)
    assert all(20 < check.value < 90 for check in images)  # nearly, but not quite


def test_a_generator_computes_in_8_bits_if_it_is_told_to(ready, backend):
    exact = pixels_of(ready, backend=backend, precision="fp32")
    rounded = pixels_of(ready, backend=backend, precision="int8")

    assert 20 < psnr(rounded, exact) < 90
    assert np.array_equal(rounded, pixels_of(ready, backend=backend, precision="int8"))
    with Generator(ready, backend=backend, precision="int8") as generator:
        assert generator.precision == "int8"


def test_levels_too_near_to_each_other_are_noticed(bundle, monkeypatch):
    before = contents(bundle)
    right = Range.scale.fget
    monkeypatch.setattr(Range, "scale", property(lambda self: right(self) / 8))
    monkeypatch.setattr(Range, "zero_point", 128)

    with pytest.raises(BundleError, match=r"even with \d+ of \d+ layers in higher precision"):
        quantized(bundle)

    assert contents(bundle) == before


def test_layers_are_left_out_until_images_are_as_wanted(bundle, ready):
    everything = load_manifest(ready).quantization
    wanted = round(min(everything.psnr) + 1.0, 1)

    record = quantized(bundle, least_psnr=wanted).quantization

    assert min(record.psnr) >= wanted
    assert record.layers + len(record.kept) == everything.layers
    assert 0 < len(record.kept) <= everything.layers / 2
    names = {layer.weight for layer in layers_of(unet_of(bundle)[0])}
    assert set(record.kept) < names
    component = load_manifest(bundle).component("unet")
    (file,) = (each.file for each in component.graphs if each.variant == "int8")
    nodes = onnx.load(bundle / file, load_external_data=False).graph.node
    rounded = {node.input[1] for node in nodes if node.op_type in ("Conv", "MatMul")}
    assert not {f"{name}.dequantized" for name in record.kept} & rounded


def test_what_images_do_not_allow_leaves_the_bundle_as_it_was(bundle):
    before = contents(bundle)

    with pytest.raises(BundleError, match=r"less than 99 dB; ask for less"):
        quantized(bundle, least_psnr=99.0)

    assert contents(bundle) == before


def test_graphs_are_replaced_but_never_named_before_they_are_there(bundle, monkeypatch):
    quantized(bundle)
    first = load_manifest(bundle)
    write_file = quantize.write_file

    def interrupted(path, data):
        if path.name == GRAPH_FILE:
            raise KeyboardInterrupt
        write_file(path, data)

    monkeypatch.setattr(quantize, "write_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantized(bundle, samples=replace(SAMPLES, measured=1))

    between = load_manifest(bundle)
    assert between.quantization is None
    assert all(check.passed for check in verify(bundle, backend="onnxruntime", threads=1))
    monkeypatch.undo()
    again = quantized(bundle, samples=replace(SAMPLES, measured=1))
    assert again == load_manifest(bundle)
    assert again.quantization.calls < first.quantization.calls
    assert [each.path for each in again.files] == [each.path for each in first.files]


def test_a_bundle_that_another_process_changes_is_left_alone(bundle):
    refusal = pytest.raises(BundleError, match=r"another process is changing .*; wait for it")
    with locked_folder(bundle, AssertionError()), refusal:
        quantized(bundle)


@pytest.mark.parametrize("adapters", ["adapters", "live_adapters"])
def test_adapters_need_another_precision(ready, tmp_path, backend, adapters):
    path = write_lora(tmp_path / "style.safetensors", 0)
    given = {path: 1.0} if adapters == "adapters" else {"style": path}

    with pytest.raises(BackendError, match="take no adapters; use another precision"):
        Generator(ready, backend=backend, precision="int8", **{adapters: given})


def test_a_bundle_without_graphs_in_8_bits_says_how_to_make_them(small_bundle_fp16, backend):
    with pytest.raises(BackendError, match="no graphs in 8 bits; make them with `ldm quantize`"):
        Generator(small_bundle_fp16, backend=backend, precision="int8")


def test_prompts_that_the_model_is_to_get_are_those_of_the_measured_images(bundle, monkeypatch):
    seen = []
    open_passes = quantize.open_passes
    monkeypatch.setattr(
        quantize, "open_passes", lambda *args: seen.append(args[2]) or open_passes(*args)
    )

    quantized(bundle, samples=replace(SAMPLES, prompts=("one", "two")))

    assert [each.as_request().prompt for each in seen[:3]] == ["one", "two", "one"]


def test_the_command_adds_graphs_and_says_what_they_cost(bundle, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n\na blue square\n")
    flags = ["--images", "1", "--compared", "1", "--steps", "2", "--min-psnr", "15", "-b", "cpu"]

    assert main(["quantize", str(bundle), "--prompts", str(prompts), *flags]) == 0
    told = capsys.readouterr()
    assert main(["quantize", str(bundle), *flags, "--json", "--quiet"]) == 0
    record = json.loads(capsys.readouterr().out)

    assert "layers in 8 bits; " in told.out
    assert "fp32" in told.err
    assert (record["bundle"], record["calls"]) == (str(bundle), 2)
    assert main(["inspect", str(bundle)]) == 0
    assert f"{record['layers']} layers of the UNet" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("data", "said"),
    [(b"\n \n", "has no prompt"), (b"\xff\xfe", "UTF-16"), (b"red \xe9", "not UTF-8 at byte 4")],
)
def test_a_file_of_no_prompts_is_one_sentence(ready, tmp_path, capsys, data, said):
    path = tmp_path / "prompts.txt"
    path.write_bytes(data)

    assert main(["quantize", str(ready), "--prompts", str(path)]) == 2
    assert said in capsys.readouterr().err


def test_prompts_come_from_standard_input_without_a_byte_order_mark(monkeypatch):
    data = "\ufeffa red circle\n\n a blue square \n".encode()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))

    assert _prompts("-") == ("a red circle", "a blue square")


def test_prompts_without_an_image_are_said(bundle, caplog):
    quantized(bundle, samples=replace(SAMPLES, prompts=("one", "two", "three", "four")))

    assert "4 prompts are for 3 images, so that the last ones are not used" in caplog.text


@pytest.mark.parametrize("counts", [{"measured": 0}, {"compared": -1}])
def test_there_must_be_images(ready, counts):
    with pytest.raises(ValueError, match=r"(measured|compared) must be at least 1 and whole"):
        quantized(ready, samples=replace(SAMPLES, **counts))


@pytest.mark.parametrize("task", TASKS)
def test_samples_of_every_task_have_the_size_that_users_get(task):
    spec = tiny_spec(task)
    if not task_record(spec).samples:
        return
    large = replace(spec, defaults=replace(spec.defaults, height=48, width=48))
    goldens = [
        GoldenOutput(name="", request=resolve(each, spec), latents=None, images=[])
        for each in tiny_requests(task)
    ]

    samples = make_samples(goldens, large, SampleOptions(measured=1, compared=1))

    for each in (*samples.measured, *samples.compared):
        given = task in GIVEN_SIZES
        assert ((each.height, each.width) == (48, 48)) is not given


def test_prompts_for_a_model_that_takes_none_are_refused():
    with pytest.raises(RequestError, match="'class-to-image' has none; leave them out"):
        make_samples([], tiny_spec("class-to-image"), SampleOptions(prompts=("red",)))


@pytest.mark.parametrize("value", ["nan", "inf", "-1", "high"])
def test_a_price_that_is_none_is_bad_usage(ready, capsys, value):
    with pytest.raises(SystemExit, match="2"):
        main(["quantize", str(ready), f"--min-psnr={value}"])

    assert f"must be a number of decibels from 0 on, got {value!r}" in capsys.readouterr().err


def test_the_inputs_of_a_few_calls_are_kept_evenly_spread():
    class Engine:
        def run(self, inputs):
            return {"prediction": inputs["latents"]}

    recorder = RangeRecorder(Engine(), ["prediction"], [])
    for number in range(1000):
        recorder.run({"latents": np.array([number])})

    kept = [int(each["latents"][0]) for each in recorder.inputs]
    assert recorder.calls == 1000
    assert 5 <= len(kept) < 10
    assert kept[0] == 0
    assert len(set(np.diff(kept))) == 1
    assert kept[-1] >= 800


def test_what_a_killed_quantisation_left_is_no_obstacle(bundle):
    """Neither to an export, which would lose nothing, nor to the next one, which removes it."""
    left = [bundle / "unet" / name for name in (CANDIDATE_FILE, ".model.int8.onnx.0123abcd.part")]
    for path in left:
        path.write_bytes(b"half")

    check_destination(bundle)
    quantized(bundle)

    assert not [path for path in left if path.exists()]
    assert {path.relative_to(bundle).as_posix() for path in contents(bundle)} == {
        MANIFEST_NAME,
        *(each.path for each in load_manifest(bundle).files),
    }


def test_a_link_in_the_place_of_a_graph_leads_to_nothing_that_is_written(bundle, tmp_path):
    other = tmp_path / "precious"
    other.write_text("data")
    for name in (GRAPH_FILE, CANDIDATE_FILE):
        (bundle / "unet" / name).symlink_to(other)

    quantized(bundle)

    assert other.read_text() == "data"
    assert not (bundle / "unet" / GRAPH_FILE).is_symlink()


@pytest.mark.parametrize("damage", ["gone", "other"])
def test_a_damaged_graph_in_8_bits_is_made_anew(bundle, damage):
    quantized(bundle)
    (file,) = (each.file for each in load_manifest(bundle).component("unet").graphs[-1:])
    if damage == "gone":
        (bundle / file).unlink()
    else:
        (bundle / file).write_bytes(b"other")

    quantized(bundle)

    assert all(check.passed for check in verify(bundle, backend="onnxruntime", threads=1))


def test_an_export_over_a_bundle_in_8_bits_says_that_they_go(
    ready, small_checkpoint_path, kept_traces, tmp_path, caplog
):
    folder = shutil.copytree(ready, tmp_path / "engines")
    overrides = Overrides(height=SIZE, width=SIZE)

    manifest = export(small_checkpoint_path, folder, engines=NO_ENGINES, overrides=overrides)

    assert manifest.quantization is None
    assert not [graph for each in manifest.components for graph in each.graphs if "8" in graph.file]
    assert not list(folder.rglob("*int8*"))
    assert "graphs in 8 bits; `ldm quantize" in caplog.text


def test_graphs_in_8_bits_do_not_let_a_gpu_compute_in_fp16_what_it_cannot(ready):
    """One file for fp32 and fp16 is that of a network that fp16 cannot hold."""
    component = load_manifest(ready).component("unet")
    (whole,) = (each for each in component.graphs if each.variant == "fp32")
    graphs = (whole, replace(whole, variant="fp16"), *component.graphs[-1:])

    assert provider_for(component) is PROVIDER
    found = provider_for(replace(component, graphs=graphs))
    assert found.options["trt_fp16_enable"] == "0"


def test_a_description_has_every_compared_image(ready, capsys, tmp_path):
    folder = shutil.copytree(ready, tmp_path / "engines")
    manifest = load_manifest(folder)
    psnr = tuple(30.0 + each for each in range(40))
    many = replace(manifest, quantization=replace(manifest.quantization, psnr=psnr))
    (folder / MANIFEST_NAME).write_bytes(encode_manifest(many))

    assert main(["inspect", str(folder)]) == 0
    assert "images have 30.0 dB or more to fp32" in capsys.readouterr().out
    assert main(["inspect", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["quantization"]["psnr"] == list(psnr)


@pytest.mark.parametrize("wrong", ["no record", "no graph", "no image"])
def test_a_manifest_whose_record_of_8_bits_is_not_that_of_its_graphs_is_refused(
    ready, tmp_path, wrong
):
    folder = shutil.copytree(ready, tmp_path / "engines")
    manifest = load_manifest(folder)
    record = manifest.quantization
    changed = {
        "no record": replace(manifest, quantization=None),
        "no graph": replace(without_int8(manifest), quantization=record),
        "no image": replace(manifest, quantization=replace(record, psnr=())),
    }[wrong]
    (folder / MANIFEST_NAME).write_bytes(encode_manifest(changed))

    with pytest.raises(ManifestError, match="quantization cannot be what it is"):
        load_manifest(folder)


def test_weights_in_8_bits_are_a_byte_each(ready, small_bundle_fp16):
    size = load_manifest(ready).weights_bytes("unet")

    assert load_manifest(ready).compiled_bytes("unet", "int8") == size // 2
    assert load_manifest(ready).compiled_bytes("unet", "bf16") == size
    for name, bundle in (("vae_decoder", ready), ("unet", small_bundle_fp16)):
        manifest = load_manifest(bundle)
        assert manifest.compiled_bytes(name, "int8") == manifest.weights_bytes(name)
    wide = replace(load_manifest(ready), weights_dtype="float32")
    assert wide.compiled_bytes("unet", "int8") == size // 4


def test_more_steps_than_the_schedule_has_are_refused(ready):
    with pytest.raises(RequestError, match="num_inference_steps"):
        quantized(ready, samples=replace(SAMPLES, steps=100_000))
