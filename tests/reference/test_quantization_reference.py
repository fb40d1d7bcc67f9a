"""Graphs in 8 bits, next to those that ONNX Runtime's own quantisation makes of the same inputs."""

import shutil

import numpy as np
import onnx
import onnxruntime
import pytest

from ldm_runtime.bundle.manifest import load_manifest
from ldm_runtime.bundle.quantized_graphs import (
    Range,
    layers_of,
    quantized_graph,
    range_outputs,
    with_ranges,
)
from ldm_runtime.diagnostics.measures import relative_l2

quantization = pytest.importorskip("onnxruntime.quantization")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class _Inputs(quantization.CalibrationDataReader):
    def __init__(self, all_inputs):
        self._left = iter(all_inputs)

    def get_next(self):
        return next(self._left, None)


def run(graph, inputs):
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def constants(graph):
    model = onnx.load(graph)
    return {each.name: onnx.numpy_helper.to_array(each) for each in model.graph.initializer}


@pytest.fixture(scope="module")
def unet(small_bundle_fp32):
    """Graph, weights, and inputs of the UNet: golden ones and the same backwards."""
    component = load_manifest(small_bundle_fp32).component("unet")
    (file,) = (each.file for each in component.graphs if each.variant == "fp32")
    with np.load(small_bundle_fp32 / "golden/components/unet.npz") as arrays:
        golden = {name[3:]: arrays[name] for name in arrays if name.startswith("in.")}
    turned = {name: np.ascontiguousarray(each[::-1]) for name, each in golden.items()}
    turned["latents"] = turned["latents"] * np.float32(1.7)
    return small_bundle_fp32 / file, small_bundle_fp32 / component.weights_file, [golden, turned]


@pytest.fixture(scope="module")
def ours(unet, tmp_path_factory):
    """Our graph and its layers with their ranges, over a copy of the weights."""
    graph, weights, all_inputs = unet
    folder = tmp_path_factory.mktemp("ours")
    shutil.copy(weights, folder)
    layers, ranges = layers_of(graph), {}
    measuring = folder / "ranges.onnx"
    measuring.write_bytes(with_ranges(graph, layers))
    for inputs in all_inputs:
        found = run(measuring, inputs)
        for layer in layers:
            smallest, largest = (float(found[each]) for each in range_outputs(layer.activation))
            seen = Range(minimum=min(0.0, smallest), maximum=max(0.0, largest))
            ranges[layer] = seen.joined(ranges.get(layer, seen))
    path = folder / "int8.onnx"
    path.write_bytes(quantized_graph(graph, weights, ranges))
    return path, ranges


@pytest.fixture(scope="module")
def theirs(unet, ours, tmp_path_factory):
    """The same layers quantised by ONNX Runtime, in the formats that ours have."""
    graph, _, all_inputs = unet
    weights = {layer.weight for layer in ours[1]}
    nodes = onnx.load(graph, load_external_data=False).graph.node
    path = tmp_path_factory.mktemp("theirs") / "int8.onnx"
    quantization.quantize_static(
        graph,
        path,
        _Inputs(all_inputs),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
        nodes_to_quantize=[each.name for each in nodes if set(each.input) & weights],
        extra_options={"QuantizeBias": False, "DisableShapeInference": True},
    )
    return path


def test_scales_and_zero_points_are_those_of_onnx_runtime(ours, theirs):
    path, ranges = ours
    mine, reference = constants(path), constants(theirs)

    compared = 0
    for layer in ranges:
        scales = reference[f"{layer.weight}_scale"]
        np.testing.assert_allclose(mine[f"{layer.weight}.scale"], scales, rtol=1e-5)
        np.testing.assert_allclose(
            mine[f"{layer.activation}.scale"], reference[f"{layer.activation}_scale"], rtol=1e-3
        )
        zero_points = (
            mine[f"{layer.activation}.zero_point"],
            reference[f"{layer.activation}_zero_point"],
        )
        assert abs(int(zero_points[0]) - int(zero_points[1])) <= 1
        compared += 1
    assert compared > 20


def test_the_network_in_8_bits_is_as_near_to_fp32_as_onnx_runtime_s(unet, ours, theirs):
    graph, _, all_inputs = unet
    for inputs in all_inputs:
        exact = run(graph, inputs)["prediction"]
        mine, reference = (run(each, inputs)["prediction"] for each in (ours[0], theirs))

        assert 1e-4 < relative_l2(mine, exact) < 1.1 * relative_l2(reference, exact)
