"""A graph may name one file, its weights: every name is found, however deep it lies."""

import numpy as np
import onnx
import onnxruntime
import pytest
from google.protobuf.message import DecodeError
from onnx import TensorProto, helper
from onnx.external_data_helper import _get_all_tensors

from ldm_runtime.bundle.graph_files import check_graph_files, external_files
from ldm_runtime.errors import BundleError


def external(name, location):
    """A tensor of two floats in a file."""
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[2])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("offset", "0"), ("location", location), ("length", "8")):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    return tensor


def graph_of(nodes, initializers=(), name="g"):
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])
    return helper.make_graph(list(nodes), name, [], [output], list(initializers))


def constant(location, output="y"):
    return helper.make_node("Constant", [], [output], value=external(output, location))


def model_of(graph, **more):
    opset = helper.make_opsetid("", 18)
    return helper.make_model(graph, opset_imports=[opset], ir_version=9, **more)


def in_a_branch(location):
    branches = {f"{each}_branch": graph_of([constant(location)]) for each in ("then", "else")}
    condition = helper.make_tensor("c", TensorProto.BOOL, [], [True])
    return model_of(graph_of([helper.make_node("If", ["c"], ["y"], **branches)], [condition]))


def in_a_function(location):
    opset = helper.make_opsetid("", 18)
    function = helper.make_function("own", "f", [], ["y"], [constant(location)], [opset])
    return model_of(
        graph_of([helper.make_node("f", [], ["y"], domain="own")]), functions=[function]
    )


def in_a_sparse_tensor(location):
    model = model_of(graph_of([]))
    indices = helper.make_tensor("i", TensorProto.INT64, [2], [0, 1])
    model.graph.sparse_initializer.add(values=external("v", location), indices=indices, dims=[9])
    return model


def in_a_list_of_tensors(location):
    node = helper.make_node("Constant", [], ["y"])
    attribute = node.attribute.add(name="many", type=onnx.AttributeProto.TENSORS)
    attribute.tensors.append(external("t", location))
    return model_of(graph_of([node]))


def in_training(location):
    model = model_of(graph_of([]))
    model.training_info.add().initialization.CopyFrom(graph_of([constant(location)]))
    return model


PLACES = {
    "an initializer": lambda location: model_of(graph_of([], [external("y", location)])),
    "a constant": lambda location: model_of(graph_of([constant(location)])),
    "a branch": in_a_branch,
    "a function": in_a_function,
    "a sparse tensor": in_a_sparse_tensor,
    "a list of tensors": in_a_list_of_tensors,
    "training": in_training,
}


@pytest.mark.parametrize("make", PLACES.values(), ids=PLACES)
def test_a_name_is_found_wherever_onnx_lets_it_lie(make):
    assert external_files(make("secret.bin").SerializeToString()) == {"secret.bin"}


def test_a_graph_without_tensors_in_files_names_none():
    inside = helper.make_tensor("y", TensorProto.FLOAT, [2], [1, 2])

    assert external_files(model_of(graph_of([], [inside])).SerializeToString()) == set()


@pytest.mark.parametrize(
    "location", ["secret.bin", "../secret.bin", "/etc/passwd", "", "weights.bin/../../x"]
)
def test_a_graph_that_names_another_file_than_its_weights_is_refused(tmp_path, location):
    (tmp_path / "unet").mkdir()
    weights = external("w", "weights.bin")
    model = model_of(graph_of([], [weights, external("y", location)]))
    (tmp_path / "unet/model.onnx").write_bytes(model.SerializeToString())

    with pytest.raises(BundleError, match=f"names the file '{location}', but the manifest says"):
        check_graph_files(tmp_path, "unet/model.onnx", "unet/weights.bin")


def test_a_graph_that_names_its_weights_alone_is_fine(tmp_path):
    (tmp_path / "unet").mkdir()
    model = model_of(graph_of([], [external("y", "weights.bin")]))
    (tmp_path / "unet/model.onnx").write_bytes(model.SerializeToString())

    check_graph_files(tmp_path, "unet/model.onnx", "unet/weights.bin")


def test_every_cut_and_every_changed_byte_of_a_graph_is_read_as_onnx_reads_it_or_refused():
    data = in_a_branch("weights.bin").SerializeToString()
    read = 0

    for index in range(len(data)):
        for changed in (data[:index], data[:index] + b"\xff" + data[index + 1 :]):
            try:
                names = external_files(changed)
                model = onnx.load_model_from_string(changed)
            except (ValueError, DecodeError):
                continue
            read += 1
            assert names >= {
                entry.value
                for tensor in _get_all_tensors(model)
                for entry in tensor.external_data
                if entry.key == "location"
            }

    assert read > 50


def test_a_graph_in_a_graph_in_a_graph_has_an_end():
    model = model_of(graph_of([constant("weights.bin")]))
    for _ in range(25):  # three messages each; protobuf itself takes 100
        node = helper.make_node("If", ["c"], ["y"], then_branch=model.graph)
        model = model_of(graph_of([node]))

    with pytest.raises(ValueError, match="nests more than 64 deep"):
        external_files(model.SerializeToString())


@pytest.mark.parametrize("location", ["../secret.bin", "{absolute}", "link.bin"])
def test_onnx_runtime_itself_opens_no_file_outside_the_folder_of_a_graph(tmp_path, location):
    secret, folder = tmp_path / "secret.bin", tmp_path / "unet"
    folder.mkdir()
    np.array([1, 2], dtype=np.float32).tofile(secret)
    (folder / "link.bin").symlink_to(secret)
    (folder / "weights.bin").write_bytes(secret.read_bytes())
    path = folder / "model.onnx"
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4

    def outputs(name):
        # Two tensors, so that the sum is not folded away before it is read.
        add = helper.make_node("Add", ["a", "a"], ["y"])
        path.write_bytes(model_of(graph_of([add], [external("a", name)])).SerializeToString())
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return session.run(None, {})[0]

    np.testing.assert_array_equal(outputs("weights.bin"), [2, 4])
    with pytest.raises(Exception, match=r"(?i)external data|escapes|outside|absolute"):
        outputs(location.format(absolute=secret))
