"""Images from the bundle next to this file: a Triton model of the Python backend.

Requests that Triton's dynamic batcher brings together share calls of the UNet, whatever their
prompts, seeds and steps. Source: github.com/triton-inference-server/python_backend, README.md.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ldm_runtime.generator import Generator
from ldm_runtime.triton.calls import Call, run

_VISIBLE = "CUDA_VISIBLE_DEVICES"
#: How options are read that are not text.
_READERS: Mapping[str, Callable[[str], object]] = MappingProxyType(
    {"threads": int, "trust_engines": "true".__eq__}
)


class TritonPythonModel:
    """The model; every instance is a process, in which Triton calls these methods."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open the bundle, on the GPU of this instance if it has one."""
        if args["model_instance_kind"] == "GPU":
            device, visible = args["model_instance_device_id"], os.environ.get(_VISIBLE)
            os.environ[_VISIBLE] = visible.split(",")[int(device)] if visible else device
        config = json.loads(args["model_config"])
        options: dict[str, Any] = {
            name: _READERS.get(name, str)(each["string_value"])
            for name, each in config["parameters"].items()
        }
        self._inputs = [each["name"] for each in config["input"]]
        self._max_batch = int(config["max_batch_size"])
        bundle = Path(args["model_repository"]) / args["model_version"] / "bundle"
        self._generator = Generator(bundle, **options)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Return a response per request, in order."""
        import triton_python_backend_utils as triton

        with self._generator.open_batch(max_batch=self._max_batch) as batch:
            calls = [Call(request, batch, self._inputs) for request in requests]
            run(calls, batch)
        return [call.response(triton) for call in calls]

    def finalize(self) -> None:
        """Close the bundle."""
        self._generator.close()
