"""The largest values of an fp16 graph, which a CPU does not show by itself.

ONNX Runtime has few half-precision kernels on a CPU: it computes most nodes in fp32 and leaves out
the roundings in between, so that a graph which gives NaN on every GPU looks perfect. Here the graph
gets one more output per sum and product, its largest absolute value.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from ldm_runtime.backends.contract import Tensors

#: The largest number of half precision.
FP16_MAX = float(np.finfo(np.float16).max)

_SUFFIX = ".largest"
_GROWING = frozenset({"Conv", "MatMul", "Gemm", "Add", "Sub", "Mul"})


@contextmanager
def watched_graph(path: Path) -> Iterator[Path]:
    """Write a copy of an fp16 graph, next to it, that also outputs how large its values become.

    Sums that a softmax takes are left out, because a mask adds minus infinity there.

    Args:
        path: The graph; its weights are found next to it.

    Yields:
        The copy, with scalar float32 outputs after the graph's own. It is deleted afterwards.
    """
    model = ir.load(path)
    for node in [each for each in model.graph if each.op_type in _GROWING]:
        value = node.outputs[0]
        feeds_softmax = any(user.op_type == "Softmax" for user in value.consumers())
        is_masked = node.op_type == "Add" and feeds_softmax
        if value.dtype == ir.DataType.FLOAT16 and not is_masked:
            _watch(model.graph, value)
    copy = path.with_name(f"{path.name}.watched")
    try:
        onnx.save(ir.to_proto(model), copy)
        yield copy
    finally:
        copy.unlink(missing_ok=True)


def largest_value(outputs: Tensors) -> tuple[str, float]:
    """Return the name of the value of a watched graph that became largest, and how large.

    NaN counts as infinite.
    """
    peaks = {
        name.removesuffix(_SUFFIX): float(np.nan_to_num(array, nan=np.inf, posinf=np.inf))
        for name, array in outputs.items()
        if name.endswith(_SUFFIX)
    }
    return max(peaks.items(), key=lambda each: each[1], default=("nothing", 0.0))


def _watch(graph: ir.Graph, value: ir.Value) -> None:
    size = ir.node("Abs", [value])
    peak = ir.node("ReduceMax", [size.outputs[0]], {"keepdims": 0})
    wide = ir.node("Cast", [peak.outputs[0]], {"to": ir.DataType.FLOAT})
    graph.extend([size, peak, wide])
    output = wide.outputs[0]
    output.name, output.shape = f"{value.name}{_SUFFIX}", ir.Shape([])
    output.dtype = ir.DataType.FLOAT
    graph.outputs.append(output)
