"""Helpers for ONNX Runtime sessions: input checks, and native errors as one sentence."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt

from ldm_runtime.backends.contract import Tensors, check_input_names
from ldm_runtime.backends.onnxruntime.library import native
from ldm_runtime.bundle.manifest import ComponentRecord
from ldm_runtime.errors import BackendError, ShapeError
from ldm_runtime.specs.components import DYNAMIC_AXES, TensorSignature

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


def describe(error: Exception) -> str:
    """Return the first line of an error, with advice where there is any."""
    text = str(error).strip()
    line = (text or type(error).__name__).splitlines()[0].rstrip(" .;")
    for pattern, advice in _ADVICE:
        if found := re.search(pattern, text, re.IGNORECASE):
            return f"{line}; {found.expand(advice)}"
    return line


def check_names(path: Path, found: list[str], component: ComponentRecord) -> None:
    """Compare the inputs of a graph with the manifest.

    Raises:
        BackendError: They differ.
    """
    expected = sorted(each.name for each in component.inputs)
    if sorted(found) != expected:
        raise BackendError(
            f"{path} takes {', '.join(sorted(found))}, but the manifest says "
            f"{', '.join(expected)}; export the bundle again"
        )


def check_inputs(
    component: ComponentRecord, sizes: Mapping[str, int], inputs: Tensors
) -> dict[str, int]:
    """Compare inputs with a component's signatures.

    Args:
        component: The component that takes them.
        sizes: Lengths of the fixed axes.
        inputs: All of them.

    Returns:
        Lengths of the fixed axes and of the dynamic ones that the inputs have.

    Raises:
        BackendError: An input is missing, unknown or of another type.
        ShapeError: A shape does not fit.
    """
    check_input_names(component, inputs)
    lengths = dict(sizes)
    for signature in component.inputs:
        _check_input(signature, inputs[signature.name], lengths)
    return lengths


def check_outputs(component: ComponentRecord, lengths: Mapping[str, int], outputs: Tensors) -> None:
    """Compare outputs with a component's signatures.

    Args:
        component: The component that gave them.
        lengths: Lengths of axes that are known, such as those of its inputs.
        outputs: All of them.

    Raises:
        BackendError: A type or a shape does not fit: the graph is not that of the component.
    """
    for signature in component.outputs:
        array = outputs[signature.name]
        expected = [lengths.get(axis, axis) for axis in signature.axes]
        fits = array.dtype == signature.dtype and array.ndim == len(expected)
        if not fits or any(
            isinstance(want, int) and length != want
            for length, want in zip(array.shape, expected, strict=True)
        ):
            raise BackendError(
                f"the graph of {component.name} gives {signature.name} as {array.dtype} of shape "
                f"{'x'.join(map(str, array.shape)) or 'none'}, not {signature.dtype} of "
                f"{'x'.join(map(str, expected))}; export the bundle again"
            )


def _check_input(
    signature: TensorSignature, array: npt.NDArray[Any], lengths: dict[str, int]
) -> None:
    """Compare one input with its signature; the dynamic axes are added to `lengths`."""
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
