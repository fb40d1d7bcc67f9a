"""Which parts of an fp16 graph compute in fp32, and why: decided here and nowhere else.

* Timestep features: t times a frequency needs more than fp16's 11 bits for t near 1000, or the
  sines are wrong.
* Normalisation statistics: a sum of squares over a feature map passes fp16's 65504.

Everything else computes in fp16; matrix products and softmax accumulate in fp32 inside the GPU
kernels, and the attention scores are scaled before the product, so that they stay in range.
"""

from collections.abc import Callable, Collection, Iterable

import onnx_ir as ir

#: Decides the precision a node computes in.
NodePrecision = Callable[[ir.Node], ir.DataType]

NORMALISATIONS = frozenset(
    {"InstanceNormalization", "GroupNormalization", "LayerNormalization", "BatchNormalization"}
)
_PERIODIC = frozenset({"Sin", "Cos"})

#: Names of the islands, for the manifest.
FP32_ISLANDS = ("timestep features", *sorted(NORMALISATIONS))


def all_fp32(graph: ir.Graph) -> NodePrecision:
    """Return the plan of the CPU engine's graph: everything in fp32."""
    return lambda _: ir.DataType.FLOAT


def fp16_with_islands(graph: ir.Graph) -> NodePrecision:
    """Return the plan of the GPU builders' graph: fp16 but for the islands."""
    timestep_nodes = _ancestors(node for node in graph if node.op_type in _PERIODIC)

    def plan(node: ir.Node) -> ir.DataType:
        island = node.op_type in NORMALISATIONS or node in timestep_nodes
        return ir.DataType.FLOAT if island else ir.DataType.FLOAT16

    return plan


def _ancestors(nodes: Iterable[ir.Node]) -> Collection[ir.Node]:
    """Return `nodes` and every node they depend on."""
    found: set[ir.Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            producers = [value.producer() for value in node.inputs if value is not None]
            waiting += [producer for producer in producers if producer is not None]
    return found
