"""The noise schedule of a checkpoint's training: its own buffers, or its family's formula."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from ldm_export.checkpoint.file_fields import StatedSchedule
from ldm_export.detection.features import Tensors
from ldm_export.errors import WeightsError
from ldm_runtime.schedules import rescale_zero_terminal_snr, without_infinite_noise

_EXACT_TYPES = frozenset({"float32", "float64"})
#: Largest error of values below 1 after rounding to a type that is too coarse to be used itself.
_ROUNDING: Mapping[str, float] = MappingProxyType(
    {
        "float16": 2.0**-12,
        "bfloat16": 2.0**-9,
        "float8_e4m3fn": 2.0**-5,
        "float8_e5m2": 2.0**-4,
    }
)
#: Largest last value of a schedule of which such a type may make 0: half of the smallest number of
#: the type, or else what is taken in place of 0.
_VANISHING: Mapping[str, float] = MappingProxyType(
    {
        "float16": 2.0**-24,
        "bfloat16": 2.0**-24,
        "float8_e4m3fn": 2.0**-10,
        "float8_e5m2": 2.0**-17,
    }
)
_SAME = 1e-5

Float64Array = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class ScheduleFormula:
    """Betas linear in their square roots, and the source of their numbers.

    Attributes:
        linear_start: First beta.
        linear_end: Last beta.
        num_train_timesteps: Number of betas.
        source: "config", "file" or "family".
    """

    linear_start: float
    linear_end: float
    num_train_timesteps: int
    source: str

    def __str__(self) -> str:
        return (
            f"scaled-linear from {self.linear_start:g} to {self.linear_end:g} in "
            f"{self.num_train_timesteps} steps"
        )

    def alphas_cumprod(self) -> Float64Array:
        """Return the cumulative products of 1 - beta, computed in float64."""
        roots = np.linspace(
            self.linear_start**0.5, self.linear_end**0.5, self.num_train_timesteps, dtype=np.float64
        )
        return np.cumprod(1.0 - roots**2, dtype=np.float64)


@dataclass(frozen=True, kw_only=True)
class ListedBetas:
    """Betas that a configuration lists one by one, or a scheduler that is not scaled-linear.

    Attributes:
        betas: One value between 0 and 1 per training timestep.
        source: "config" or "file".
    """

    betas: tuple[float, ...]
    source: str = "config"

    def __str__(self) -> str:
        return f"{len(self.betas)} listed betas from {self.betas[0]:g} to {self.betas[-1]:g}"

    def alphas_cumprod(self) -> Float64Array:
        """Return the cumulative products of 1 - beta, computed in float64."""
        return np.cumprod(1.0 - np.array(self.betas), dtype=np.float64)


#: Buffers that hold a schedule, the first of which counts, and alphas_cumprod from each. The last
#: is of Stability's generative-models, and of files merged with one of theirs.
_BUFFERS: Mapping[str, Callable[[Float64Array], Float64Array]] = MappingProxyType(
    {
        "alphas_cumprod": lambda values: values,
        "betas": lambda values: np.cumprod(1.0 - values, dtype=np.float64),
        "denoiser.sigmas": lambda values: 1.0 / (1.0 + values**2),
    }
)

#: A schedule that is computed and not stored in the checkpoint.
ComputedSchedule = ScheduleFormula | ListedBetas


@dataclass(frozen=True, kw_only=True)
class NoiseSchedule:
    """A schedule and whether it had to be assumed.

    Attributes:
        alphas_cumprod: One value per training timestep.
        formula: The formula it was computed from, or None if the values are the checkpoint's own.
        ends_in_noise: Whether the checkpoint's own values end at 0, in place of which a last value
            above 0 is taken that samplers can divide by; with a formula, the values are the
            formula's so rescaled.
    """

    alphas_cumprod: tuple[float, ...]
    formula: ComputedSchedule | None
    ends_in_noise: bool = False


def computed_schedule(stated: StatedSchedule) -> ComputedSchedule:
    """Return the schedule that a scheduler's configuration states."""
    if stated.betas is not None:
        return ListedBetas(betas=stated.betas, source="file")
    return ScheduleFormula(
        linear_start=stated.linear_start,
        linear_end=stated.linear_end,
        num_train_timesteps=stated.num_train_timesteps,
        source="file",
    )


def read_schedule(
    tensors: Tensors, formula: ComputedSchedule, *, may_be_rescaled: bool = False
) -> NoiseSchedule:
    """Return the schedule in a checkpoint's buffers, or `formula`'s if it has none.

    Buffers in half precision or 8 bits are too coarse to sample with (1 - 0.00085 has no neighbour
    nearer than 0.0005), so they only confirm the formula.

    Args:
        tensors: The checkpoint's.
        formula: The schedule that is stated, or usual.
        may_be_rescaled: Whether it is stated that training went down to nothing but noise. Then
            coarse buffers that end at 0 may confirm the formula rescaled to end there.

    Raises:
        WeightsError: The buffers are not a decreasing schedule, contradict a formula that comes
            from a configuration or that has to replace them, or are coarse and end in nothing but
            noise, which is not stated.
    """
    name = next((name for name in _BUFFERS if name in tensors), None)
    if name is None:
        computed = tuple(formula.alphas_cumprod().tolist())
        return NoiseSchedule(alphas_cumprod=computed, formula=formula)
    dtype = tensors[name].dtype
    if dtype not in _EXACT_TYPES | _ROUNDING.keys():
        raise WeightsError(f"{name} is stored as {dtype}; floating-point numbers were expected")
    own = _own_values(name, tensors[name].numpy())
    if dtype not in _EXACT_TYPES:
        return _confirmed(name, dtype, own, formula, may_be_rescaled=may_be_rescaled)
    ends_in_noise = own.size > 1 and own[-1] == 0  # trained for zero terminal SNR
    if ends_in_noise:
        own = without_infinite_noise(own)
    _check(name, own)
    if formula.source == "config" and not ends_in_noise:
        _compare(name, own, formula.alphas_cumprod(), formula, _SAME)
    alphas = tuple(own.tolist())
    return NoiseSchedule(alphas_cumprod=alphas, formula=None, ends_in_noise=bool(ends_in_noise))


def _confirmed(
    name: str, dtype: str, own: Float64Array, formula: ComputedSchedule, *, may_be_rescaled: bool
) -> NoiseSchedule:
    """Return the schedule of the formula, which values of a coarse type confirm."""
    expected = formula.alphas_cumprod()
    ends_in_noise = bool(own.size > 1 and own[-1] == 0 and expected[-1] > _VANISHING[dtype])
    if ends_in_noise and not may_be_rescaled:
        raise WeightsError(
            f"{name}, stored as {dtype}, ends at 0, nothing but noise, but the {formula.source}'s "
            f"schedule ({formula}) ends at {expected[-1]:g}; state with --zero-terminal-snr that "
            "it was rescaled for training, or give a --config with the right linear_start and "
            "linear_end"
        )
    if ends_in_noise:
        expected = np.array(rescale_zero_terminal_snr(expected.tolist()))
    # Betas are multiplied, so that their errors add up.
    tolerance = _ROUNDING[dtype] * (2 if name == "betas" else 1) + _SAME
    _compare(name, own, expected, formula, tolerance)
    return NoiseSchedule(
        alphas_cumprod=tuple(expected.tolist()), formula=formula, ends_in_noise=ends_in_noise
    )


def _own_values(name: str, stored: npt.NDArray[Any]) -> Float64Array:
    if stored.ndim != 1 or not stored.size:
        raise WeightsError(f"{name} has shape {stored.shape}; one value per timestep was expected")
    values = stored.astype(np.float64)
    return _BUFFERS[name](values)


def _check(name: str, values: Float64Array) -> None:
    # Written so that NaN fails.
    if not (np.all(np.diff(values) < 0) and 0 < values[-1] <= values[0] < 1):
        raise WeightsError(
            f"{name} is not a noise schedule: alphas_cumprod must decrease strictly between 1 and "
            f"0, but goes from {values[0]:g} to {values[-1]:g}"
        )


def _compare(
    name: str,
    own: Float64Array,
    expected: Float64Array,
    formula: ComputedSchedule,
    tolerance: float,
) -> None:
    if own.shape != expected.shape:
        raise WeightsError(
            f"{name} has {own.size} timesteps, but the {formula.source}'s schedule is {formula}"
        )
    error = np.abs(own - expected)
    if not np.max(error) <= tolerance:
        worst = int(np.argmax(error))
        raise WeightsError(
            f"{name} contradicts the {formula.source}'s schedule ({formula}): at timestep {worst} "
            f"alphas_cumprod is {own[worst]:.6f} and not {expected[worst]:.6f}; give a --config "
            "with the right linear_start and linear_end"
        )
