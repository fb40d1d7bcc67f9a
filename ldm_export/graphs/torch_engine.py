"""Torch as an engine: the reference of every exported graph and golden image."""

import torch
from torch import nn

from ldm_runtime.backends.contract import BoundInputs, Runner, Tensors
from ldm_runtime.closing import Closing
from ldm_runtime.specs.components import COMPONENTS


class TorchEngine(Closing):
    """A network in torch with the runtime's `Engine` protocol, float32 on the CPU.

    Args:
        component: Name in `ldm_runtime.specs.components.COMPONENTS`.
        network: Takes those of the component's inputs that the model has, in order, and returns its
            one output.
    """

    def __init__(self, component: str, network: nn.Module) -> None:
        self.network = network
        self._inputs = [signature.name for signature in COMPONENTS[component].inputs]
        (output,) = COMPONENTS[component].outputs
        self._output = output.name

    def run(self, inputs: Tensors) -> Tensors:
        """Run once; see `ldm_runtime.backends.contract.Runner`."""
        # A copy, because torch warns of arrays that it might write to but must not.
        arguments = [torch.tensor(inputs[name]) for name in self._inputs if name in inputs]
        with torch.inference_mode():
            output: torch.Tensor = self.network(*arguments)
        return {self._output: output.numpy()}

    def bind(self, constants: Tensors) -> Runner:
        """Return this network with some inputs fixed."""
        return BoundInputs(runner=self, constants=constants)

    def close(self) -> None:
        """Do nothing: torch frees the network with its last reference."""
