"""What each part that stays in fp32, or keeps fp16 in range, is there for: it fails without."""

import io

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnx_ir.passes.common import RemoveUnusedNodesPass, ShapeInferencePass

from ldm_export.graphs.onnx_export import OPSET
from ldm_export.graphs.passes import AssignPrecision
from ldm_export.graphs.precision import all_fp32, fp16_with_islands
from ldm_export.networks.attention import Attention

HEAD = '<ir_version: 10, opset_import: ["" : 20]>\n'
BATCH_NORM = """unet (float[1, 4, 64] x) => (float[1, 4, 64] y)
<float[4] scale = {1, 1, 1, 1}, float[4] bias = {0, 0, 0, 0},
 float[4] mean = {0, 0, 0, 0}, float[4] variance = {9e6, 9e6, 9e6, 9e6}>
{
    a = Neg(x)
    b = BatchNormalization(a, scale, bias, mean, variance)
    y = Neg(b)
}
"""
# Queries and keys of 64 channels; where the scale of 1/8 is applied is the only difference.
SCALED_BEFORE = """unet (float[1, 32, 64] q, float[1, 64, 32] k) => (float[1, 32, 32] y)
<float root = {0.35355338}>
{
    small_q = Mul(q, root)
    small_k = Mul(k, root)
    scores = MatMul(small_q, small_k)
    y = Softmax<axis = -1>(scores)
}
"""
SCALED_AFTER = """unet (float[1, 32, 64] q, float[1, 64, 32] k) => (float[1, 32, 32] y)
<float scale = {0.125}>
{
    products = MatMul(q, k)
    scores = Mul(products, scale)
    y = Softmax<axis = -1>(scores)
}
"""


def all_fp16(_):
    return lambda _: ir.DataType.FLOAT16


def planned(model, plan):
    model = ShapeInferencePass()(model).model
    AssignPrecision(plan(model.graph))(model)
    RemoveUnusedNodesPass()(model)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def as_typed(proto, inputs):
    """Compute in the types the graph says: ONNX Runtime's CPU kernels widen fp16 to fp32 inside."""
    with np.errstate(all="ignore"):
        return ReferenceEvaluator(proto).run(None, inputs)[0]


def in_onnxruntime(proto, inputs):
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, inputs)[0]


def error(actual, expected):
    if not np.isfinite(actual).all():
        return np.inf
    return np.abs(actual.astype(np.float64) - expected).max() / np.abs(expected).max()


def read(text):
    return ir.from_onnx_text(HEAD + text)


def scores_beyond_fp16():
    """Queries and keys whose plain products pass 65504 and whose scaled ones do not."""
    rng = np.random.default_rng(0)
    q = rng.normal(scale=60, size=(1, 32, 64)).astype(np.float32)
    k = rng.normal(scale=60, size=(1, 64, 32)).astype(np.float32)
    assert 65504 < np.abs(q @ k).max() < 8 * 65504
    return {"q": q, "k": k}


def test_a_running_variance_beyond_fp16_needs_its_island():
    inputs = {"x": np.random.default_rng(0).normal(scale=3000, size=(1, 4, 64)).astype(np.float32)}
    expected = as_typed(planned(read(BATCH_NORM), all_fp32), inputs)

    island = as_typed(planned(read(BATCH_NORM), fp16_with_islands), inputs)
    plain = as_typed(planned(read(BATCH_NORM), all_fp16), inputs)

    assert error(island, expected) < 2e-3
    assert error(plain, expected) > 0.5


def test_attention_scores_stay_in_range_only_if_scaled_before_the_product():
    inputs = scores_beyond_fp16()
    expected = as_typed(planned(read(SCALED_BEFORE), all_fp32), inputs)

    before = as_typed(planned(read(SCALED_BEFORE), fp16_with_islands), inputs)
    after = as_typed(planned(read(SCALED_AFTER), fp16_with_islands), inputs)

    assert np.isfinite(before).all()
    assert np.median(np.abs(before - expected)) < 1e-3
    assert not np.isfinite(after).all()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_the_exporter_scales_before_the_product():
    """So that large activations pass through the UNet's own attention in fp16."""
    torch.manual_seed(0)
    attention = Attention(64, 64, 1).eval()
    for weights in (attention.to_q.weight, attention.to_k.weight):
        torch.nn.init.eye_(weights)
    hidden = torch.randn(1, 32, 64) * 60
    file = io.BytesIO()
    with torch.no_grad():
        expected = attention(hidden, hidden).numpy()
        torch.onnx.export(attention, (hidden, hidden), file, dynamo=True, opset_version=OPSET)
    model = ir.from_proto(onnx.load_from_string(file.getvalue()))
    names = [each.name for each in model.graph.inputs]
    inputs = {name: hidden.numpy() for name in names}

    proto = planned(model, fp16_with_islands)

    assert (hidden @ hidden.mT).abs().max() > 65504
    for run in (as_typed, in_onnxruntime):
        assert error(run(proto, inputs), expected) < 5e-3
