"""Backends, which run networks: their interface, and the choice of one that can run here.

A backend is a module with one record and three functions (see `Backend`). It is imported on first
use, so that a missing package only matters to the caller who asks for that backend.
"""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Literal, Protocol, cast

from ldm_runtime.backends.contract import (
    DEFAULT_OPTIONS,
    Abilities,
    Engine,
    EngineSource,
    RunOptions,
)
from ldm_runtime.bundle.manifest import Manifest
from ldm_runtime.errors import BackendError
from ldm_runtime.suggestions import did_you_mean
from ldm_runtime.version import extra

_LOGGER = logging.getLogger(__name__)


class Backend(Protocol):
    """A module that opens engines."""

    @property
    def ABILITIES(self) -> Abilities:  # noqa: N802  (a constant of the module)
        """Abilities of its engines."""
        ...

    def open_engine(self, source: EngineSource) -> Engine:
        """Open one component, ready to run.

        Raises:
            BackendError: It cannot run here.
            BundleError: A file is missing or altered.
        """
        ...

    def why_not(
        self,
        manifest: Manifest | None,
        bundle: Path | None = None,
        options: RunOptions = DEFAULT_OPTIONS,
    ) -> str | None:
        """Say why this machine cannot run a bundle (None: any bundle); None if it can.

        Args:
            manifest: The bundle's.
            bundle: Its folder, for backends that run more than the manifest describes.
            options: How its engines would run.
        """
        ...

    def version(self) -> str:
        """Return the version of the library that it uses, "" if that is not installed."""
        ...


@dataclass(frozen=True, kw_only=True)
class BackendEntry:
    """Location of a backend: its module, and the extra of `ldm-deploy` that installs its packages.

    Attributes:
        module: The module.
        extra: The extra.
        automatic: Whether "auto" may choose it; the others run only when asked for by name.
    """

    module: str
    extra: str
    automatic: bool = True


#: What becomes of adapters; a backend that takes live ones takes merged ones with them.
AdapterMode = Literal["none", "merged", "live"]

#: Every backend, in order of preference.
BACKENDS: Mapping[str, BackendEntry] = MappingProxyType(
    {
        "tensorrt": BackendEntry(module="ldm_runtime.backends.tensorrt", extra="tensorrt"),
        "cuda": BackendEntry(module="ldm_runtime.backends.onnxruntime.cuda", extra="cuda"),
        "openvino": BackendEntry(module="ldm_runtime.backends.openvino", extra="openvino"),
        "onnxruntime": BackendEntry(module="ldm_runtime.backends.onnxruntime.cpu", extra="cpu"),
        "tensorrt-ort": BackendEntry(
            module="ldm_runtime.backends.onnxruntime.tensorrt", extra="cuda", automatic=False
        ),
        "tensorrt-rtx-ort": BackendEntry(
            module="ldm_runtime.backends.onnxruntime.tensorrt_rtx", extra="cpu", automatic=False
        ),
    }
)

#: Other names for backends: the extra that installs the CPU's is called `cpu`.
BACKEND_ALIASES: Mapping[str, str] = MappingProxyType({"cpu": "onnxruntime"})

#: Environment variable with the name of the backend that "auto" means.
BACKEND_VARIABLE = "LDM_BACKEND"

#: Names of `Generator`'s argument; "auto" takes the best that can run here, "cpu" is "onnxruntime".
BackendName = Literal[
    "auto",
    "cpu",
    "tensorrt",
    "cuda",
    "openvino",
    "onnxruntime",
    "tensorrt-ort",
    "tensorrt-rtx-ort",
]

# Names that people try, for the suggestion alone: more than one backend could be meant.
_MEANT: Mapping[str, str] = MappingProxyType(
    {"gpu": "cuda", "ort": "onnxruntime", "ov": "openvino", "trt": "tensorrt"}
)


def get_backend(name: str, entries: Mapping[str, BackendEntry] = BACKENDS) -> Backend:
    """Import a backend.

    Raises:
        BackendError: There is no such backend, its package is not installed, or it does not load.
    """
    if name not in entries:
        names = ("auto", *entries, *BACKEND_ALIASES)
        hint = did_you_mean(_MEANT.get(name, name), names)
        raise BackendError(f"unknown backend {name!r}{hint}; choose {', '.join(names)}")
    entry = entries[name]
    try:
        module = import_module(entry.module)
    except ModuleNotFoundError as error:
        raise BackendError(
            f"backend {name!r} needs the package {error.name!r}, which is not installed; "
            f"install {extra(entry.extra)}"
        ) from error
    except (ImportError, OSError) as error:
        raise BackendError(f"backend {name!r} is installed but does not load: {error}") from error
    return cast("Backend", module)


def choose_backend(
    name: str,
    manifest: Manifest | None,
    entries: Mapping[str, BackendEntry] = BACKENDS,
    *,
    bundle: Path | None = None,
    options: RunOptions = DEFAULT_OPTIONS,
    adapters: AdapterMode = "none",
) -> str:
    """Return the name of the backend to use: that of `name`, or for "auto" the first that can run.

    The environment variable `LDM_BACKEND` says what "auto" means, where it is set. Passing over a
    backend that the bundle or the machine was prepared for is logged, with the reason.

    Args:
        name: "auto", or a name in `BACKENDS` or `BACKEND_ALIASES`.
        manifest: The bundle's; None is for any bundle.
        entries: The backends.
        bundle: The bundle's folder, for backends that run more than the manifest describes.
        options: How its engines would run.
        adapters: Whether they would run with changed weights, see `contract.WeightChanges`, or with
            branches in their graphs, see `contract.EngineSource`.

    Raises:
        BackendError: `name` cannot run this bundle here, or for "auto" none can.
    """
    if name == "auto":
        name = os.environ.get(BACKEND_VARIABLE) or name
    name = BACKEND_ALIASES.get(name, name)
    reason_against = partial(why_not, options=options, adapters=adapters)
    if name != "auto":
        if reason := reason_against(name, manifest, bundle, entries):
            raise BackendError(reason)
        return name
    reasons: dict[str, str] = {}
    for candidate in (name for name, entry in entries.items() if entry.automatic):
        reason = reason_against(candidate, manifest, bundle, entries)
        if reason is None:
            for passed_over, why in reasons.items():
                if _is_prepared(passed_over, manifest, entries):
                    _LOGGER.warning("%s; using %s", why, candidate)
            return candidate
        reasons[candidate] = reason
    raise BackendError(f"no backend can run here: {'; '.join(reasons.values())}")


def why_not(
    name: str,
    manifest: Manifest | None,
    bundle: Path | None = None,
    entries: Mapping[str, BackendEntry] = BACKENDS,
    *,
    options: RunOptions = DEFAULT_OPTIONS,
    adapters: AdapterMode = "none",
) -> str | None:
    """Say why a backend cannot run a bundle (None: any bundle) here; None if it can."""
    try:
        backend = get_backend(name, entries)
    except BackendError as error:
        return str(error)
    reason = backend.why_not(manifest, bundle, options)
    wanted, able = options.precision, backend.ABILITIES.precisions
    if reason is None and wanted is not None and wanted not in able:
        return f"{name} computes in {' or '.join(able)}, not in {wanted}"
    if reason is None and wanted == "int8":
        reason = _why_not_int8(manifest, adapters)
    if reason is None and adapters == "merged" and not backend.ABILITIES.takes_weights:
        return f"{name} has its weights built in, so that it takes no adapters; use another backend"
    if reason is None and adapters == "live" and not backend.ABILITIES.takes_branches:
        return f"{name} runs graphs as they are, so that it takes no live adapters; merge them"
    return reason


def _why_not_int8(manifest: Manifest | None, adapters: AdapterMode) -> str | None:
    """Say why a bundle cannot run in 8 bits."""
    if manifest is not None and manifest.quantization is None:
        return "this bundle has no graphs in 8 bits; make them with `ldm quantize`"
    if adapters != "none":
        return (
            "graphs in 8 bits are measured for the weights of the bundle alone, so that they take "
            "no adapters; use another precision"
        )
    return None


def _is_prepared(name: str, manifest: Manifest | None, entries: Mapping[str, BackendEntry]) -> bool:
    """Say whether the user would expect it to run."""
    try:
        return get_backend(name, entries).ABILITIES.is_prepared(manifest)
    except BackendError:
        return True
