"""Graphs, inputs and outputs compared with the signatures of a component."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt

from ldm_runtime.backends.contract import Tensors, check_input_names
from ldm_runtime.bundle.manifest import ComponentRecord
from ldm_runtime.errors import BackendError, ShapeError
from ldm_runtime.specs.components import DYNAMIC_AXES, TensorSignature


def check_names(path: Path, found: Sequence[str], component: ComponentRecord) -> None:
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
