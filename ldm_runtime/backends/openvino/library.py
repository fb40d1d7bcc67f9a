"""OpenVINO itself, imported at this one place, because its telemetry can only be off before.

The package sends an event as soon as it is imported, and writes an id below the home directory,
wherever `openvino-telemetry` is installed, which it depends on. Where that cannot be imported, it
does neither.
"""

import sys
from functools import cache
from importlib import import_module
from threading import Lock
from typing import Any

from ldm_runtime.errors import BackendError

_TELEMETRY = "openvino_telemetry"
_LOCK = Lock()


@cache
def load_openvino() -> Any:  # noqa: ANN401  (its types are those of a compiled module)
    """Import OpenVINO without its telemetry, unless this process has imported it already.

    Raises:
        BackendError: It is not installed or does not load.
    """
    with _LOCK:
        known = {name: sys.modules[name] for name in (_TELEMETRY,) if name in sys.modules}
        sys.modules[_TELEMETRY] = None  # type: ignore[assignment]  # so that importing it fails
        try:
            return import_module("openvino")
        except (ImportError, OSError) as error:
            raise BackendError(f"OpenVINO does not load: {error}") from error
        finally:
            del sys.modules[_TELEMETRY]
            sys.modules.update(known)


@cache
def has_bf16() -> bool:
    """Return whether this processor computes in bf16."""
    core = load_openvino().Core()
    return "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def keeps_scores() -> bool:
    """Return whether all scores of an attention may be in memory at once.

    Where it can compute in bf16, as with AVX-512, the plugin makes one node of matrix product,
    softmax and matrix product, in either precision, which works block by block. What it does on
    other processors was not looked at.
    """
    return not has_bf16()


@cache
def processor_name() -> str:
    """Return the name of this machine's processor."""
    return str(load_openvino().Core().get_property("CPU", "FULL_DEVICE_NAME"))
