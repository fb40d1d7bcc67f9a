"""The vendor's libraries, TensorRT and TensorRT-RTX: import, availability and logger.

Both share one API under two names, so that all other code is written once. Neither is imported
before it is needed. A process registers one logger with a library; every
`Builder`, `OnnxParser` and `Runtime` must be given that one, from `library_logger`.
"""

import logging
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from types import MappingProxyType, ModuleType
from typing import Any

from ldm_runtime.engines.records import BuilderName
from ldm_runtime.errors import EngineBuildError
from ldm_runtime.version import extra

_LOGGER = logging.getLogger(__name__)

#: Display names.
TITLES: Mapping[BuilderName, str] = MappingProxyType(
    {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
)
#: The extra of this distribution that brings each.
EXTRAS: Mapping[BuilderName, str] = MappingProxyType(
    {"tensorrt": extra("tensorrt"), "tensorrt_rtx": extra("tensorrt-rtx")}
)
#: Module names; wheels without their umbrella package have only the second one.
_MODULES: Mapping[BuilderName, tuple[str, ...]] = MappingProxyType(
    {
        "tensorrt": ("tensorrt", "tensorrt_bindings"),
        "tensorrt_rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings"),
    }
)
_LOWEST: Mapping[BuilderName, tuple[int, int]] = MappingProxyType(
    {"tensorrt": (10, 13), "tensorrt_rtx": (1, 6)}
)
#: Without a GPU the library reports the missing driver next to every other error.
_NOISE = "CUDA driver version is insufficient"


def import_builder(name: BuilderName) -> ModuleType:
    """Import TensorRT or TensorRT-RTX.

    Raises:
        EngineBuildError: It is not installed, does not load, or is too old.
    """
    hint = f"install {EXTRAS[name]}"
    faults = []
    for module_name in _MODULES[name]:
        try:
            module = import_module(module_name)
        except ModuleNotFoundError as error:
            faults.append(f"there is no package {error.name!r}")
            continue
        except (ImportError, OSError, RuntimeError) as error:
            faults.append(f"{module_name} does not load: {error}")
            continue
        version, lowest = str(module.__version__), _LOWEST[name]
        if tuple(int(part) for part in version.split(".")[:2]) < lowest:
            raise EngineBuildError(
                f"{TITLES[name]} {version} is too old, this needs {lowest[0]}.{lowest[1]}; {hint}"
            )
        return module
    raise EngineBuildError(f"{TITLES[name]} cannot be used: {faults[0]}; {hint}")


def why_not(name: BuilderName) -> str | None:
    """Say why a library cannot be used; None if it can."""
    try:
        import_builder(name)
    except EngineBuildError as error:
        return str(error)
    return None


@cache
def library_logger(module: ModuleType) -> Any:  # noqa: ANN401  (a class of the vendor's)
    """Return this process's logger for a library; it keeps errors until `take_errors`."""
    severities = (module.ILogger.ERROR, module.ILogger.INTERNAL_ERROR)

    class Logger(module.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: object, message: str) -> None:
            if severity in severities:
                self.errors.append(" ".join(message.split()))
            _LOGGER.debug("%s", message)

    return Logger()


def take_errors(module: ModuleType) -> list[str]:
    """Return and clear the errors that a library has logged, without repetitions."""
    logger = library_logger(module)
    errors, logger.errors = logger.errors, []
    return [each for each in dict.fromkeys(errors) if _NOISE not in each] or errors
