import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes.common import ShapeInferencePass

from ldm_export.graphs.passes import (
    AssignPrecision,
    LayOutWeights,
    ShareConstants,
    name_dynamic_axes,
)
from ldm_export.graphs.weights_file import store_weights

HEAD = '<ir_version: 10, opset_import: ["" : 20]>\n'
CHAIN = """unet (float[2] x) => (float[2] y)
{
    a = Relu(x)
    b = Sqrt(a)
    y = Relu(b)
}
"""
SHARED = """unet (float[2] x) => (float[2] y)
{
    a = Exp(x)
    b = Relu(x)
    c = Relu(x)
    d = Add(b, c)
    y = Sub(a, d)
}
"""


def model(text):
    """A graph from text, every value with its type, as the exporter hands it over."""
    return ShapeInferencePass()(ir.from_onnx_text(HEAD + text)).model


def computing(half=(), default=ir.DataType.FLOAT):
    """A plan: operators named in `half` compute in fp16."""
    return lambda node: ir.DataType.FLOAT16 if node.op_type in half else default


def ops(graph_model):
    return [node.op_type for node in graph_model.graph]


def typed(graph_model):
    """Operator and element type of the first input, in order."""
    return [(node.op_type, node.inputs[0].dtype.name) for node in graph_model.graph]


def add_constant(graph_model, name, array):
    """Let the initializer `name` be `array`, for every node that reads it."""
    value = next(
        each for node in graph_model.graph for each in node.inputs if each and each.name == name
    )
    value.const_value = ir.tensor(array, name=name)
    value.dtype = value.const_value.dtype
    value.shape = ir.Shape(array.shape)
    graph_model.graph.inputs.remove(value)
    graph_model.graph.register_initializer(value)
    return graph_model


def test_casts_stand_exactly_where_two_precisions_meet():
    graph = model(CHAIN)

    AssignPrecision(computing(half={"Sqrt"}))(graph)

    assert typed(graph) == [
        ("Relu", "FLOAT"),
        ("Cast", "FLOAT"),
        ("Sqrt", "FLOAT16"),
        ("Cast", "FLOAT16"),
        ("Relu", "FLOAT"),
    ]


def test_a_graph_of_one_precision_needs_no_cast():
    graph = model(CHAIN)

    AssignPrecision(computing())(graph)

    assert ops(graph) == ["Relu", "Sqrt", "Relu"]


def test_a_value_that_is_used_twice_is_cast_once():
    graph = model(SHARED)

    AssignPrecision(computing(half={"Relu", "Add"}))(graph)

    casts = [node.inputs[0].name for node in graph.graph if node.op_type == "Cast"]
    assert casts == ["x", "d"]


def test_inputs_and_outputs_stay_float32_and_keep_their_names():
    graph = model(CHAIN)

    AssignPrecision(computing(default=ir.DataType.FLOAT16))(graph)

    assert [(each.name, each.dtype.name) for each in graph.graph.inputs] == [("x", "FLOAT")]
    assert [(each.name, each.dtype.name) for each in graph.graph.outputs] == [("y", "FLOAT")]
    assert ops(graph) == ["Cast", "Relu", "Sqrt", "Relu", "Cast"]


def test_an_output_that_is_also_used_inside_is_cast_only_for_the_outside():
    graph = model(
        "unet (float[2] x) => (float[2] y, float[2] z)\n{\n    y = Relu(x)\n    z = Sqrt(y)\n}\n"
    )

    AssignPrecision(computing(default=ir.DataType.FLOAT16))(graph)

    assert [each.name for each in graph.graph.outputs] == ["y", "z"]
    assert typed(graph)[1:3] == [("Relu", "FLOAT16"), ("Sqrt", "FLOAT16")]


def test_what_an_operator_prescribes_is_float32_in_every_precision():
    text = """unet (float[1, 1, 2, 2] x, float[4] factors) => (float[1, 1, 4, 4] y)
{
    scales = Relu(factors)
    y = Resize<mode = "nearest">(x, , scales)
}
"""
    graph = model(text)

    AssignPrecision(computing(default=ir.DataType.FLOAT16))(graph)

    (resize,) = (node for node in graph.graph if node.op_type == "Resize")
    assert resize.inputs[0].dtype == ir.DataType.FLOAT16
    assert resize.inputs[2].dtype == ir.DataType.FLOAT


def test_prescribed_constants_stay_as_they_are():
    text = """unet (float[1, 1, 2, 2] x, float[4] scales) => (float[1, 1, 4, 4] y)
{
    y = Resize<mode = "nearest">(x, , scales)
}
"""
    graph = add_constant(model(text), "scales", np.array([1, 1, 2, 2], np.float32))

    AssignPrecision(computing(default=ir.DataType.FLOAT16))(graph)

    assert list(graph.graph.initializers) == ["scales"]


def test_what_a_cast_of_integers_gives_keeps_its_type():
    text = "unet (int64[2] x) => (float[2] y)\n{\n    a = Cast<to = 1>(x)\n    y = Relu(a)\n}\n"
    graph = model(text)

    AssignPrecision(computing(default=ir.DataType.FLOAT16))(graph)

    assert graph.graph[0].outputs[0].dtype == ir.DataType.FLOAT


@pytest.mark.parametrize("to", [ir.DataType.INT64, ir.DataType.BOOL])
def test_a_cast_of_floats_to_something_else_reads_them_unrounded(to):
    kind = to.name.lower()
    text = f"unet (float[2] x) => ({kind}[2] y)\n{{\n    y = Cast<to = {int(to)}>(x)\n}}\n"
    graph = model(text)

    AssignPrecision(computing(default=ir.DataType.FLOAT16))(graph)

    assert typed(graph) == [("Cast", "FLOAT")]


def test_nodes_over_integers_are_left_alone():
    text = "unet (int64[2] x) => (int64[2] y)\n{\n    a = Add(x, x)\n    y = Mul(a, x)\n}\n"
    graph = model(text)

    AssignPrecision(computing(default=ir.DataType.FLOAT16))(graph)

    assert typed(graph) == [("Add", "INT64"), ("Mul", "INT64")]


def test_inline_constants_are_converted_without_a_cast():
    text = "unet (float[2] x, float[2] k) => (float[2] y)\n{\n    y = Mul(x, k)\n}\n"
    graph = add_constant(model(text), "k", np.array([1.5, 2.5], np.float32))

    AssignPrecision(computing(default=ir.DataType.FLOAT16))(graph)

    (mul,) = (node for node in graph.graph if node.op_type == "Mul")
    constant = mul.inputs[1].const_value.numpy()
    assert constant.dtype == np.float16
    np.testing.assert_array_equal(constant, [1.5, 2.5])


@pytest.mark.filterwarnings("error")
def test_finite_constants_stay_finite_and_infinite_ones_infinite():
    text = "unet (float[4] x, float[4] k) => (float[4] y)\n{\n    y = Add(x, k)\n}\n"
    values = np.array([-3.4e38, 1e30, -np.inf, 1e-30], np.float32)
    graph = add_constant(model(text), "k", values)

    AssignPrecision(computing(default=ir.DataType.FLOAT16))(graph)

    (add,) = (node for node in graph.graph if node.op_type == "Add")
    assert add.inputs[1].const_value.numpy().tolist() == [-65504, 65504, -np.inf, 0]


@pytest.mark.parametrize(
    ("stored", "computed", "casts"),
    [
        ("float16", ir.DataType.FLOAT16, []),
        ("float16", ir.DataType.FLOAT, ["w"]),
        ("float32", ir.DataType.FLOAT, []),
        ("float32", ir.DataType.FLOAT16, ["w"]),
    ],
)
def test_stored_weights_are_cast_where_they_are_used(tmp_path, stored, computed, casts):
    text = "unet (float[99] x, float[99] w) => (float[99] y)\n{\n    y = Mul(x, w)\n}\n"
    graph = add_constant(model(text), "w", np.ones(99, np.float32))
    store_weights(graph, tmp_path / "weights.bin", stored, {"w"})

    AssignPrecision(computing(default=computed))(graph)

    found = [node.inputs[0].name for node in graph.graph if node.op_type == "Cast"]
    assert [name for name in found if name == "w"] == casts
    assert isinstance(graph.graph.initializers["w"].const_value, ir.ExternalTensor)


def test_dynamic_axes_are_named_and_fixed_ones_keep_their_length():
    graph = model("unet (float[s1, 4, s2] x) => (float[s1, 4, s2] y)\n{\n    y = Relu(x)\n}\n")

    name_dynamic_axes(graph, {name: ("batch", "channels", "height") for name in "xy"})

    for value in (*graph.graph.inputs, *graph.graph.outputs):
        assert [str(dim) for dim in value.shape] == ["batch", "4", "height"]


def test_a_transposed_weight_is_stored_transposed_under_its_own_name():
    text = """unet (float[1, 3] x, float[2, 3] w) => (float[1, 2] y)
{
    t = Transpose<perm = [1, 0]>(w)
    y = MatMul(x, t)
}
"""
    weight = np.arange(6, dtype=np.float32).reshape(2, 3)
    graph = add_constant(model(text), "w", weight)

    LayOutWeights({"w"})(graph)

    assert ops(graph) == ["MatMul"]
    stored = graph.graph.initializers["w"]
    np.testing.assert_array_equal(stored.const_value.numpy(), weight.T)
    assert list(stored.shape) == [3, 2]
    assert np.shares_memory(stored.const_value.numpy(), weight)


def test_a_weight_with_added_axes_is_stored_with_them():
    text = """unet (float[1, 2, 5, 5] x, float[2] w, int64[2] axes) => (float[1, 2, 5, 5] y)
{
    u = Unsqueeze(w, axes)
    y = Mul(x, u)
}
"""
    graph = add_constant(model(text), "w", np.ones(2, np.float32))
    graph = add_constant(graph, "axes", np.array([1, 2]))

    LayOutWeights({"w"})(graph)

    assert ops(graph) == ["Mul"]
    assert list(graph.graph.initializers["w"].shape) == [2, 1, 1]


@pytest.mark.parametrize("other", ["Relu(w)", "Transpose<perm = [0, 1]>(w)"])
def test_a_weight_that_is_used_in_two_layouts_keeps_its_own(other):
    text = f"""unet (float[2, 2] x, float[2, 2] w) => (float[2, 2] y)
{{
    t = Transpose<perm = [1, 0]>(w)
    o = {other}
    p = MatMul(x, t)
    y = MatMul(p, o)
}}
"""
    graph = add_constant(model(text), "w", np.ones((2, 2), np.float32))

    result = LayOutWeights({"w"})(graph)

    assert not result.modified
    assert ops(graph).count("Transpose") >= 1


def test_only_weights_are_laid_out():
    text = """unet (float[1, 3] x, float[2, 3] w) => (float[1, 2] y)
{
    t = Transpose<perm = [1, 0]>(w)
    y = MatMul(x, t)
}
"""
    graph = add_constant(model(text), "w", np.ones((2, 3), np.float32))

    LayOutWeights(set())(graph)

    assert ops(graph) == ["Transpose", "MatMul"]


@pytest.mark.parametrize(("weights", "left"), [((), ["j"]), (("j", "k"), ["j", "k"])])
def test_equal_constants_become_one_but_equal_weights_stay_two(weights, left):
    text = """unet (float[2] x, float[2] j, float[2] k) => (float[2] y)
{
    a = Mul(x, j)
    y = Add(a, k)
}
"""
    graph = model(text)
    for name in "jk":
        add_constant(graph, name, np.ones(2, np.float32))

    ShareConstants(weights)(graph)

    assert list(graph.graph.initializers) == left


def test_constants_of_another_type_or_shape_are_not_equal():
    text = """unet (float[2] x, float[1] j, int32[1] k) => (float[2] y)
{
    a = Mul(x, j)
    b = Cast<to = 1>(k)
    y = Add(a, b)
}
"""
    graph = add_constant(model(text), "j", np.zeros(1, np.float32))
    add_constant(graph, "k", np.zeros(1, np.int32))

    result = ShareConstants(())(graph)

    assert not result.modified
