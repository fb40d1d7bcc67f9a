"""The training schedule: the noise level of every training timestep, and back."""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

#: Increasing noise levels, indexed by the training timestep, shape (num_train_timesteps,).
SigmaTable = npt.NDArray[np.float64]

# diffusers' Euler puts it in the place of the zero; sigma is then 4096.
_SMALLEST_ALPHA = 2.0**-24


def training_sigmas(alphas_cumprod: Sequence[float]) -> SigmaTable:
    """Return the noise level sqrt((1 - a) / a) of every training timestep, increasing.

    Raises:
        ValueError: `alphas_cumprod` has fewer than two values, a value outside (0, 1), or does
            not decrease.
    """
    alphas = _checked(alphas_cumprod)
    return np.sqrt((1 - alphas) / alphas)


def timestep_of(sigma: float, training_sigmas: SigmaTable) -> float:
    """Return the training timestep of a noise level.

    A whole number for the values of `training_sigmas`, which increase; interpolated in log sigma
    between them; the first or last outside them. Source: k-diffusion's `sigma_to_t`.
    """
    above = int(np.searchsorted(training_sigmas, sigma))
    if above == len(training_sigmas):
        return float(above - 1)
    if above == 0 or training_sigmas[above] == sigma:
        return float(above)
    low, high = float(training_sigmas[above - 1]), float(training_sigmas[above])
    return above - 1 + math.log(sigma / low) / math.log(high / low)


def earlier_sigma(training_sigmas: SigmaTable, sigma: float, share: float) -> float:
    """Return the noise level at a share, 0 to 1, of a noise level's training timestep.

    The product is cut off to a whole timestep. Source: diffusers' `TCDScheduler.step`.
    """
    return float(training_sigmas[math.floor(share * timestep_of(sigma, training_sigmas))])


def timestep_at(training_sigmas: SigmaTable, share: float) -> int:
    """Return the training timestep at which a share, 0 to 1, of the noise schedule is denoised.

    Source: diffusers' `StableDiffusionXLPipeline`, `denoising_end`.
    """
    return round(len(training_sigmas) - share * len(training_sigmas))


def steps_until(training_sigmas: SigmaTable, share: float, sigmas: Sequence[float]) -> int:
    """Return how many steps of a run start within a share, 0 to 1, of the noise schedule.

    Args:
        training_sigmas: From the function of that name.
        share: See `timestep_at`.
        sigmas: Noise levels of the run, decreasing; one more than there are steps.
    """
    last = timestep_at(training_sigmas, share)
    return sum(timestep_of(sigma, training_sigmas) >= last for sigma in sigmas[:-1])


def rescale_zero_terminal_snr(alphas_cumprod: Sequence[float]) -> tuple[float, ...]:
    """Shift and stretch sqrt(alphas_cumprod) so that the last timestep is nothing but noise.

    A model must have been trained for it, with v-prediction. The last value becomes not 0 but
    2**-24, as in diffusers' Euler, so that its sigma is 4096 and not infinite; or half of the
    value before it where that is less, so that the values still decrease.

    Source: Lin et al. 2023 (arXiv:2305.08891), algorithm 1.

    Raises:
        ValueError: As in `training_sigmas`.
    """
    signal = np.sqrt(_checked(alphas_cumprod))
    stretched = (signal - signal[-1]) * (signal[0] / (signal[0] - signal[-1]))
    alphas = stretched**2
    return tuple(without_infinite_noise(alphas).tolist())


def without_infinite_noise(alphas_cumprod: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return a schedule (T,), T > 1, that ends in 0 with a last value that has a finite sigma.

    It is 2**-24, or half of the value before it where that is less.
    """
    alphas = alphas_cumprod.copy()
    alphas[-1] = min(_SMALLEST_ALPHA, alphas[-2] / 2)
    return alphas


def _checked(alphas_cumprod: Sequence[float]) -> npt.NDArray[np.float64]:
    alphas = np.asarray(alphas_cumprod, dtype=np.float64)
    if alphas.ndim != 1 or alphas.size < 2:
        raise ValueError(f"alphas_cumprod must be a list of two or more, got shape {alphas.shape}")
    outside = np.flatnonzero(~((alphas > 0) & (alphas < 1)))
    if outside.size:
        index = int(outside[0])
        raise ValueError(
            f"alphas_cumprod[{index}] is {float(alphas[index])}, but every value must lie between "
            "0 and 1, both excluded"
        )
    rising = np.flatnonzero(np.diff(alphas) >= 0)
    if rising.size:
        index = int(rising[0]) + 1
        raise ValueError(
            f"alphas_cumprod must decrease, but value {index} is {float(alphas[index])} "
            f"after {float(alphas[index - 1])}"
        )
    return alphas
