"""Traces of networks that are kept, so that tests which export many models trace each graph once.

A trace depends on hyperparameters and not on weights, which it has under the names of the network's
parameters. Tracing takes most of the time that the export of a small network takes.
"""

from contextlib import contextmanager

import onnx_ir as ir
import pytest

from ldm_export import bundle, steps
from ldm_export.graphs import onnx_export
from ldm_runtime.specs.model import components_of


class Traces:
    """Stands in for tracing within `kept`, where freed memory is left to the allocator."""

    def __init__(self):
        self._trace, self._known = onnx_export._trace, {}

    @contextmanager
    def kept(self):
        """Trace each graph once, as long as this lasts."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(onnx_export, "_trace", self._traced)
            for module in (bundle, steps):
                patch.setattr(module, "give_back_memory", lambda: None)
            yield

    def _traced(self, name, network, spec):
        """Return the traced graph of a network, its weights those of `network`."""
        row = components_of(spec)[name]
        key = (name, row.inputs, spec.networks[row.network])
        if key not in self._known:
            self._known[key] = ir.to_proto(self._trace(name, network, spec))
        model = ir.from_proto(self._known[key])
        for parameter, tensor in network.named_parameters():
            value = model.graph.initializers.get(parameter)
            if value is not None:  # layers that context does not pass are in no graph
                value.const_value = ir.tensor(tensor.numpy(), name=parameter)
        return model
