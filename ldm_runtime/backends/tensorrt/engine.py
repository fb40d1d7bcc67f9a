"""One running TensorRT engine: buffers, constants, one context and one CUDA graph per shape.

Nothing here imports CUDA or TensorRT. The GPU is a `cuda_device.Device` and the engine an
`EngineFile`, so that everything here is tested with fakes of those two.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ldm_runtime.backends.contract import Runner, Tensors
from ldm_runtime.backends.cuda_device import Device, DeviceMemory, HostMemory
from ldm_runtime.backends.tensorrt.selection import Replay, Shaped, check_inputs, padded
from ldm_runtime.bundle.manifest import ComponentRecord
from ldm_runtime.closing import Closing
from ldm_runtime.engines.records import EngineRecord
from ldm_runtime.errors import BackendError

_MAX_SHAPES = 4  # contexts that an engine keeps; each holds some memory

Shape = tuple[int, ...]


class EngineContext(Protocol):
    """An execution context of an engine for one set of input shapes."""

    def output_shape(self, name: str) -> Shape:
        """Return the shape of an output for these inputs."""
        ...

    def scratch_size(self) -> int:
        """Return the bytes of scratch memory that a run needs."""
        ...

    def set_scratch(self, address: int, size: int) -> None:
        """Set the address of the scratch memory."""
        ...

    def set_address(self, name: str, address: int) -> None:
        """Set the address of an input or output."""
        ...

    def enqueue(self, stream: int) -> None:
        """Enqueue one run.

        Raises:
            BackendError: TensorRT refuses.
        """
        ...

    def close(self) -> None:
        """Free it."""
        ...


class EngineFile(Protocol):
    """A loaded engine."""

    @property
    def records_graphs(self) -> bool:
        """Whether the caller may capture runs as CUDA graphs."""
        ...

    def new_context(self, shapes: Mapping[str, Shape]) -> EngineContext:
        """Return an execution context for these input shapes.

        Raises:
            BackendError: TensorRT refuses, or memory ran out.
        """
        ...

    def close(self) -> None:
        """Free it, once its contexts are closed."""
        ...


class Session:
    """Resources that the engines of one generator share: a GPU, its stream, scratch memory, a lock.

    The scratch memory of an engine is free for the next one as soon as it has run, because the
    stream orders their work; the lock orders the threads.
    """

    def __init__(self, open_device: Callable[[], Device]) -> None:
        self.lock = RLock()
        self._open_device = open_device
        self._device: Device | None = None
        self._scratch: DeviceMemory | None = None
        self._users = 0

    @property
    def device(self) -> Device:
        """The GPU, which is open between `enter` and `leave`."""
        assert self._device is not None, "the session is closed"
        return self._device

    def enter(self) -> Device:
        """Count one more engine; the first opens the GPU."""
        with self.lock:
            if self._device is None:
                self._device = self._open_device()
            self._users += 1
            return self._device

    def leave(self) -> None:
        """Count one engine fewer; the last frees everything."""
        with self.lock:
            self._users -= 1
            if self._users == 0 and self._device is not None:
                if self._scratch is not None:
                    self._scratch.close()
                self._device.close()
                self._device = self._scratch = None

    def scratch(self, size: int) -> DeviceMemory:
        """Return scratch memory of at least this size; smaller memory from earlier is freed."""
        if self._scratch is None or self._scratch.size < size:
            if self._scratch is not None:
                self._scratch.close()
                self._scratch = None
            self._scratch = self.device.allocate(padded(size))
        return self._scratch


@dataclass(frozen=True, kw_only=True, eq=False)
class _Constant:
    """An input that stays on the GPU between runs."""

    memory: DeviceMemory
    shape: Shape
    dtype: np.dtype[Any]
    size: int


class _Buffer:
    """One input or output, pinned and on the GPU, as large as the largest shape so far.

    Its address stays the same until it grows, whatever constants it holds, so that graphs
    captured with it stay valid.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._memory: DeviceMemory | None = None
        self._pinned: HostMemory | None = None
        self._held: _Constant | None = None

    @property
    def address(self) -> int:
        assert self._memory is not None, "a buffer is reserved before it is used"
        return self._memory.address

    def reserve(self, size: int) -> None:
        if self._pinned is not None and self._pinned.size >= size:
            return
        self.close()
        self._memory = self._device.allocate(padded(size))
        self._pinned = self._device.allocate_pinned(padded(size))

    def upload(self, array: npt.NDArray[Any], target: int | None = None) -> None:
        """Copy an array to the GPU: to the address `target`, or into this buffer."""
        assert self._pinned is not None, "a buffer is reserved before it is used"
        if target is None:
            self._held, target = None, self.address
        self._view(array.shape, array.dtype)[...] = array
        self._device.copy(target, self._pinned.address, array.nbytes)

    def hold(self, constant: _Constant) -> None:
        """Copy a constant into the buffer, unless the last run left it there."""
        if self._held is not constant:
            self._device.copy(self.address, constant.memory.address, constant.size)
            self._held = constant

    def start_download(self, size: int) -> None:
        assert self._pinned is not None, "a buffer is reserved before it is used"
        self._device.copy(self._pinned.address, self.address, size)

    def downloaded(self, shape: Shape, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        return self._view(shape, dtype).copy()

    def close(self) -> None:
        for memory in (self._memory, self._pinned):
            if memory is not None:
                memory.close()
        self._memory = self._pinned = self._held = None

    def _view(self, shape: Shape, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        assert self._pinned is not None, "a buffer is reserved before it is used"
        size = int(np.prod(shape)) * dtype.itemsize
        return self._pinned.array[:size].view(dtype).reshape(shape)


class _Prepared:
    """An execution context for one set of shapes, with its CUDA graph."""

    def __init__(self, context: EngineContext, outputs: tuple[str, ...], replay: Replay) -> None:
        self.outputs = {name: context.output_shape(name) for name in outputs}
        self.scratch_size = context.scratch_size()
        self._context = context
        self._replay = replay
        self._addresses: dict[str, int] = {}
        self._scratch: tuple[int, int] | None = None

    def enqueue(self, stream: int, addresses: Mapping[str, int], scratch: DeviceMemory) -> None:
        if self._scratch != (scratch.address, scratch.size):
            self._context.set_scratch(scratch.address, scratch.size)
            self._scratch = (scratch.address, scratch.size)
        if self._addresses != addresses:
            for name, address in addresses.items():
                self._context.set_address(name, address)
            self._addresses = dict(addresses)
        self._replay.enqueue(
            (scratch.address, *addresses.values()), lambda: self._context.enqueue(stream)
        )

    def close(self) -> None:
        self._replay.close()
        self._context.close()


class TensorRTEngine(Closing):
    """One engine on one GPU. Threads may share it; they take turns.

    The first run of a shape makes a context for it; the most recent four shapes are kept.

    Args:
        engine_file: The loaded engine, which closes with this one.
        record: Its record.
        component: Its inputs and outputs.
        session: Resources that it shares with others, entered once for this engine.
        bundle: Its bundle, for messages.
    """

    def __init__(
        self,
        engine_file: EngineFile,
        record: EngineRecord,
        component: ComponentRecord,
        session: Session,
        bundle: Path,
    ) -> None:
        self._engine_file: EngineFile | None = engine_file
        self._profiles = record.profiles
        self._component = component
        self._session = session
        self._bundle = bundle
        self._dtypes = {each.name: np.dtype(each.dtype) for each in component.outputs}
        self._buffers = {
            each.name: _Buffer(session.device) for each in component.inputs + component.outputs
        }
        self._prepared: dict[tuple[Shape, ...], _Prepared] = {}

    def run(self, inputs: Tensors) -> dict[str, npt.NDArray[Any]]:
        """Run once; see `ldm_runtime.backends.contract.Runner`."""
        return self._run(inputs, {})

    def bind(self, constants: Tensors) -> Runner:
        """Upload some inputs once; runs copy them within the GPU. See `Engine`."""
        with self._session.lock:
            self._open_engine_file()
            self._session.device.make_current()
            unknown = constants.keys() - {each.name for each in self._component.inputs}
            if unknown:
                raise BackendError(f"{self._component.name} takes no {', '.join(sorted(unknown))}")
            held = {name: self._upload(name, array) for name, array in constants.items()}
            self._session.device.synchronize()
            return _BoundEngine(self._run, held)

    def close(self) -> None:
        """Free everything, once runs in other threads have finished."""
        with self._session.lock:
            if self._engine_file is None:
                return
            self._session.device.make_current()
            for prepared in self._prepared.values():
                prepared.close()
            for buffer in self._buffers.values():
                buffer.close()
            self._engine_file.close()
            self._prepared.clear()
            self._engine_file = None
            self._session.leave()

    def _run(
        self, inputs: Tensors, constants: Mapping[str, _Constant]
    ) -> dict[str, npt.NDArray[Any]]:
        given: dict[str, Shaped] = {**constants, **inputs}
        with self._session.lock:
            engine_file = self._open_engine_file()
            check_inputs(self._component, self._profiles, given, self._bundle)
            device = self._session.device
            device.make_current()
            prepared = self._prepare(
                engine_file, {name: each.shape for name, each in given.items()}
            )
            scratch = self._session.scratch(prepared.scratch_size)
            sizes = self._reserve(given, prepared.outputs)
            for name in given:
                if name in inputs:
                    self._buffers[name].upload(inputs[name])
                else:
                    self._buffers[name].hold(constants[name])
            addresses = {name: buffer.address for name, buffer in self._buffers.items()}
            prepared.enqueue(device.stream, addresses, scratch)
            for name in prepared.outputs:
                self._buffers[name].start_download(sizes[name])
            device.synchronize()
            return {
                name: self._buffers[name].downloaded(shape, self._dtypes[name])
                for name, shape in prepared.outputs.items()
            }

    def _open_engine_file(self) -> EngineFile:
        if self._engine_file is None:
            raise BackendError(
                f"the {self._component.name} engine is closed; open the bundle again"
            )
        return self._engine_file

    def _reserve(self, given: Mapping[str, Shaped], outputs: Mapping[str, Shape]) -> dict[str, int]:
        sizes = {name: _size(each.shape, each.dtype) for name, each in given.items()}
        sizes |= {name: _size(shape, self._dtypes[name]) for name, shape in outputs.items()}
        for name, size in sizes.items():
            self._buffers[name].reserve(size)
        return sizes

    def _prepare(self, engine_file: EngineFile, shapes: Mapping[str, Shape]) -> _Prepared:
        """Return the context for these shapes, marked as the most recent."""
        ordered = {each.name: shapes[each.name] for each in self._component.inputs}
        key = tuple(ordered.values())
        prepared = self._prepared.pop(key, None)
        if prepared is None:
            while len(self._prepared) >= _MAX_SHAPES:
                self._prepared.pop(next(iter(self._prepared))).close()
            record = self._session.device.record if engine_file.records_graphs else None
            prepared = _Prepared(
                engine_file.new_context(ordered), tuple(self._dtypes), Replay(record)
            )
        self._prepared[key] = prepared
        return prepared

    def _upload(self, name: str, array: npt.NDArray[Any]) -> _Constant:
        buffer = self._buffers[name]
        buffer.reserve(array.nbytes)
        memory = self._session.device.allocate(padded(array.nbytes))
        buffer.upload(array, memory.address)
        return _Constant(memory=memory, shape=array.shape, dtype=array.dtype, size=array.nbytes)


class _BoundEngine:
    """An engine with some inputs on the GPU; they are freed with this object."""

    def __init__(
        self,
        run: Callable[[Tensors, Mapping[str, _Constant]], dict[str, npt.NDArray[Any]]],
        constants: Mapping[str, _Constant],
    ) -> None:
        self._run = run
        self._constants = constants

    def run(self, inputs: Tensors) -> dict[str, npt.NDArray[Any]]:
        """Run with `inputs` and the constants; see `ldm_runtime.backends.contract.Runner`."""
        return self._run(inputs, self._constants)


def _size(shape: Shape, dtype: np.dtype[Any]) -> int:
    return int(np.prod(shape)) * dtype.itemsize
