"""The precision policy of a graph: the fp32 islands of an fp16 graph, decided only here.

* Timestep features: t times a frequency needs more than fp16's 11 bits for t near 1000, or the
  sines are wrong.
* Normalisation statistics: a sum of squares over a feature map passes fp16's 65504.
* Codebook distances: an argmax compares numbers that are nearly equal. For the same reason a
  codebook is stored in fp32.
* The residual stream of BERT, with the matrix products that add to it: the sum of 64 unbounded
  contributions, which nothing normalises before the end, of weights that were trained in fp32;
  diffusers' port clamps infinities there. CLIP was trained in half precision and stays in it.

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
_CHOICES = frozenset({"ArgMax", "ArgMin"})
_PRODUCTS = frozenset({"MatMul", "Gemm"})

#: Names of the islands, for the manifest.
FP32_ISLANDS = (
    "timestep features",
    "codebook distances",
    "residual stream of BERT",
    *sorted(NORMALISATIONS),
)

#: The one island of a network that half precision cannot hold.
WHOLE_NETWORK = "the whole network"

#: Weights that are stored in fp32 in every bundle: rounded codes have other neighbours.
FP32_WEIGHTS = frozenset({"quantize.embedding.weight"})


def all_fp32(graph: ir.Graph) -> NodePrecision:
    """Return the precision policy of the CPU engine's graph: everything in fp32."""
    return lambda _: ir.DataType.FLOAT


def fp16_with_islands(graph: ir.Graph, *, residual_stream: bool = False) -> NodePrecision:
    """Return the precision policy of the GPU builders' graph: fp16 except for the islands.

    Args:
        graph: The graph that the policy is for.
        residual_stream: Whether the inputs of LayerNormalizations are a residual stream.
    """
    islands = {
        *(node for node in graph if node.op_type in NORMALISATIONS),
        *_ancestors(node for node in graph if node.op_type in _PERIODIC),
        *_choosing(graph),
        *(_residual_stream(graph) if residual_stream else ()),
    }
    return lambda node: ir.DataType.FLOAT if node in islands else ir.DataType.FLOAT16


def _choosing(graph: ir.Graph) -> Collection[ir.Node]:
    """Return the nodes that an index which is found by argmax or argmin is computed from."""
    chosen = _ancestors(
        producer
        for node in graph
        if node.op_type == "Gather" and (producer := _producer(node.inputs[1])) is not None
    )
    return chosen if any(node.op_type in _CHOICES for node in chosen) else ()


def _residual_stream(graph: ir.Graph) -> Collection[ir.Node]:
    """Return the additions that lead to a LayerNormalization, and the products they add."""
    found: set[ir.Node] = set()
    waiting = [node.inputs[0] for node in graph if node.op_type == "LayerNormalization"]
    while waiting:
        node = _producer(waiting.pop())
        if node is None or node in found:
            continue
        if node.op_type == "Add":
            waiting += node.inputs
        if node.op_type == "Add" or node.op_type in _PRODUCTS:
            found.add(node)
    return found


def _ancestors(nodes: Iterable[ir.Node]) -> Collection[ir.Node]:
    """Return `nodes` and every node they depend on."""
    found: set[ir.Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            producers = map(_producer, node.inputs)
            waiting += [producer for producer in producers if producer is not None]
    return found


def _producer(value: ir.Value | None) -> ir.Node | None:
    return None if value is None else value.producer()
