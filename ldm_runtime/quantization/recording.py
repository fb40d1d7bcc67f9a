"""What goes into every layer of a UNet while it makes images: ranges, and what 8 bits cost each."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ldm_runtime.backends.contract import Engine, EngineSource, Tensors
from ldm_runtime.bundle.quantized_graphs import (
    Layer,
    Range,
    error_outputs,
    range_outputs,
    with_errors,
    with_ranges,
)
from ldm_runtime.specs.components import TensorSignature

if TYPE_CHECKING:
    from ldm_runtime.backends.onnxruntime.cpu import OnnxRuntimeEngine

_KEPT_INPUTS = 5  # calls in which layers are compared, of all


class RangeRecorder:
    """A UNet in fp32 that notes the range of what goes into every layer.

    Attributes:
        is_recording: Whether it does.
        ranges: The ranges of all calls that it recorded.
        calls: How many these are.
        inputs: Inputs of some of them, evenly spread.

    Args:
        engine: The UNet, whose graph is that of `with_ranges`.
        outputs: Names of the outputs of the UNet itself.
        layers: The layers.
    """

    def __init__(self, engine: Engine, outputs: Sequence[str], layers: Sequence[Layer]) -> None:
        self._engine, self._outputs, self._layers = engine, outputs, layers
        self.is_recording = True
        self.ranges: dict[Layer, Range] = {}
        self.calls = 0
        self.inputs: list[Tensors] = []
        self._stride = 1  # of so many calls the inputs of one are kept

    def run(self, inputs: Tensors) -> Tensors:
        """Run once; see `ldm_runtime.backends.contract.Runner`."""
        found = self._engine.run(inputs)
        if self.is_recording:
            self._keep(inputs)
            for layer in self._layers:
                seen = _range(found, layer)
                self.ranges[layer] = seen.joined(self.ranges.get(layer, seen))
        return {name: found[name] for name in self._outputs}

    def _keep(self, inputs: Tensors) -> None:
        if self.calls % self._stride == 0:
            self.inputs.append({name: array.copy() for name, array in inputs.items()})
        if len(self.inputs) == 2 * _KEPT_INPUTS:
            del self.inputs[1::2]
            self._stride *= 2
        self.calls += 1


def open_recorder(source: EngineSource, layers: Sequence[Layer]) -> "OnnxRuntimeEngine":
    """Open a network whose outputs include the range of what goes into every layer.

    Args:
        source: The network.
        layers: Layers of its graph in fp32.

    Raises:
        BackendError: ONNX Runtime cannot load the graph.
        BundleError: A file is missing or altered.
    """
    path = source.graph("fp32")
    names = [each for layer in layers for each in range_outputs(layer.activation)]
    return _open(source, path, with_ranges(path, layers), dict.fromkeys(names))


def most_expensive_first(
    source: EngineSource, ranges: Mapping[Layer, Range], inputs: Sequence[Tensors]
) -> list[Layer]:
    """Return layers by the error of their results in 8 bits, relative to these, largest first.

    Args:
        source: The network.
        ranges: Its layers, and what goes into them.
        inputs: Inputs of the network; a few of them are used.

    Raises:
        BackendError: ONNX Runtime cannot load or run the graph.
        BundleError: A file is missing or altered.
    """
    path = source.graph("fp32")
    graph = with_errors(path, source.bundle / source.component.weights_file, ranges)
    names = [each for layer in ranges for each in error_outputs(layer)]
    errors = dict.fromkeys(ranges, 0.0)
    with _open(source, path, graph, names) as engine:
        for index in np.linspace(0, len(inputs) - 1, _KEPT_INPUTS).round().astype(int):
            found = engine.run(inputs[index])
            for layer in ranges:
                error, power = (float(found[name]) for name in error_outputs(layer))
                errors[layer] += error / power if power else 0.0
    return sorted(ranges, key=lambda layer: -errors[layer])


def _open(
    source: EngineSource, path: Path, graph: bytes, outputs: Iterable[str]
) -> "OnnxRuntimeEngine":
    from ldm_runtime.backends.onnxruntime.cpu import OnnxRuntimeEngine

    more = tuple(TensorSignature(name=name, dtype="float32", axes=()) for name in outputs)
    component = replace(source.component, outputs=source.component.outputs + more)
    return OnnxRuntimeEngine(
        path,
        component,
        source.sizes,
        threads=source.threads,
        spec=source.manifest.spec,
        graph=graph,
    )


def _range(found: Tensors, layer: Layer) -> Range:
    smallest, largest = (float(found[name]) for name in range_outputs(layer.activation))
    return Range(minimum=min(smallest, 0.0), maximum=max(largest, 0.0))
