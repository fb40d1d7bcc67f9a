"""Engine builds: one engine from one ONNX graph, by TensorRT or TensorRT-RTX through one API.

Networks are strongly typed: the precision of every layer is that of the graph, and nothing here
chooses another. The library returns None where it fails and logs the reason; here that is an
`EngineBuildError` with the logged message. Building needs neither torch nor onnx.
"""

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from ldm_runtime.engines.library import TITLES, import_builder, library_logger, take_errors
from ldm_runtime.engines.phases import PhaseTree
from ldm_runtime.engines.records import EngineBuildSpec
from ldm_runtime.engines.trust import read_own_file, write_own_file
from ldm_runtime.errors import EngineBuildError

_LOGGER = logging.getLogger(__name__)

#: The flag of an engine for every GPU of one compute capability; not a `BuilderFlag`.
HARDWARE_COMPATIBLE = "SAME_COMPUTE_CAPABILITY"

#: Errors are collected by the one logger of the process, so that builds take turns.
_TURN = threading.Lock()


def build_engine(
    graph: Path,
    build_spec: EngineBuildSpec,
    engine_file: Path,
    *,
    on_progress: Callable[[float], None] = lambda _: None,
    timing_cache: Path | None = None,
) -> None:
    """Build an engine and write its engine file.

    Ctrl-C takes effect when the builder next reports progress, which may be seconds later; nothing
    is written then.

    Args:
        graph: The ONNX file; its weights are found next to it.
        build_spec: The engine to build, and the builder.
        engine_file: The file to write.
        on_progress: Called with the fraction that is done, from another thread.
        timing_cache: File of measured kernel times, for TensorRT; read if it exists, then updated,
            in a folder that no one else may write to.

    Raises:
        EngineBuildError: The builder is not installed, or cannot parse or build the graph.
    """
    module = import_builder(build_spec.builder)
    with _TURN:
        take_errors(module)
        try:
            builder = module.Builder(library_logger(module))
        except (RuntimeError, TypeError) as error:  # pybind's errors for a null pointer
            raise _failure(module, build_spec, graph, str(error)) from error
        flags = 1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        network = builder.create_network(flags)
        parser = module.OnnxParser(network, library_logger(module))
        if not parser.parse_from_file(str(graph)):
            raise _failure(module, build_spec, graph, *_parser_errors(parser))
        config = builder.create_builder_config()
        _configure(module, config, build_spec)
        _add_profile(module, builder, config, build_spec, graph)
        cache = _attach_timing_cache(config, timing_cache) if timing_cache else None
        monitor = _monitor(module, on_progress)
        config.progress_monitor = monitor
        memory = _in_a_thread(lambda: builder.build_serialized_network(network, config), monitor)
        if memory is None:
            raise _failure(module, build_spec, graph)
        engine_file.write_bytes(memory)
        if timing_cache and cache is not None:
            _keep(cache, timing_cache)


def _configure(module: ModuleType, config: Any, build_spec: EngineBuildSpec) -> None:  # noqa: ANN401
    for flag in build_spec.flags:
        if flag == HARDWARE_COMPATIBLE:
            level = module.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY
            config.hardware_compatibility_level = level
        else:
            config.set_flag(module.BuilderFlag.__members__[flag])
    if build_spec.builder == "tensorrt_rtx":
        config.num_compute_capabilities = len(build_spec.targets)
        for index, target in enumerate(build_spec.targets):
            capability = module.ComputeCapability.__members__[target.upper()]
            config.set_compute_capability(capability, index)


def _add_profile(
    module: ModuleType,
    builder: Any,  # noqa: ANN401  (classes of the vendor's)
    config: Any,  # noqa: ANN401
    build_spec: EngineBuildSpec,
    graph: Path,
) -> None:
    profile = builder.create_optimization_profile()
    try:
        for record in build_spec.profiles:
            profile.set_shape(record.input, record.min, record.opt, record.max)
    except ValueError as error:
        raise _failure(module, build_spec, graph, str(error)) from error
    if config.add_optimization_profile(profile) < 0:
        raise _failure(module, build_spec, graph)


def _attach_timing_cache(config: Any, path: Path) -> Any:  # noqa: ANN401  (classes of the vendor's)
    """Give the builder the cache at `path`, or an empty one if that is of another machine."""
    data = read_own_file(path, "kernels are timed again")
    cache = config.create_timing_cache(data)
    if cache is None or not config.set_timing_cache(cache, False):
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache


def _keep(cache: Any, path: Path) -> None:  # noqa: ANN401
    try:
        write_own_file(path, bytes(cache.serialize()))
    except OSError as error:
        _LOGGER.info("kernel times are not saved for the next build: %s", error)


def _monitor(module: ModuleType, on_progress: Callable[[float], None]) -> Any:  # noqa: ANN401
    class Monitor(module.IProgressMonitor):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.is_cancelled = False
            self._tree = PhaseTree()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._tree.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._tree.step(phase_name, step)
            on_progress(self._tree.fraction)
            return not self.is_cancelled

        def phase_finish(self, phase_name: str) -> None:
            self._tree.finish(phase_name)

    return Monitor()


def _in_a_thread(build: Callable[[], Any], monitor: Any) -> Any:  # noqa: ANN401
    """Call `build` where no signal reaches it, and wait for it even when interrupted.

    An exception that a signal raises inside a callback would have to cross the library's frames.
    """
    done = threading.Event()
    results: list[Any] = []
    faults: list[BaseException] = []

    def work() -> None:
        try:
            results.append(build())
        except BaseException as error:  # noqa: BLE001  (raised again below)
            faults.append(error)
        finally:
            done.set()

    try:
        threading.Thread(target=work, name="engine build").start()
        done.wait()
    except RuntimeError:  # no thread could be started, so there is none to wait for
        done.set()
        raise
    finally:
        monitor.is_cancelled = True  # has no effect on a build that is done
        done.wait()
    if faults:
        raise faults[0]
    return results[0]


def _parser_errors(parser: Any) -> list[str]:  # noqa: ANN401  (a class of the vendor's)
    errors = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        node = f"node {error.node_name()!r} ({error.node_operator()}): "
        description = " ".join(error.desc().split())
        errors.append(f"{node if error.node_name() else ''}{error.code()}: {description}")
    return errors


def _failure(
    module: ModuleType, build_spec: EngineBuildSpec, graph: Path, *reasons: str
) -> EngineBuildError:
    """Return the error for a failure, with the messages of the parser or else the logger."""
    logged = take_errors(module)
    told = "; ".join(reasons or logged) or "it gave no reason"
    library = f"{TITLES[build_spec.builder]} {build_spec.builder_version}"
    return EngineBuildError(
        f"{library} cannot build the {build_spec.component} engine from {graph}: {told}"
    )
