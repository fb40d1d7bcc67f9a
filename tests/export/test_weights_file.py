import numpy as np
import onnx
import onnx_ir as ir
import pytest

from ldm_export.graphs.weights_file import ALIGNMENT, INLINE_BYTES, store_weights

LARGE = np.linspace(-2, 2, 1500, dtype=np.float32)
SECOND = np.arange(300, dtype=np.float32)
SMALL = np.ones(INLINE_BYTES // 4, np.float32)
CONSTANT = np.linspace(0, 1, 200, dtype=np.float32)
ARRAYS = {"layer.weight": LARGE, "layer.bias": SMALL, "out.weight": SECOND, "val_3": CONSTANT}
WEIGHTS = {"layer.weight", "layer.bias", "out.weight"}


def model():
    """A graph without nodes: only initializers."""
    values = [
        ir.Value(
            name=name,
            shape=ir.Shape(array.shape),
            type=ir.TensorType(ir.DataType.FLOAT),
            const_value=ir.tensor(array, name=name),
        )
        for name, array in ARRAYS.items()
    ]
    graph = ir.Graph([], [], nodes=[], initializers=values, opset_imports={"": 20}, name="unet")
    return ir.Model(graph, ir_version=10)


def external(graph_model):
    return {
        name: value.const_value
        for name, value in graph_model.graph.initializers.items()
        if isinstance(value.const_value, ir.ExternalTensor)
    }


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_stored_weights_come_back_as_they_were_rounded(tmp_path, dtype):
    graph_model = model()

    store_weights(graph_model, tmp_path / "weights.bin", dtype, WEIGHTS)

    for name, tensor in external(graph_model).items():
        assert tensor.numpy().dtype == dtype
        np.testing.assert_array_equal(tensor.numpy(), ARRAYS[name].astype(dtype))


def test_large_weights_go_to_the_file_under_their_parameter_names(tmp_path):
    graph_model = model()

    store_weights(graph_model, tmp_path / "weights.bin", "float16", WEIGHTS)

    assert set(external(graph_model)) == {"layer.weight", "out.weight"}


def test_small_weights_and_constants_stay_in_the_graph_unrounded(tmp_path):
    graph_model = model()

    store_weights(graph_model, tmp_path / "weights.bin", "float16", WEIGHTS)

    for name in ("layer.bias", "val_3"):
        array = graph_model.graph.initializers[name].const_value.numpy()
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, ARRAYS[name])


def test_every_tensor_begins_at_a_multiple_of_the_alignment(tmp_path):
    graph_model = model()

    store_weights(graph_model, tmp_path / "weights.bin", "float16", WEIGHTS)

    offsets = [tensor.offset for tensor in external(graph_model).values()]
    assert offsets == [0, ALIGNMENT]
    assert ALIGNMENT == 4096


def test_a_saved_graph_refers_to_the_file_by_its_bare_name(tmp_path):
    graph_model = model()
    store_weights(graph_model, tmp_path / "weights.bin", "float32", WEIGHTS)

    ir.save(graph_model, tmp_path / "model.onnx")

    proto = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    locations = {
        entry.value
        for tensor in proto.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    assert locations == {"weights.bin"}


def test_a_transposed_view_is_stored_in_its_own_order(tmp_path):
    graph_model = model()
    matrix = np.arange(200, dtype=np.float32).reshape(10, 20).T
    value = graph_model.graph.initializers["layer.weight"]
    value.const_value, value.shape = ir.Tensor(matrix, name=value.name), ir.Shape(matrix.shape)

    store_weights(graph_model, tmp_path / "weights.bin", "float32", {"layer.weight"})

    np.testing.assert_array_equal(external(graph_model)["layer.weight"].numpy(), matrix)


def test_exact_weights_are_not_rounded(tmp_path):
    graph_model = model()

    store_weights(graph_model, tmp_path / "weights.bin", "float16", WEIGHTS, exact={"out.weight"})

    stored = external(graph_model)
    assert stored["out.weight"].dtype == ir.DataType.FLOAT
    np.testing.assert_array_equal(stored["out.weight"].numpy(), SECOND)
    assert stored["layer.weight"].dtype == ir.DataType.FLOAT16
