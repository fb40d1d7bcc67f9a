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
        network: Takes the component's inputs in order, None for one that the model does not have
            between others, and returns its outputs in order: a tensor, or several.
    """

    def __init__(self, component: str, network: nn.Module) -> None:
        self.network = network
        self._inputs = [signature.name for signature in COMPONENTS[component].inputs]
        self._outputs = [signature.name for signature in COMPONENTS[component].outputs]

    def run(self, inputs: Tensors) -> Tensors:
        """Run once; see `ldm_runtime.backends.contract.Runner`."""
        # A copy, because torch warns of arrays that it might write to but must not.
        known = [torch.tensor(inputs[name]) if name in inputs else None for name in self._inputs]
        while known[-1] is None:
            known.pop()
        with torch.inference_mode():
            found: torch.Tensor | tuple[torch.Tensor, ...] = self.network(*known)
        outputs = found if isinstance(found, tuple) else (found,)
        return {name: each.numpy() for name, each in zip(self._outputs, outputs, strict=False)}

    def bind(self, constants: Tensors) -> Runner:
        """Return this network with some inputs fixed."""
        return BoundInputs(runner=self, constants=constants)

    def close(self) -> None:
        """Do nothing: torch frees the network with its last reference."""
