import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, save

from ldm_export.graphs.fp16_range import FP16_MAX, largest_value, watched_graph

SHAPE = [1, 4, 4]


def attention(path, *, masked):
    """A graph of attention scores in fp16 and their softmax, with or without a mask."""
    kind = TensorProto.FLOAT16
    nodes = [helper.make_node("MatMul", ["queries", "keys"], ["scores"])]
    if masked:
        nodes.append(helper.make_node("Add", ["scores", "mask"], ["masked"]))
    nodes.append(helper.make_node("Softmax", ["masked" if masked else "scores"], ["shares"]))
    names = ["queries", "keys", *(["mask"] if masked else [])]
    graph = helper.make_graph(
        nodes,
        "attention",
        [helper.make_tensor_value_info(name, kind, SHAPE) for name in names],
        [helper.make_tensor_value_info("shares", kind, SHAPE)],
        value_info=[
            helper.make_tensor_value_info(name, kind, SHAPE)
            for name in ("scores", *(["masked"] if masked else []))
        ],
    )
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), path)
    return names


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("size", "overflows"), [(10, False), (200, True)])
def test_scores_of_attention_are_watched_and_what_a_mask_adds_is_not(
    tmp_path, masked, size, overflows
):
    path = tmp_path / "model.onnx"
    names = attention(path, masked=masked)
    inputs = {name: np.full(SHAPE, size, np.float16) for name in names}
    if masked:
        inputs["mask"] = np.triu(np.full(SHAPE, -np.inf, np.float16), 1)

    with watched_graph(path) as watched:
        session = onnxruntime.InferenceSession(watched, providers=["CPUExecutionProvider"])
        outputs = [each.name for each in session.get_outputs()]
        name, value = largest_value(dict(zip(outputs, session.run(None, inputs), strict=True)))

    assert (name, value > FP16_MAX) == ("scores", overflows)
