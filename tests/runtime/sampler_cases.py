"""What the tests of samplers share: a Gaussian whose ideal denoiser is known, and noise."""

import math
from functools import partial

import numpy as np

from ldm_runtime.samplers import SAMPLERS
from ldm_runtime.schedules import earlier_sigma, training_sigmas

DATA_MEAN, DATA_STD = 1.5, 0.5
UNEVEN = [10.0, 4.0, 3.0, 0.5, 0.2, 0.0]  # neighbouring steps differ in log sigma
SHAPE = (2, 2, 2, 2)
#: The training sigmas of Stable Diffusion, for a sampler that goes by timesteps.
TABLE = training_sigmas(np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).tolist())

#: Samplers that can do without noise: those with an `eta`, and those that never have any.
DETERMINISTIC = [
    name for name, record in SAMPLERS.items() if record.uses_eta or not record.default_eta
]
#: Samplers with noise, and shares of it to try.
STOCHASTIC = [
    (name, eta)
    for name, record in SAMPLERS.items()
    for eta in (0.5, 1.0)
    if record.uses_eta or record.default_eta == eta
]
#: Samplers whose polynomial goes on to sigma 0, as their sources have it.
EXTRAPOLATING = {"plms", "lms", "ipndm"}


def ideal_denoise(latents, sigma):
    """Best possible denoiser when the data is Gaussian with DATA_MEAN and DATA_STD."""
    return DATA_MEAN + (latents - DATA_MEAN) * (DATA_STD**2 / (DATA_STD**2 + sigma**2))


def curved_denoise(latents, sigma):
    """Some smooth function that no two sigmas share."""
    return (0.3 + 0.1 * sigma) / (1 + latents * latents) - 0.05 * sigma * latents


def no_draw(sigma, sigma_next):
    raise AssertionError("a deterministic sampler must not draw noise")


def normal_draw(shape, seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    return lambda sigma, sigma_next: rng.standard_normal(shape).astype(dtype)


def brownian_draw(shape, seed=0):
    """Increments of a Brownian path that is continued to lower sigmas as they are asked for."""
    path, step = {}, normal_draw(shape, seed)

    def at(sigma):
        if sigma not in path:
            lowest = min(path, default=sigma)
            path[sigma] = path.get(lowest, 0.0) - np.sqrt(lowest - sigma) * step(lowest, sigma)
            path.pop(max(path) if len(path) > 3 else None, None)  # samplers look back two points
        return path[sigma]

    return lambda sigma, sigma_next: (at(sigma) - at(sigma_next)) / np.sqrt(sigma - sigma_next)


def draw_for(name, shape, seed=0):
    """The noise that a sampler's record asks for."""
    make = brownian_draw if SAMPLERS[name].noise == "brownian" else normal_draw
    return make(shape, seed)


def some_latents(dtype=np.float64):
    return np.linspace(-20.0, 20.0, 16).reshape(SHAPE).astype(dtype)


def sampler_named(name):
    """The sampler of a model with the training schedule of `TABLE`."""
    return SAMPLERS[name].of(partial(earlier_sigma, TABLE))


def run(name, latents, sigmas, eta, noise_sampler, denoise=curved_denoise):
    """The latents after every step."""
    return list(sampler_named(name)(denoise, latents, sigmas, eta=eta, noise_sampler=noise_sampler))


def assert_same_steps(results, expected):
    """Both must give as many latents, equal to rounding."""
    for result, wanted in zip(results, expected, strict=True):
        np.testing.assert_allclose(result, wanted, rtol=1e-11, atol=1e-12)


def to_alpha(sigma):
    """What our latents are multiplied with to have unit variance."""
    return 1 / math.hypot(1, sigma)
