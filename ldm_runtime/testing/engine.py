"""An engine over a Python function, for tests of code that calls engines."""

from collections.abc import Callable
from typing import Any

import numpy.typing as npt

from ldm_runtime.backends.contract import BoundInputs, Runner, Tensors
from ldm_runtime.closing import Closing
from ldm_runtime.errors import BackendError

Function = Callable[[Tensors], dict[str, npt.NDArray[Any]]]


class FakeEngine(Closing):
    """An engine over a Python function.

    Attributes:
        calls: The inputs of every `run` so far, constants of `bind` included.
    """

    def __init__(self, function: Function) -> None:
        self.calls: list[Tensors] = []
        self._function: Function | None = function

    def run(self, inputs: Tensors) -> dict[str, npt.NDArray[Any]]:
        """Call the function."""
        if self._function is None:
            raise BackendError("the engine is closed")
        self.calls.append(dict(inputs))
        return self._function(inputs)

    def bind(self, constants: Tensors) -> Runner:
        """Fix some inputs."""
        return BoundInputs(runner=self, constants=constants)

    def close(self) -> None:
        """Make `run` raise from now on."""
        self._function = None
