"""Count what TensorRT-RTX makes of the fp16 UNet, by opset and form of attention.

    python benchmarks/graph_quality.py --ckpt model.ckpt
    python benchmarks/graph_quality.py --ckpt model.ckpt --build    # also builds each, for sm89

Prints a table. The first row is what `ldm-export` writes. Needs no GPU.
"""

import argparse
import collections
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm_runtime.errors import LdmError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ldm_runtime.specs.model import ModelSpec

_FLOATS = frozenset({"FLOAT", "HALF"})
_HEAVY = frozenset({"CONVOLUTION", "MATRIX_MULTIPLY"})
#: Name, opset and whether attention is `com.microsoft.MultiHeadAttention`.
FORMS: tuple[tuple[str, int, bool], ...] = (
    ("opset 20, MatMul-Softmax-MatMul", 20, False),
    ("opset 21, MatMul-Softmax-MatMul", 21, False),
    ("opset 23, Attention", 23, False),
    ("opset 20, com.microsoft MHA", 20, True),
)


@dataclass(frozen=True, kw_only=True)
class GraphCounts:
    """Layers that the parser made of a graph.

    Attributes:
        layers: All layers of the network.
        by_type: Layers by type and by the type of their first input, such as ("CAST", "HALF").
        float_casts: Casts between fp32 and fp16, by name.
        fp32_products: Convolutions and matrix products that compute in fp32, by name.
    """

    layers: int
    by_type: Mapping[tuple[str, str], int]
    float_casts: tuple[str, ...]
    fp32_products: tuple[str, ...]

    def of_type(self, *types: str) -> int:
        """Return how many layers are of some types, whatever they compute in."""
        return sum(count for (each, _), count in self.by_type.items() if each in types)


def count_layers(graph: Path) -> GraphCounts:
    """Parse a graph with TensorRT-RTX and count.

    Raises:
        RuntimeError: It cannot be parsed.
    """
    from ldm_runtime.engines.library import import_builder, library_logger, take_errors

    module = import_builder("tensorrt_rtx")
    logger = library_logger(module)
    builder = module.Builder(logger)
    network = builder.create_network(1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = module.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph)):
        raise RuntimeError("; ".join(take_errors(module)))
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    kinds = [(layer, layer.type.name, _computes_in(layer)) for layer in layers]
    return GraphCounts(
        layers=len(layers),
        by_type=collections.Counter((kind, dtype) for _, kind, dtype in kinds),
        float_casts=tuple(
            layer.name
            for layer, kind, dtype in kinds
            if kind == "CAST" and {dtype, layer.get_output(0).dtype.name} == _FLOATS
        ),
        fp32_products=tuple(
            layer.name for layer, kind, dtype in kinds if kind in _HEAVY and dtype == "FLOAT"
        ),
    )


def _computes_in(layer: Any) -> str:  # noqa: ANN401  (a class of the vendor's)
    tensor = layer.get_input(0) if layer.num_inputs else layer.get_output(0)
    return str(tensor.dtype.name)


@contextmanager
def written_as(opset: int, *, fused: bool) -> Iterator[None]:
    """Make `ldm_export` write another opset, and UNets with attention as one operator."""
    from ldm_export.graphs import onnx_export
    from ldm_export.networks.attention import Attention

    exporter, attention = _anything(onnx_export), _anything(Attention)
    before = exporter.OPSET, attention.forward
    exporter.OPSET = opset
    if fused:
        attention.forward = _multi_head_attention
    try:
        yield
    finally:
        exporter.OPSET, attention.forward = before


def _anything(value: Any) -> Any:  # noqa: ANN401  (so that attributes can be replaced)
    return value


def _multi_head_attention(self: "torch.nn.Module", hidden: "Tensor", context: "Tensor") -> "Tensor":
    """Attention as ONNX Runtime's contributed operator."""
    import torch

    module = _anything(self)
    inputs = [module.to_q(hidden), module.to_k(context), module.to_v(context)]
    mixed = torch.onnx.ops.symbolic(
        "com.microsoft::MultiHeadAttention",
        inputs,
        {"num_heads": module.num_heads},
        dtype=hidden.dtype,
        shape=hidden.shape,
        version=1,
    )
    result: Tensor = module.to_out(mixed)
    return result


def write_unet(checkpoint: Path, folder: Path) -> "ModelSpec":
    """Write the graphs of a checkpoint's UNet and return the checkpoint's specification."""
    from ldm_export.checkpoint.checkpoint import open_checkpoint
    from ldm_export.detection.detect import detect
    from ldm_export.detection.overrides import Overrides
    from ldm_export.graphs.onnx_export import write_graphs
    from ldm_export.networks.loading import load_network

    with open_checkpoint(checkpoint) as opened:
        overrides = Overrides(height=512, width=512)
        detection = detect(opened.tensors, config=None, overrides=overrides)
        weights = {
            name: opened.tensors[stored] for name, stored in detection.weights["unet"].items()
        }
        network = load_network("unet", detection.spec, weights)
        write_graphs("unet", network, detection.spec, folder, "float16")
        return detection.spec


def build_seconds(graph: Path, spec: "ModelSpec", plan: Path) -> float:
    """Build a graph for sm89 at default sizes and return the time it took."""
    from ldm_runtime.engines.build import build_engine
    from ldm_runtime.engines.build_specs import (
        ComponentFiles,
        EngineOptions,
        choose_toolchain,
        make_build_specs,
    )
    from ldm_runtime.engines.profiles import SizeRange

    toolchain = choose_toolchain(EngineOptions(builder="tensorrt_rtx", targets=("sm89",)))
    assert not isinstance(toolchain, str)  # only "auto" and "none" answer with a sentence
    files = {"unet": ComponentFiles(graph_sha256="", weights_sha256="")}
    (build_spec,) = make_build_specs(toolchain, SizeRange(), spec, files)
    started = time.monotonic()
    build_engine(graph, build_spec, plan)
    return time.monotonic() - started


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """Lay rows out in columns."""
    columns = list(rows[0])
    widths = [max(len(column), *(len(row[column]) for row in rows)) for column in columns]
    lines = [columns, *([row[column] for column in columns] for row in rows)]
    return "\n".join(
        "  ".join(
            text.ljust(width) if index == 0 else text.rjust(width)
            for index, (text, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def measure(checkpoint: Path, form: tuple[str, int, bool], *, build: bool) -> dict[str, str]:
    """Return one row of the table; a form that cannot be built is a result like others."""
    name, opset, fused = form
    with tempfile.TemporaryDirectory(prefix="ldm-graph-") as folder:
        graph, plan = Path(folder, "model.onnx"), Path(folder, "unet.plan")
        with written_as(opset, fused=fused):
            spec = write_unet(checkpoint, Path(folder))
        row = {"form": name} | _cells(count_layers(graph))
        if not build:
            return row
        try:
            seconds = build_seconds(graph, spec, plan)
        except LdmError as error:
            print(f"{name}: {error}", file=sys.stderr)
            return row | {"plan MB": "fails", "build s": "fails"}
        return row | {"plan MB": f"{plan.stat().st_size / 1e6:.1f}", "build s": f"{seconds:.1f}"}


def _cells(counts: GraphCounts) -> dict[str, str]:
    cells = {
        "layers": counts.layers,
        "fp casts": len(counts.float_casts),
        "fp32 conv/matmul": len(counts.fp32_products),
        "normalisations": counts.of_type("NORMALIZATION"),
        "softmax": counts.of_type("SOFTMAX"),
        "attention": counts.of_type("ATTENTION_INPUT"),
        "shuffles": counts.of_type("SHUFFLE"),
    }
    return {name: str(count) for name, count in cells.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ckpt", type=Path, required=True, help="a checkpoint")
    parser.add_argument("--build", action="store_true", help="also build each form")
    args = parser.parse_args(argv)
    rows = []
    for form in FORMS:
        print(f"{form[0]} …", file=sys.stderr, flush=True)
        rows.append(measure(args.ckpt, form, build=args.build))
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
