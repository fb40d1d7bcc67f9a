"""Models whose adapters are inputs, as a request with its own scales sees them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from ldm_runtime.adapters.files import AdapterFile
from ldm_runtime.adapters.live import Matrices, plain_scales
from ldm_runtime.backends.contract import Runner, Tensors, bind_constants
from ldm_runtime.errors import RequestError
from ldm_runtime.pipeline.open_model import AdapterOrigin, OpenModel


@dataclass(frozen=True, kw_only=True, eq=False)
class BranchedRunner:
    """A network with branches, whose matrices are those of one request.

    Attributes:
        runner: The network.
        matrices: The inputs of its branches, each of one sample: (1, rows, columns).
    """

    runner: Runner
    matrices: Matrices

    def run(self, inputs: Tensors) -> Tensors:
        """Run once; see `ldm_runtime.backends.contract.Runner`."""
        return self.runner.run({**inputs, **self._of_samples(inputs)})

    def bind(self, constants: Tensors) -> Runner:
        """Fix some inputs and the matrices; see `ldm_runtime.backends.contract.BindingRunner`."""
        return bind_constants(self.runner, {**constants, **self._of_samples(constants)})

    def shared(self, share: Callable[[Runner], Runner]) -> "BranchedRunner":
        """Return it with another form of the network, whose calls other requests share."""
        return replace(self, runner=share(self.runner))

    def _of_samples(self, inputs: Tensors) -> Tensors:
        """Return the matrices as often as there are samples."""
        count = len(next(iter(inputs.values())))
        return {name: np.repeat(each, count, axis=0) for name, each in self.matrices.items()}


def with_live_adapters(model: OpenModel, scales: Mapping[str, float]) -> OpenModel:
    """Return a model as a request sees it that scales its live adapters.

    Args:
        model: The model.
        scales: Factors of the updates of adapters, by name; the others are left out.

    Raises:
        RequestError: The model has no live adapters, one is unknown, a scale is not a finite
            number or too large, or they do not go together.
    """
    scales = plain_scales(scales)
    if model.live is None:
        _check_unscaled(scales)
        return model
    matrices = model.live.matrices(scales)
    used = [(model.live.files[name], scale) for name, scale in scales.items() if scale]
    adapters = (*model.origin.adapters, *(origin_of(*each) for each in used))

    def network(name: str) -> Runner:
        runner, found = model.network(name), matrices.get(name)
        return BranchedRunner(runner=runner, matrices=found) if found else runner

    return replace(model, network=network, origin=replace(model.origin, adapters=adapters))


def _check_unscaled(scales: Mapping[str, float]) -> None:
    """Check that a request scales nothing, for a model that has nothing to scale."""
    if scaled := [name for name, scale in scales.items() if scale]:
        raise RequestError(
            "adapters",
            f"there is no {scaled[0]!r}, since this generator has no live adapters; give them as "
            "live_adapters to Generator(…)",
        )


def origin_of(file: AdapterFile, scale: float) -> AdapterOrigin:
    """Return what results say of an adapter."""
    return AdapterOrigin(
        name=file.file_name,
        sha256=file.sha256,
        web_ui_sha256=file.web_ui_sha256,
        scale=scale,
    )
