"""OpenVINO as a backend of CPUs: in fp32, in bf16 where the processor has it, or in 8 bits.

Its package is optional, so that it is imported only where an engine is opened or asked about.
"""

from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ldm_runtime.backends.contract import (
    DEFAULT_OPTIONS,
    Abilities,
    EngineSource,
    Precision,
    RunOptions,
    lacks_graph,
)
from ldm_runtime.backends.processor_features import why_not_int8
from ldm_runtime.backends.processors import compute_threads
from ldm_runtime.bundle.manifest import GraphVariant, Manifest
from ldm_runtime.errors import BackendError
from ldm_runtime.version import extra

if TYPE_CHECKING:
    from ldm_runtime.backends.openvino.engine import OpenVinoEngine
    from ldm_runtime.backends.openvino.model_cache import ModelCache


#: Bytes of weights from which a network is compiled in every process: reading what was compiled is
#: hardly faster then (1.6 s after 1.9 s for Stable Diffusion 1.5's UNet), takes as much memory more
#: as it has weights, since OpenVINO reads those too for its key, and as much of the disk. A graph
#: in 8 bits is kept whatever its size: it takes 24 s to compile that UNet's, 3 s to read it.
_LARGE_BYTES = 1_000_000_000
#: Compiled shapes of a component that stay in memory, at least and at most, and bytes of weights
#: that they may have together. Each has its own copy, in the order and precision of its kernels.
_FEWEST_SHAPES, _MOST_SHAPES, _MOST_BYTES = 2, 16, 1_000_000_000


def _is_installed(_manifest: Manifest | None = None) -> bool:
    return find_spec("openvino") is not None


def _fastest() -> Precision:
    from ldm_runtime.backends.openvino.library import has_bf16

    return "bf16" if has_bf16() else "fp32"


def kept_shapes(weights_bytes: int) -> int:
    """Return how many compiled shapes of a component stay in memory.

    Requests that share calls of a network differ in their number from call to call, so that fewer
    would be compiled again and again.

    Args:
        weights_bytes: Size of its weights, see `Manifest.compiled_bytes`.
    """
    return max(_FEWEST_SHAPES, min(_MOST_SHAPES, _MOST_BYTES // max(1, weights_bytes)))


ABILITIES = Abilities(
    variant="fp32",
    limited_shapes=False,
    min_shared_samples=1,
    is_prepared=_is_installed,
    takes_weights=True,
    takes_branches=True,
    kept_shapes=kept_shapes,
    reduced=("bf16", "int8"),
    fastest=_fastest,
)


def open_engine(source: EngineSource) -> "OpenVinoEngine":
    """Open one component of a bundle; see `ldm_runtime.backends.Backend`."""
    from ldm_runtime.backends.openvino.engine import Compilation, OpenVinoEngine

    component = source.component
    precision, variant = ABILITIES.precision_of(source.options), _variant(source)
    path = source.graph(variant)
    if precision == "int8":  # what is not in 8 bits
        precision = _fastest()
    compiled_bytes = source.manifest.compiled_bytes(component.name, variant)
    is_cached = variant == "int8" or compiled_bytes <= _LARGE_BYTES
    compilation = Compilation(
        precision=precision,
        threads=source.threads,
        cache=_cache(source, precision, variant) if is_cached else None,
        kept=kept_shapes(compiled_bytes),
    )
    return OpenVinoEngine(
        path,
        component,
        source.sizes,
        compilation,
        spec=source.manifest.spec,
        weights=source.changed_weights(path),
        branches=source.branches,
    )


def _variant(source: EngineSource) -> GraphVariant:
    """Return the graph of a component that computes in the precision that was asked for."""
    return "int8" if source.options.precision == "int8" and source.has_graph("int8") else "fp32"


def _cache(
    source: EngineSource, precision: Precision, variant: GraphVariant
) -> "ModelCache | None":
    """Return the compiled models on disk; without any, what is not compared with its hashes."""
    from ldm_runtime.backends.openvino.library import load_openvino, processor_name
    from ldm_runtime.backends.openvino.model_cache import model_cache

    if not source.check_hashes:
        return None
    threads = str(compute_threads(source.threads))
    settings = [load_openvino().__version__, processor_name(), precision, threads]
    return model_cache([*settings, *source.hashes(variant)])


def why_not(
    manifest: Manifest | None,
    _bundle: Path | None = None,
    options: RunOptions = DEFAULT_OPTIONS,
) -> str | None:
    """Say why a bundle cannot run: without the graphs, the package or the precision."""
    if reason := lacks_graph("openvino", "fp32", manifest):
        return reason
    if not _is_installed():
        return (
            "backend 'openvino' needs the package 'openvino', which is not installed; "
            f"install {extra('openvino')}"
        )
    from ldm_runtime.backends.openvino.library import has_bf16

    try:
        can_reduce = has_bf16()
    except BackendError as error:
        return str(error)
    if options.precision == "bf16" and not can_reduce:
        return "this processor has no bf16; use --precision fp32"
    return why_not_int8() if options.precision == "int8" else None


def version() -> str:
    """Return OpenVINO's version, "" if it is not installed."""
    try:
        return version_of("openvino")
    except PackageNotFoundError:
        return ""
