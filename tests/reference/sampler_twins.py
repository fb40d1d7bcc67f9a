"""A sampler of ours beside the diffusers scheduler that should equal it, run step by step.

Both sides run a guided fake network in float64 from the same noise with the same draws. A `Twin`
says which scheduler, and what it takes to make it do what ours does; `largest_difference` runs the
two. The rows are in `sampler_twin_table` and in the test files of further samplers.

diffusers keeps its tables in float32 and most of its schedulers round the latents to float32 in
every step. The tables are widened to float64 as they are, so that no arithmetic on them rounds
again; what is left is all the difference there is.
"""

import copy
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import chain, pairwise

import numpy as np
import torch
from diffusers import DDIMScheduler, IPNDMScheduler

from ldm_runtime.pipeline.denoiser import GuidedDenoiser
from ldm_runtime.samplers import SAMPLERS
from ldm_runtime.schedules import earlier_sigma, sampling_sigmas, timestep_of, training_sigmas

TOLERANCE = 1e-6
SHAPE = (2, 4, 6, 6)
GUIDANCE_SCALE = 3.0
STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
CONTEXT = np.linspace(-1.0, 1.0, 4 * 3 * 2).reshape(4, 3, 2)  # 2 images, uncond first
PREDICTION_TYPES = ("epsilon", "v_prediction")

LEADING = {"timestep_spacing": "leading", "steps_offset": 1}
TRAILING = {"timestep_spacing": "trailing"}
KARRAS = {"timestep_spacing": "linspace", "use_karras_sigmas": True}

_TABLES = ("alphas_cumprod", "final_alpha_cumprod", "sigmas", "sigmas_up", "sigmas_down")
_TABLES += ("sigmas_interpol", "one")


def network(latents, timesteps, context):
    """Smooth, bounded and curved in every argument."""
    time = timesteps.astype(np.float64)[:, None, None, None] / 1000
    text = context.mean(axis=(1, 2))[:, None, None, None]
    mixed = latents + 0.4 * np.roll(latents, 1, axis=-1) + text
    return np.tanh(1.3 * mixed) * (0.6 + 0.4 * np.cos(5 * time))


def network_of_whole_timesteps(latents, timesteps, context):
    """The same for a scheduler that rounds its timesteps, as ours does not."""
    return network(latents, timesteps.round(), context)


def make_noise_sampler(seed):
    """Return a `noise_sampler` that draws as their schedulers do from a generator."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *_: torch.randn(SHAPE, generator=generator, dtype=torch.float64).numpy()


def one_call(sigmas):
    """The sigmas at which a one-call sampler asks its network, step by step."""
    return [[sigma] for sigma in sigmas[:-1]]


def also_at_the_end(sigmas):
    """The same for a sampler that looks at both ends of a step, except of one to 0."""
    return [[s, n] if n > 0 else [s] for s, n in pairwise(sigmas)]


def also_in_the_middle(sigmas):
    """The same for a sampler that looks half-way in log sigma, except in a step to 0."""
    return [[s, math.sqrt(s * n)] if n > 0 else [s] for s, n in pairwise(sigmas)]


def two_in_the_first_step(sigmas):
    """The same for LDM's PLMS, whose first step looks at both its ends."""
    return [[*sigmas[:2]], *([sigma] for sigma in sigmas[1:-1])]


@dataclass(frozen=True, kw_only=True)
class Twin:
    """A sampler of ours on one schedule, and the diffusers scheduler that should equal it.

    Attributes:
        name: Our sampler.
        scheduler: Their class.
        schedule: Our schedule.
        options: What it is made with, besides the noise schedule and the prediction type.
        eta: What ours gets, and theirs if its `step` takes one.
        final_sigma: Where ours ends; None is as its record says.
        num_steps: The numbers of steps compared.
        visits: From our sigmas to those at which the network is asked, a list a step; only the
            lengths matter unless `custom_sigmas` or `their_prediction_type` is set.
        given_timesteps: Theirs gets ours through `timesteps=`.
        given_sigmas: Theirs is given a training schedule of the sigmas in `visits` alone and goes
            through them, for schedules that it lacks or does otherwise; the network gets our
            timesteps.
        own_visits: Only our sigmas are in that training schedule, because theirs finds by itself
            what else it visits in a step.
        without_zero: The last step, to sigma 0, is left out on both sides.
        their_prediction_type: What the network's output is turned into before theirs gets it;
            None leaves it as it is.
        network: What both sides run.
        prepare: Called with their scheduler, once it is ready to run, and a `noise_sampler`.
        difference: Largest relative difference that passes.
    """

    name: str
    scheduler: type
    schedule: str = "leading"
    options: dict = field(default_factory=dict)
    eta: float = 0.0
    final_sigma: str | None = None
    num_steps: tuple[int, ...] = (2, 7, 20)  # 7 does not divide 1000
    visits: Callable[[Sequence[float]], list[list[float]]] = one_call
    given_timesteps: bool = False
    custom_sigmas: bool = False
    own_visits: bool = False
    without_zero: bool = False
    their_prediction_type: str | None = None
    network: Callable = network
    prepare: Callable = lambda scheduler, noise_sampler: None
    difference: float = TOLERANCE

    def __str__(self):
        return f"{self.name}, {self.schedule}" + (f", eta {self.eta:g}" if self.eta else "")

    @property
    def preserves_variance(self):
        """Whether their latents are ours over sqrt(1 + sigma^2)."""
        return not isinstance(getattr(self.scheduler, "init_noise_sigma", None), property)

    def vp_scale(self, sigma):
        """What their latents are multiplied with to become ours at `sigma`."""
        return math.hypot(1.0, sigma) if self.preserves_variance else 1.0

    def build(self, num_steps, prediction_type):
        """Their scheduler, ready to run, our training schedule, and our sigmas."""
        table = training_sigmas(DDIMScheduler(**STABLE_DIFFUSION).alphas_cumprod.tolist())
        final_sigma = self.final_sigma or SAMPLERS[self.name].final_sigma
        sigmas = sampling_sigmas(table, num_steps, self.schedule, final_sigma)
        if self.without_zero:
            sigmas = [sigma for sigma in sigmas if sigma > 0]
        unknown = set(self.options) - set(inspect.signature(self.scheduler).parameters)
        assert not unknown, f"{self.scheduler.__name__} has no options {unknown}"
        options = self.options | {"prediction_type": self.their_prediction_type or prediction_type}
        scheduler = self._ready(options, num_steps, sigmas, table)
        _widen(scheduler)
        self.prepare(scheduler, make_noise_sampler(1))
        return scheduler, table, sigmas

    def _ready(self, options, num_steps, sigmas, table):
        if self.custom_sigmas:
            visits = one_call(sigmas) if self.own_visits else self.visits(sigmas)
            return _visiting(self.scheduler, options, [*chain(*visits), sigmas[-1]])
        scheduler = _made(self.scheduler, STABLE_DIFFUSION | options)
        if self.given_timesteps:
            ours = [int(timestep_of(sigma, table)) for sigma in sigmas[:-1]]
            scheduler.set_timesteps(timesteps=ours)
        else:
            scheduler.set_timesteps(num_steps)
        return scheduler


def _made(scheduler, options):
    """Their scheduler, of which some lack a noise schedule or a prediction type to choose."""
    known = inspect.signature(scheduler).parameters
    return copy.deepcopy(_made_once(scheduler, *((k, v) for k, v in options.items() if k in known)))


@cache  # some take half a second each
def _made_once(scheduler, *options):
    return scheduler(**dict(options))


def _widen(scheduler):
    for name in _TABLES:
        if torch.is_tensor(getattr(scheduler, name, None)):
            setattr(scheduler, name, getattr(scheduler, name).double())


def _visiting(scheduler_type, options, sigmas):
    """Their scheduler over a training schedule of just these sigmas, which it visits in turn."""
    *visited, last = sigmas
    options = options | {"num_train_timesteps": len(sigmas), "timestep_spacing": "leading"}
    for offset in (1, 0):  # some space "leading" over one point more than others
        scheduler = _made(scheduler_type, options | {"steps_offset": offset})
        # Some take logarithms of the whole table, so the place of a final 0, which is none of
        # the timesteps visited, is taken by a sigma that makes less difference than rounding.
        table = torch.tensor([*visited, last or 2.0**-25], dtype=torch.float64).flip(0)
        scheduler.alphas_cumprod = 1 / (1 + table**2)
        scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
        _set_timesteps(scheduler, range(len(visited), 0, -1))
        if int(scheduler.timesteps[0]) == len(visited):
            break
    if isinstance(scheduler, IPNDMScheduler):  # its schedule is its own, in sines and cosines
        angles = torch.tensor(sigmas, dtype=torch.float64).arctan()
        scheduler.betas, scheduler.alphas = angles.sin(), angles.cos()
    return scheduler


def _set_timesteps(scheduler, timesteps):
    if "timesteps" in inspect.signature(scheduler.set_timesteps).parameters:
        scheduler.set_timesteps(timesteps=list(timesteps))
    else:
        scheduler.set_timesteps(len(timesteps))


def guided(latents, timestep, network):
    """The guided prediction for variance-preserving latents, written without our denoiser."""
    timesteps = np.full(len(latents), timestep)
    uncond = network(latents, timesteps, CONTEXT[:2])
    cond = network(latents, timesteps, CONTEXT[2:])
    return (1 - GUIDANCE_SCALE) * uncond + GUIDANCE_SCALE * cond


def converted(prediction, latents, sigma, source, target):
    """A prediction for variance-preserving latents as one of another type."""
    norm = math.hypot(1.0, sigma)
    match source, target:
        case "epsilon", "v_prediction":
            return norm * prediction - sigma * latents
        case "v_prediction", "epsilon":
            return (prediction + sigma * latents) / norm
    return prediction


def their_steps(twin, scheduler, sigmas, table, noise, prediction_type):
    """Latents after every step, as a pipeline of diffusers would have them."""
    known = inspect.signature(scheduler.step).parameters
    noise_by = "variance_noise" if "variance_noise" in known else "generator"
    options = {"eta": twin.eta, "generator": torch.Generator().manual_seed(1)}
    options = {
        name: options[name] for name in ("eta", noise_by) if name in known and name in options
    }
    noise_sampler = make_noise_sampler(1)
    sample = torch.from_numpy(noise * float(scheduler.init_noise_sigma))
    timesteps = iter(scheduler.timesteps)
    for visits in twin.visits(sigmas):
        for sigma, timestep in zip(visits, timesteps, strict=False):
            scaled = scheduler.scale_model_input(sample, timestep).numpy()
            time = timestep_of(sigma, table) if twin.custom_sigmas else float(timestep)
            prediction = guided(scaled, time, twin.network)
            target = twin.their_prediction_type or prediction_type
            prediction = converted(prediction, scaled, sigma, prediction_type, target)
            if noise_by == "variance_noise":
                options["variance_noise"] = torch.from_numpy(noise_sampler())
            sample = scheduler.step(
                torch.from_numpy(prediction), timestep, sample, **options
            ).prev_sample
        yield sample.numpy()
    assert next(timesteps, None) is None, "their scheduler has steps left"


def largest_difference(twin, num_steps, prediction_type, plant=lambda denoise: denoise):
    """Largest difference after any step, over the largest latent of that step."""
    scheduler, table, sigmas = twin.build(num_steps, prediction_type)
    noise = make_noise_sampler(0)()
    denoise = GuidedDenoiser(
        network=twin.network,
        training_sigmas=table,
        context=CONTEXT,
        guidance_scale=GUIDANCE_SCALE,
        prediction_type=prediction_type,
    )
    latents = noise * float(scheduler.init_noise_sigma) * twin.vp_scale(sigmas[0])

    sampler = SAMPLERS[twin.name].of(partial(earlier_sigma, their_table(scheduler, table)))
    ours = sampler(
        plant(denoise), latents, sigmas, eta=twin.eta, noise_sampler=make_noise_sampler(1)
    )

    differences = []
    theirs = their_steps(twin, scheduler, sigmas, table, noise, prediction_type)
    for mine, other, sigma in zip(ours, theirs, sigmas[1:], strict=True):
        wanted = other * twin.vp_scale(sigma)
        differences.append(np.abs(mine - wanted).max() / np.abs(wanted).max())
    return max(differences, default=0.0)


def their_table(scheduler, table):
    """The training sigmas that their scheduler steps over, which may be the visited ones alone."""
    if getattr(scheduler, "alphas_cumprod", None) is None:
        return table
    return training_sigmas(scheduler.alphas_cumprod.tolist())


def measured_difference(twins):
    """Largest of the largest differences of some twins, over their steps and prediction types."""
    return max(
        largest_difference(twin, num_steps, prediction_type)
        for twin in twins
        for num_steps in twin.num_steps
        for prediction_type in PREDICTION_TYPES
    )
