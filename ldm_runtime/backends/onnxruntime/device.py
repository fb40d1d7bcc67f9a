"""Device engine for ONNX Runtime: fixed buffers, constants that stay on the device, CUDA graphs.

It needs a `DeviceSession` of ONNX Runtime, which `providers` makes.
"""

import itertools
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ldm_runtime.backends.contract import Runner, Tensors
from ldm_runtime.backends.onnxruntime.session import NATIVE_ERRORS, describe
from ldm_runtime.backends.signatures import check_inputs
from ldm_runtime.bundle.manifest import ComponentRecord
from ldm_runtime.closing import Closing
from ldm_runtime.errors import BackendError

#: Sets of shapes whose buffers and CUDA graph are kept; the least recently used one is evicted.
MAX_SLOTS = 8

Array = npt.NDArray[Any]


class Buffer(Protocol):
    """An array on the device, at an address that does not change."""

    def write(self, array: Array) -> None:
        """Overwrite it with an array of its shape and type, and wait for completion."""
        ...

    def read(self) -> Array:
        """Return a copy."""
        ...


class DeviceSession(Protocol):
    """A graph loaded on a device: the boundary to the vendor's API."""

    @property
    def records_graphs(self) -> bool:
        """Whether calls may be captured as CUDA graphs."""
        ...

    def allocate(self, shape: Sequence[int], dtype: str) -> Buffer:
        """Allocate an array on the device."""
        ...

    def prepare(
        self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer], graph_id: int | None
    ) -> Callable[[], None]:
        """Return a function that runs the graph from and into exactly these buffers.

        Args:
            inputs: Every input of the graph.
            outputs: Every output.
            graph_id: Number under which to capture a CUDA graph at the first call and to replay it
                from then on, always from the same thread; None is never.
        """
        ...

    def forget(self, graph_id: int) -> None:
        """Release a CUDA graph."""
        ...

    def close(self) -> None:
        """Release everything."""
        ...


@dataclass(kw_only=True, eq=False)
class _Slot:
    """Buffers for one set of shapes, and the runner whose constants they hold (None: none)."""

    inputs: Mapping[str, Buffer]
    outputs: Mapping[str, Buffer]
    graph_id: int | None
    call: Callable[[], None]
    holder: object | None = None


class DeviceEngine(Closing):
    """One network on a device; see `ldm_runtime.backends.Engine`.

    All work is done in order by one dedicated thread: ONNX Runtime keeps CUDA graphs per thread,
    and a replay overwrites the outputs of the last one.

    Args:
        session: The graph, loaded.
        component: Its inputs and outputs.
        sizes: Lengths of the fixed axes, from `specs.model.axis_sizes`.
        factor: Image pixels per latent pixel, along each axis.
    """

    def __init__(
        self,
        session: DeviceSession,
        component: ComponentRecord,
        sizes: Mapping[str, int],
        *,
        factor: int,
    ) -> None:
        self._session = session
        self._component = component
        self._sizes = sizes
        self._factor = factor
        self._slots: OrderedDict[tuple[tuple[int, ...], ...], _Slot] = OrderedDict()
        self._graph_ids = itertools.count(1)
        self._closed = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"ldm-{component.name}")

    def run(self, inputs: Tensors) -> dict[str, Array]:
        """Run once; see `ldm_runtime.backends.contract.Runner`."""
        return self.run_with(inputs, {}, None)

    def bind(self, constants: Tensors) -> Runner:
        """Fix some inputs, which are uploaded at the first run and stay on the device.

        They are uploaded again only if other constants replaced them: those of another request of
        the same shape at the same time, or after a change of shape.
        """
        kept = {name: np.array(array) for name, array in constants.items()}
        return _BoundRunner(engine=self, constants=kept)

    def run_with(
        self, inputs: Tensors, constants: Tensors, holder: object | None
    ) -> dict[str, Array]:
        """Run once with constants, which `holder` identifies."""
        if repeated := sorted(inputs.keys() & constants.keys()):
            raise BackendError(f"{', '.join(repeated)} of {self._component.name} is bound already")
        everything = {**constants, **inputs}
        lengths = check_inputs(self._component, self._sizes, everything)

        def compute() -> dict[str, Array]:
            slot = self._slot(everything, lengths)
            given = everything if holder is None or slot.holder is not holder else inputs
            for name, array in given.items():
                slot.inputs[name].write(array)
            slot.holder = holder
            slot.call()
            return {name: buffer.read() for name, buffer in slot.outputs.items()}

        try:
            done = self._thread.submit(self._guarded, compute, everything)
        except RuntimeError as error:
            raise BackendError(
                f"the {self._component.name} engine is closed; open the bundle again"
            ) from error
        return done.result()

    def close(self) -> None:
        """Free everything, once the calls that are running have finished."""
        self._thread.shutdown(wait=True)
        if not self._closed:
            self._closed = True
            self._slots.clear()
            self._session.close()

    def _guarded(
        self, compute: Callable[[], dict[str, Array]], inputs: Tensors
    ) -> dict[str, Array]:
        try:
            return compute()
        except NATIVE_ERRORS as error:
            self._drop(_shapes(inputs))
            shapes = ", ".join(f"{name} {array.shape}" for name, array in inputs.items())
            raise BackendError(
                f"ONNX Runtime failed in {self._component.name} with {shapes}: {describe(error)}"
            ) from error

    def _slot(self, inputs: Tensors, lengths: Mapping[str, int]) -> _Slot:
        key = _shapes(inputs)
        if key not in self._slots:
            while len(self._slots) >= MAX_SLOTS:
                self._drop(next(iter(self._slots)))
            self._slots[key] = self._make_slot(_all_lengths(lengths, self._factor))
        self._slots.move_to_end(key)
        return self._slots[key]

    def _make_slot(self, lengths: Mapping[str, int]) -> _Slot:
        inputs, outputs = (
            {
                each.name: self._session.allocate([lengths[axis] for axis in each.axes], each.dtype)
                for each in signatures
            }
            for signatures in (self._component.inputs, self._component.outputs)
        )
        graph_id = next(self._graph_ids) if self._session.records_graphs else None
        call = self._session.prepare(inputs, outputs, graph_id)
        return _Slot(inputs=inputs, outputs=outputs, graph_id=graph_id, call=call)

    def _drop(self, key: tuple[tuple[int, ...], ...]) -> None:
        slot = self._slots.pop(key, None)
        if slot is not None and slot.graph_id is not None:
            self._session.forget(slot.graph_id)


@dataclass(frozen=True, kw_only=True, eq=False)
class _BoundRunner:
    engine: DeviceEngine
    constants: Tensors

    def run(self, inputs: Tensors) -> dict[str, Array]:
        """Run with `inputs` and the constants; see `Runner`."""
        return self.engine.run_with(inputs, self.constants, self)


def _shapes(inputs: Tensors) -> tuple[tuple[int, ...], ...]:
    return tuple(inputs[name].shape for name in sorted(inputs))


def _all_lengths(lengths: Mapping[str, int], factor: int) -> dict[str, int]:
    """Add the dynamic axes that follow from the others: images are `factor` times latents."""
    found = dict(lengths)
    for axis in ("height", "width"):
        if axis in found:
            found[f"image_{axis}"] = found[axis] * factor
        elif f"image_{axis}" in found:
            found[axis] = found[f"image_{axis}"] // factor
    return found
