"""Helpers for ONNX Runtime sessions: native errors as one sentence, weights from memory."""

import re
from typing import Any

from ldm_runtime.backends.contract import Tensors
from ldm_runtime.backends.onnxruntime.library import native, onnxruntime

#: Log level at which ONNX Runtime prints nothing: its errors are raised.
SILENT = 4

#: Its exceptions share no base class but Exception; the set depends on the version.
NATIVE_ERRORS: tuple[type[Exception], ...] = (
    RuntimeError,
    ValueError,
    *(
        item
        for item in vars(native).values()
        if isinstance(item, type) and issubclass(item, Exception)
    ),
)

# Advice by the message of CUDA, cuDNN, TensorRT or the loader; the first match counts.
_ADVICE = (
    (r"out of memory|failed to allocate|ALLOC_FAILED|bad_alloc", "ask for fewer or smaller images"),
    (r"libnvinfer\.so\.(\d+)", r"run `pip install 'tensorrt-cu13==\1.*'`"),
    (
        r"cudnn|lib\w+\.so[.\d]*: cannot open shared object",
        "run `pip install 'onnxruntime-gpu[cuda,cudnn]'`",
    ),
    (r"driver version|insufficient driver|CUDA failure (?:35|803)\b", "update the NVIDIA driver"),
    (
        r"no kernel image|unsupported (?:gpu|device)|compute capability",
        "this package has no code for this GPU; use `--backend onnxruntime` or another version",
    ),
)


def take_weights(session_options: Any, weights: Tensors) -> list[object]:  # noqa: ANN401
    """Let a session load weights from memory instead of the weight file of its graph.

    Returns:
        What must live as long as the session.
    """
    values = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in weights.values()]
    if values:
        session_options.add_external_initializers(list(weights), values)
    return values


def describe(error: Exception) -> str:
    """Return the first line of an error, with advice where there is any."""
    text = str(error).strip()
    line = (text or type(error).__name__).splitlines()[0].rstrip(" .;")
    for pattern, advice in _ADVICE:
        if found := re.search(pattern, text, re.IGNORECASE):
            return f"{line}; {found.expand(advice)}"
    return line
