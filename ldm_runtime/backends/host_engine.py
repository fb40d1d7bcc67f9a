"""An engine on the CPU: what its library computes, between checks of what goes in and out."""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ldm_runtime.backends.contract import BoundInputs, Runner, Tensors
from ldm_runtime.backends.denormals import flushed_denormals
from ldm_runtime.backends.host_memory import check_memory
from ldm_runtime.backends.signatures import check_inputs, check_outputs
from ldm_runtime.bundle.manifest import ComponentRecord
from ldm_runtime.closing import Closing
from ldm_runtime.errors import BackendError
from ldm_runtime.specs.model import ModelSpec

#: Maps contiguous inputs by name to all outputs by name.
Compute = Callable[[Tensors], Mapping[str, npt.NDArray[Any]]]


@dataclass(frozen=True, kw_only=True)
class NativeErrors:
    """The errors of a library.

    Attributes:
        library: Its name, for messages.
        classes: Their classes.
        describe: Returns one as a line.
    """

    library: str
    classes: tuple[type[Exception], ...]
    describe: Callable[[Exception], str]


class HostEngine(Closing):
    """One graph in a library that computes on the CPU, where denormals count as zero.

    Args:
        component: Its inputs and outputs.
        sizes: Lengths of the fixed axes, from `specs.model.axis_sizes`.
        errors: Those of the library.
        spec: The model, to refuse runs that this machine has no memory for; None refuses none.
        keeps_scores: Whether the library has all scores of an attention in memory at once.
    """

    def __init__(
        self,
        component: ComponentRecord,
        sizes: Mapping[str, int],
        errors: NativeErrors,
        spec: ModelSpec | None,
        *,
        keeps_scores: bool = True,
    ) -> None:
        self._component, self._sizes, self._errors, self._spec = component, sizes, errors, spec
        self._keeps_scores, self._held = keeps_scores, 0

    @abstractmethod
    def _opened(self) -> Compute | None:
        """Return what computes, or None once the engine is closed."""

    def run(self, inputs: Tensors) -> dict[str, npt.NDArray[Any]]:
        """Run once; see `ldm_runtime.backends.contract.Runner`."""
        compute, name = self._opened(), self._component.name
        if compute is None:
            raise BackendError(f"the {name} engine is closed; open the bundle again")
        lengths = check_inputs(self._component, self._sizes, inputs)
        held = self._held
        if self._spec is not None:
            held = check_memory(name, self._spec, lengths, held, keeps_scores=self._keeps_scores)
        feed = {key: np.ascontiguousarray(array) for key, array in inputs.items()}
        try:
            with flushed_denormals():
                outputs = compute(feed)
        except self._errors.classes as error:
            shapes = ", ".join(f"{key} {array.shape}" for key, array in feed.items())
            raise BackendError(
                f"{self._errors.library} failed in {name} with {shapes}: "
                f"{self._errors.describe(error)}"
            ) from error
        self._held = max(self._held, held)
        check_outputs(self._component, lengths, outputs)
        return {each.name: outputs[each.name] for each in self._component.outputs}

    def bind(self, constants: Tensors) -> Runner:
        """Fix some inputs; on the CPU there is nothing to upload."""
        return BoundInputs(runner=self, constants=constants)
