"""ONNX Runtime on the CPU: the backend that runs everywhere, and the reference for the others."""

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as native

from ldm_runtime.backends import BoundInputs, EngineSource, Runner, Tensors
from ldm_runtime.backends.denormals import flushed_denormals
from ldm_runtime.components import DYNAMIC_AXES, TensorSignature
from ldm_runtime.errors import BackendError, ShapeError
from ldm_runtime.manifest import ComponentRecord, Manifest, axis_sizes

_PROVIDERS = ("CPUExecutionProvider",)
_SILENT = 4  # errors are raised; ONNX Runtime need not also print them

# Its exceptions share no base class but Exception; which there are depends on the version.
_NATIVE_ERRORS: tuple[type[Exception], ...] = (
    RuntimeError,
    ValueError,
    *(
        item
        for item in vars(native).values()
        if isinstance(item, type) and issubclass(item, Exception)
    ),
)


class OnnxRuntimeEngine:
    """One graph in ONNX Runtime's CPU provider.

    Denormals count as zero. Weights beside the graph are memory-mapped by ONNX Runtime. Any number
    of threads may call `run` at once.

    Args:
        path: The graph; its weights lie where it says, relative to it.
        component: What it takes and gives.
        sizes: Lengths of the fixed axes, from `manifest.axis_sizes`.
        threads: Threads that compute, the calling one included; None is one a physical core.

    Raises:
        BackendError: ONNX Runtime cannot load the graph.
    """

    def __init__(
        self,
        path: Path,
        component: ComponentRecord,
        sizes: Mapping[str, int],
        *,
        threads: int | None = None,
    ) -> None:
        self._name = component.name
        self._inputs = {signature.name: signature for signature in component.inputs}
        self._outputs = [signature.name for signature in component.outputs]
        self._sizes = sizes
        self._session: Any = _open_session(path, threads)
        self._check_names(path)

    def run(self, inputs: Tensors) -> dict[str, npt.NDArray[Any]]:
        """Run once; see `ldm_runtime.backends.Runner`."""
        session = self._session
        if session is None:
            raise BackendError(f"the {self._name} engine is closed; open the bundle again")
        self._check_inputs(inputs)
        options = onnxruntime.RunOptions()
        options.log_severity_level = _SILENT
        feed = {name: np.ascontiguousarray(array) for name, array in inputs.items()}
        try:
            with flushed_denormals():
                outputs = session.run(self._outputs, feed, options)
        except _NATIVE_ERRORS as error:
            shapes = ", ".join(f"{name} {array.shape}" for name, array in feed.items())
            raise BackendError(
                f"ONNX Runtime failed in {self._name} with {shapes}: {_first_line(error)}; "
                "if memory ran out, ask for fewer or smaller images"
            ) from error
        return dict(zip(self._outputs, outputs, strict=True))

    def bind(self, constants: Tensors) -> Runner:
        """Fix some inputs; on the CPU there is nothing to upload."""
        return BoundInputs(runner=self, constants=constants)

    def close(self) -> None:
        """Let go of the session; calls that are running finish."""
        self._session = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _check_names(self, path: Path) -> None:
        found = sorted(each.name for each in self._session.get_inputs())
        if found != sorted(self._inputs):
            raise BackendError(
                f"{path} takes {', '.join(found)}, but the manifest says "
                f"{', '.join(sorted(self._inputs))}; export the bundle again"
            )

    def _check_inputs(self, inputs: Tensors) -> None:
        if inputs.keys() != self._inputs.keys():
            raise BackendError(
                f"{self._name} takes {', '.join(self._inputs)}; "
                f"it was given {', '.join(inputs) or 'nothing'}"
            )
        lengths = dict(self._sizes)
        for name, signature in self._inputs.items():
            _check_input(signature, inputs[name], lengths)


def open_engine(source: EngineSource) -> OnnxRuntimeEngine:
    """Open one component of a bundle; see `ldm_runtime.backends.Backend`."""
    return OnnxRuntimeEngine(
        source.graph("fp32"),
        source.component,
        axis_sizes(source.manifest.spec),
        threads=source.threads,
    )


def why_not(manifest: Manifest | None) -> str | None:
    """Say why a bundle cannot run: only one without graphs for the CPU cannot."""
    for component in manifest.components if manifest else ():
        if not any(graph.variant == "fp32" for graph in component.graphs):
            return f"onnxruntime needs an fp32 graph, which {component.name} lacks"
    return None


def version() -> str:
    """Return ONNX Runtime's version."""
    return str(onnxruntime.__version__)


def _open_session(path: Path, threads: int | None) -> Any:  # noqa: ANN401  (ships no types)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _SILENT
    options.intra_op_num_threads = threads or 0
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    try:
        with flushed_denormals():
            return onnxruntime.InferenceSession(path, options, providers=list(_PROVIDERS))
    except _NATIVE_ERRORS as error:
        raise BackendError(f"ONNX Runtime cannot load {path}: {_first_line(error)}") from error


def _check_input(
    signature: TensorSignature, array: npt.NDArray[Any], lengths: dict[str, int]
) -> None:
    """Compare one input with its signature; `lengths` learns the dynamic axes as they come."""
    if array.dtype != signature.dtype:
        raise BackendError(f"input {signature.name!r} must be {signature.dtype}, is {array.dtype}")
    expected = [lengths.get(axis, axis) for axis in signature.axes]
    fits = array.ndim == len(expected) and all(
        length == want if isinstance(want, int) else length > 0
        for length, want in zip(array.shape, expected, strict=True)
    )
    if not fits:
        raise ShapeError(signature.name, array.shape, expected)
    for axis, length in zip(signature.axes, array.shape, strict=True):
        if axis in DYNAMIC_AXES:
            lengths.setdefault(axis, length)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
