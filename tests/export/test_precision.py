from functools import partial

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator
from onnx_ir.passes.common import RemoveUnusedNodesPass, ShapeInferencePass

from ldm_export.graphs.passes import AssignPrecision
from ldm_export.graphs.precision import FP32_ISLANDS, NORMALISATIONS, all_fp32, fp16_with_islands

HEAD = '<ir_version: 10, opset_import: ["" : {opset}]>\n'
FREQUENCIES = np.exp(-np.log(10_000) * np.arange(16) / 16).astype(np.float32)

# Each begins and ends with an operator that computes in fp16, as inside a network.
NORMS = {
    "InstanceNormalization": "InstanceNormalization<epsilon = 1.0e-6>(a, scale, bias)",
    "GroupNormalization": "GroupNormalization<num_groups = 2, epsilon = 1.0e-6>(a, scale, bias)",
    "LayerNormalization": "LayerNormalization<epsilon = 1.0e-5>(a, scale, bias)",
    "BatchNormalization": "BatchNormalization(a, scale, bias, mean, variance)",
}
TIMESTEPS = """unet (float[1] timesteps, float[16] frequencies) => (float[16] features)
{
    angles = Mul(timesteps, frequencies)
    sines = Sin(angles)
    features = Neg(sines)
}
"""


CHOICE = """vae_decoder (float[1, 5] x, float[5] codes, float[5] values) => (float[1] y)
{
    a = Mul(x, codes)
    b = Sub(a, codes)
    index = ArgMax<axis = 1, keepdims = 0>(b)
    c = Gather(values, index)
    y = Neg(c)
}
"""
STREAM = """text_encoder (float[1, 4] x, float[4, 4] w, float[4] scale) => (float[1, 4] y)
{
    a = LayerNormalization(x, scale)
    b = MatMul(a, w)
    c = Gelu(b)
    d = MatMul(c, w)
    e = Add(d, scale)
    f = Add(x, e)
    g = LayerNormalization(f, scale)
    y = Neg(g)
}
"""


def all_fp16(graph):
    return lambda _: ir.DataType.FLOAT16


def planned(text, constants, plan):
    """A graph with its constants inside and a precision plan applied, as ONNX."""
    opset = 21 if "GroupNormalization" in text else 20  # where it took its present form
    model = ir.from_onnx_text(HEAD.format(opset=opset) + text)
    graph = model.graph
    for value in [each for each in graph.inputs if each.name in constants]:
        value.const_value = ir.tensor(constants[value.name], name=value.name)
        graph.inputs.remove(value)
        graph.register_initializer(value)
    model = ShapeInferencePass()(model).model
    AssignPrecision(plan(graph))(model)
    RemoveUnusedNodesPass()(model)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def in_onnxruntime(proto, inputs):
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, inputs)[0]


def as_typed(proto, inputs):
    """Compute in the types the graph says: ONNX Runtime's CPU kernels widen fp16 to fp32 inside."""
    with np.errstate(all="ignore"):
        return ReferenceEvaluator(proto).run(None, inputs)[0]


def norm_case(operator):
    """A normalisation of large activations: their squares are far beyond fp16's range."""
    shape = (1, 4, 64)
    parameters = (
        "float[64] scale, float[64] bias"
        if operator == "LayerNormalization"
        else ("float[4] scale, float[4] bias")
    )
    width = 64 if operator == "LayerNormalization" else 4
    constants = {"scale": np.ones(width, np.float32), "bias": np.zeros(width, np.float32)}
    if operator == "BatchNormalization":
        parameters += ", float[4] mean, float[4] variance"
        constants |= {"mean": np.zeros(4, np.float32), "variance": np.full(4, 9e6, np.float32)}
    text = f"unet (float[1, 4, 64] x, {parameters}) => (float[1, 4, 64] y)\n" + (
        f"{{\n    a = Neg(x)\n    b = {NORMS[operator]}\n    y = Neg(b)\n}}\n"
    )
    x = np.random.default_rng(0).normal(scale=3000, size=shape).astype(np.float32)
    return text, constants, {"x": x}


def error(actual, expected):
    if not np.isfinite(actual).all():
        return np.inf
    return np.abs(actual.astype(np.float64) - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("operator", sorted(NORMS))
@pytest.mark.parametrize("run", [in_onnxruntime, as_typed])
def test_large_activations_pass_through_every_normalisation(operator, run):
    text, constants, inputs = norm_case(operator)
    expected = as_typed(planned(text, constants, all_fp32), inputs)

    actual = run(planned(text, constants, fp16_with_islands), inputs)

    assert error(actual, expected) < 2e-3


@pytest.mark.parametrize("operator", ["InstanceNormalization", "LayerNormalization"])
def test_without_their_island_normalisations_fail(operator):
    text, constants, inputs = norm_case(operator)
    expected = as_typed(planned(text, constants, all_fp32), inputs)

    actual = as_typed(planned(text, constants, all_fp16), inputs)

    assert error(actual, expected) > 0.5


@pytest.mark.parametrize("timestep", [0.0, 17.25, 981.0, 998.6, 999.0])
@pytest.mark.parametrize("run", [in_onnxruntime, as_typed])
def test_features_of_every_timestep_are_those_of_fp32(timestep, run):
    inputs = {"timesteps": np.array([timestep], np.float32)}
    constants = {"frequencies": FREQUENCIES}
    expected = -np.sin(timestep * FREQUENCIES.astype(np.float64))

    actual = run(planned(TIMESTEPS, constants, fp16_with_islands), inputs)

    assert np.abs(actual - expected).max() < 1e-3


def test_without_their_island_features_of_late_timesteps_are_wrong():
    inputs = {"timesteps": np.array([998.6], np.float32)}
    expected = -np.sin(998.6 * FREQUENCIES.astype(np.float64))

    actual = as_typed(planned(TIMESTEPS, {"frequencies": FREQUENCIES}, all_fp16), inputs)

    assert np.abs(actual - expected).max() > 0.05


def test_everything_that_leads_to_a_sine_is_an_island_and_nothing_after_it():
    proto = planned(TIMESTEPS, {"frequencies": FREQUENCIES}, fp16_with_islands)

    types = {node.op_type: node for node in proto.graph.node}
    cast = types["Cast"]
    assert [node.op_type for node in proto.graph.node] == ["Mul", "Sin", "Cast", "Neg", "Cast"]
    assert cast.output[0] == "features"
    assert [each.data_type for each in proto.graph.initializer] == [onnx.TensorProto.FLOAT]


def floats(proto):
    """Outputs of nodes that compute in fp32, casts aside."""
    inferred = {each.name: each.type.tensor_type.elem_type for each in proto.graph.value_info}
    return {
        node.output[0]
        for node in proto.graph.node
        if node.op_type != "Cast" and inferred.get(node.output[0]) == onnx.TensorProto.FLOAT
    }


def test_what_is_compared_to_be_chosen_is_an_island_and_what_is_chosen_is_not():
    constants = {name: np.linspace(1, 2, 5, dtype=np.float32) for name in ("codes", "values")}

    proto = planned(CHOICE, constants, fp16_with_islands)

    assert floats(proto) == {"a", "b"}


def test_neighbours_that_fp16_cannot_tell_apart_are_still_told_apart():
    codes = (1000 + 0.1 * np.arange(5)).astype(np.float32)
    constants = {"codes": codes, "values": np.arange(5, dtype=np.float32)}
    inputs = {"x": np.full((1, 5), 2, np.float32)}

    chosen = {
        plan: as_typed(planned(CHOICE, constants, plan), inputs)
        for plan in (fp16_with_islands, all_fp16)
    }

    assert chosen[fp16_with_islands] == -4
    assert chosen[all_fp16] != -4


def test_a_gather_by_a_given_index_is_no_choice():
    text = CHOICE.replace("index = ArgMax<axis = 1, keepdims = 0>(b)", "index = Cast<to = 7>(b)")
    text = text.replace("float[1] y", "float[1, 5] y")
    constants = {name: np.linspace(1, 2, 5, dtype=np.float32) for name in ("codes", "values")}

    proto = planned(text, constants, fp16_with_islands)

    assert floats(proto) == set()


@pytest.mark.parametrize("residual_stream", [False, True])
def test_a_residual_stream_is_an_island_with_the_products_that_add_to_it_if_asked_for(
    residual_stream,
):
    constants = {"w": np.eye(4, dtype=np.float32), "scale": np.ones(4, np.float32)}

    proto = planned(STREAM, constants, partial(fp16_with_islands, residual_stream=residual_stream))

    normalised = {"a", "g"}
    assert floats(proto) == normalised | ({"d", "e", "f"} if residual_stream else set())


def test_the_plan_of_the_cpu_graph_is_fp32_everywhere():
    text, constants, _ = norm_case("InstanceNormalization")

    proto = planned(text, constants, all_fp32)

    assert "Cast" not in {node.op_type for node in proto.graph.node}


def test_the_manifest_is_told_every_island():
    others = {"timestep features", "codebook distances", "residual stream of BERT"}
    assert set(FP32_ISLANDS) == others | NORMALISATIONS
    assert set(NORMS) == NORMALISATIONS
