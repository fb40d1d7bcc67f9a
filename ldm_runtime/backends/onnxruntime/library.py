"""ONNX Runtime itself, imported at this one place, because its telemetry can only be off before.

From 1.29 on it writes a device id below the home directory and looks for a collector on the
internet as soon as it is imported. `disable_telemetry_events` would come too late.
"""

import os
from importlib import import_module
from typing import Any

#: The environment variable of ONNX Runtime that decides; "1" is off, and "0" is on.
TELEMETRY_VARIABLE = "ORT_DISABLE_TELEMETRY"


def _load() -> Any:  # noqa: ANN401  (ships no types)
    """Import ONNX Runtime, with telemetry off unless the environment says otherwise."""
    if not os.environ.get(TELEMETRY_VARIABLE):
        os.environ[TELEMETRY_VARIABLE] = "1"
    return import_module("onnxruntime")


onnxruntime: Any = _load()
#: The compiled part, which defines the exceptions.
native: Any = import_module("onnxruntime.capi.onnxruntime_pybind11_state")
