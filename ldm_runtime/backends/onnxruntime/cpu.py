"""ONNX Runtime on the CPU: the backend that runs everywhere, and the reference for the others."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy.typing as npt

from ldm_runtime.backends.contract import (
    DEFAULT_OPTIONS,
    NO_TENSORS,
    Abilities,
    EngineSource,
    RunOptions,
    Tensors,
    always_prepared,
    lacks_graph,
)
from ldm_runtime.backends.denormals import flushed_denormals
from ldm_runtime.backends.host_engine import Compute, HostEngine, NativeErrors
from ldm_runtime.backends.onnxruntime.library import onnxruntime
from ldm_runtime.backends.onnxruntime.session import (
    NATIVE_ERRORS,
    SILENT,
    describe,
    take_weights,
)
from ldm_runtime.backends.processor_features import why_not_int8
from ldm_runtime.backends.processors import compute_threads
from ldm_runtime.backends.signatures import check_names
from ldm_runtime.bundle.low_rank_branches import with_branches
from ldm_runtime.bundle.manifest import ComponentRecord, Manifest
from ldm_runtime.errors import BackendError
from ldm_runtime.specs.model import ModelSpec

ABILITIES = Abilities(
    variant="fp32",
    limited_shapes=False,
    min_shared_samples=2,
    is_prepared=always_prepared,
    survives_fork=True,
    takes_weights=True,
    takes_branches=True,
    reduced=("int8",),
)

_ERRORS = NativeErrors(library="ONNX Runtime", classes=NATIVE_ERRORS, describe=describe)
_PROVIDERS = ("CPUExecutionProvider",)
#: Where a graph that comes as bytes finds its weights file.
_FOLDER_OF_WEIGHTS = "session.model_external_initializers_file_folder_path"


class OnnxRuntimeEngine(HostEngine):
    """One graph in ONNX Runtime's CPU provider.

    Denormals count as zero. Weights next to the graph are memory-mapped by ONNX Runtime. Any number
    of threads may call `run` at once.

    Args:
        path: The graph, which names its weights file relative to itself.
        component: Its inputs and outputs.
        sizes: Lengths of the fixed axes, from `specs.model.axis_sizes`.
        threads: Compute threads, the calling one included; None is one per physical core that this
            process may use.
        spinning: Whether idle threads wait by running in circles; see `RunOptions`.
        spec: The model, to refuse runs that this machine has no memory for; None refuses none.
        weights: Weights that replace those of the weights file, by name.
        graph: A graph to run in the place of the file's, over the same weights.

    Raises:
        BackendError: ONNX Runtime cannot load the graph, or there are more threads than
            `processors.MAX_THREADS`.
    """

    def __init__(  # noqa: PLR0913  (all but the graph by name)
        self,
        path: Path,
        component: ComponentRecord,
        sizes: Mapping[str, int],
        *,
        threads: int | None = None,
        spinning: bool = False,
        spec: ModelSpec | None = None,
        weights: Tensors = NO_TENSORS,
        graph: bytes | None = None,
    ) -> None:
        super().__init__(component, sizes, _ERRORS, spec)
        session_options = _session_options(compute_threads(threads), spinning=spinning)
        kept = take_weights(session_options, weights)
        session = _open_session(path, session_options, graph)
        check_names(path, [each.name for each in session.get_inputs()], component)
        self._loaded: _Loaded | None = _Loaded(session=session, weights=kept)

    def _opened(self) -> Compute | None:
        loaded = self._loaded
        return None if loaded is None else partial(self._compute, loaded)

    def _compute(self, loaded: "_Loaded", feed: Tensors) -> dict[str, npt.NDArray[Any]]:
        names = [signature.name for signature in self._component.outputs]
        run_options = onnxruntime.RunOptions()
        run_options.log_severity_level = SILENT
        outputs = loaded.session.run(names, dict(feed), run_options)
        return dict(zip(names, outputs, strict=True))

    def close(self) -> None:
        """Release the session and its weights, once the calls that are running have finished."""
        self._loaded = None


@dataclass(frozen=True, kw_only=True, eq=False)
class _Loaded:
    """A session, and what must live as long: a call keeps both when its engine is closed.

    Attributes:
        session: The session.
        weights: From `take_weights`.
    """

    session: Any
    weights: list[object]


def open_engine(source: EngineSource) -> OnnxRuntimeEngine:
    """Open one component of a bundle; see `ldm_runtime.backends.Backend`."""
    is_reduced = source.options.precision == "int8" and source.has_graph("int8")
    path = source.graph("int8" if is_reduced else "fp32")
    return OnnxRuntimeEngine(
        path,
        source.component,
        source.sizes,
        threads=source.threads,
        spinning=source.options.spinning,
        spec=source.manifest.spec,
        weights=source.changed_weights(path),
        graph=with_branches(path, source.branches) if source.branches else None,
    )


def why_not(
    manifest: Manifest | None,
    _bundle: Path | None = None,
    options: RunOptions = DEFAULT_OPTIONS,
) -> str | None:
    """Say why a bundle cannot run: without graphs for the CPU, or in 8 bits on some processors."""
    if reason := lacks_graph("onnxruntime", "fp32", manifest):
        return reason
    return why_not_int8() if options.precision == "int8" else None


def version() -> str:
    """Return ONNX Runtime's version."""
    return str(onnxruntime.__version__)


def _session_options(threads: int, *, spinning: bool) -> Any:  # noqa: ANN401  (ships no types)
    session_options = onnxruntime.SessionOptions()
    session_options.log_severity_level = SILENT
    session_options.intra_op_num_threads = threads
    session_options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
    session_options.add_session_config_entry("session.set_denormal_as_zero", "1")
    return session_options


def _open_session(path: Path, session_options: Any, graph: bytes | None) -> Any:  # noqa: ANN401
    if graph is not None:
        session_options.add_session_config_entry(_FOLDER_OF_WEIGHTS, str(path.parent))
    try:
        with flushed_denormals():
            return onnxruntime.InferenceSession(
                path if graph is None else graph, session_options, providers=list(_PROVIDERS)
            )
    except NATIVE_ERRORS as error:
        raise BackendError(f"ONNX Runtime cannot load {path}: {describe(error)}") from error
