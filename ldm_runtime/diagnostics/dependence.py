"""Inputs that a network ignores: a sign that its weights are zeros, or were never trained.

Every other check compares a network with itself, and zeros are equal to zeros.
"""

import logging

import numpy as np
import numpy.typing as npt

from ldm_runtime.backends.contract import Runner, Tensors
from ldm_runtime.specs.model import ModelSpec, timestep_range, value_counts

_LOGGER = logging.getLogger(__name__)

_SAME = 1e-6  # of the largest output; a trained network differs by far more


def ignored_inputs(
    name: str, network: Runner, inputs: Tensors, outputs: Tensors, spec: ModelSpec
) -> tuple[str, ...]:
    """Return the inputs that a network's outputs do not depend on; it runs once per input.

    Args:
        name: The component.
        network: The network.
        inputs: Arrays by input name.
        outputs: Its outputs for them.
        spec: The model.
    """
    counts = value_counts(spec, name)
    ignored = []
    for key, array in inputs.items():
        if key in counts:
            other = (array + 1) % counts[key]
        elif key == "timesteps":
            other = np.asarray(sum(timestep_range(spec)) - array, dtype=array.dtype)
        else:
            other = -array
        if np.array_equal(other, array):  # there is only one value
            continue
        if _are_same(network.run({**inputs, key: other}), outputs):
            ignored.append(key)
    return tuple(ignored)


def warn_of_ignored_inputs(
    name: str, network: Runner, inputs: Tensors, outputs: Tensors, spec: ModelSpec
) -> None:
    """Log one warning that names the inputs that a network ignores, if there are any."""
    ignored = ignored_inputs(name, network, inputs, outputs, spec)
    if ignored:
        _LOGGER.warning(
            "the output of the %s does not depend on its %s, so that its weights are probably "
            "zeros or were never trained; the images will not be what is asked for",
            name,
            " and ".join(ignored),
        )


def _are_same(outputs: Tensors, others: Tensors) -> bool:
    return all(_is_same(outputs[name], others[name]) for name in others)


def _is_same(output: npt.NDArray[np.generic], other: npt.NDArray[np.generic]) -> bool:
    first, second = output.astype(np.float64), other.astype(np.float64)
    with np.errstate(invalid="ignore"):  # infinity less infinity, which is not the same
        return bool(np.abs(first - second).max() <= _SAME * np.abs(second).max())
