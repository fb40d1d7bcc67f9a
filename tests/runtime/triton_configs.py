"""Configurations of Triton, read with Triton's own `model_config.proto`."""

import functools
import importlib.util
from importlib import metadata

import pytest

_TYPES = {"TYPE_FP32": "tensor(float)", "TYPE_INT64": "tensor(int64)"}


@functools.cache
def model_config_proto():
    """The module of `model_config.proto` that Triton's client has."""
    pytest.importorskip("google.protobuf", reason="needs protobuf")
    try:
        client = metadata.distribution("tritonclient")
    except metadata.PackageNotFoundError:
        pytest.skip("needs tritonclient")
    # By its path: the package around it needs gRPC.
    path = client.locate_file("tritonclient/grpc/model_config_pb2.py")
    spec = importlib.util.spec_from_file_location("triton_model_config_pb2", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def config_of(model):
    """Return the configuration of a model; an unknown field or value is an error."""
    from google.protobuf import text_format

    text = (model / "config.pbtxt").read_text()
    return text_format.Parse(text, model_config_proto().ModelConfig())


def tensors(entries):
    """Return data types and dimensions of inputs or outputs, by name."""
    name_of = model_config_proto().DataType.Name
    return {each.name: (name_of(each.data_type), list(each.dims)) for each in entries}


def graph_signature(model):
    """Return what ONNX Runtime finds in the graph of a network, in pairs with its configuration."""
    import onnxruntime

    config = config_of(model)
    session = onnxruntime.InferenceSession(
        model / "1/model.onnx/model.onnx", providers=["CPUExecutionProvider"]
    )
    for entries, found in (
        (config.input, session.get_inputs()),
        (config.output, session.get_outputs()),
    ):
        configured = tensors(entries)
        assert configured.keys() == {each.name for each in found}
        for each in found:
            dtype, dims = configured[each.name]
            shape = [-1 if isinstance(size, str) else size for size in each.shape]
            yield (_TYPES[dtype], dims), (each.type, shape)
