"""Our samplers and denoiser against their diffusers schedulers, step by step.

Both sides run a guided fake network in float64 from the same noise with the same draws, and must
agree to 1e-6 of the largest latent after every step. diffusers keeps its tables in float32 and
rounds the latents to float32 in every Euler and DPM-Solver step; what is left of that is all the
difference there is (it grows with the number of steps: 1e-7 to 7e-7 up to 20, 1e-6 at 50).

Where diffusers and the source we follow differ, a test at the end shows both:

* `DPMSolverMultistepScheduler` spaces "leading" over num_steps + 1 points and so visits other
  timesteps than DDIM and Euler do. As its twin it gets ours through `timesteps=`.
* It also rounds Karras timesteps to whole ones for the network, where k-diffusion and
  `EulerDiscreteScheduler` pass fractions. As its twin it meets a network that rounds them itself.
* "linspace" is interpolated linearly in sigma by diffusers and in log sigma by k-diffusion, so
  only step counts that land on whole timesteps agree; one step starts at the first timestep in
  diffusers and at the last in k-diffusion.
* DDIM and DPM-Solver of diffusers start from unit variance whatever the spacing; ours start from
  noise times the largest sigma except for "leading", as k-diffusion and diffusers' Euler do.
* "leading" with a step for every training timestep runs off the table of diffusers, and
  "trailing" makes one step too many there for some numbers, such as 61, from rounding errors.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
)

from ldm_runtime.denoiser import GuidedDenoiser, timestep_of
from ldm_runtime.samplers import SAMPLERS
from ldm_runtime.schedules import SCHEDULES, initial_scale, sampling_sigmas, training_sigmas

pytestmark = [
    pytest.mark.reference,
    # torch's __array__ lacks NumPy 2's `copy`, and diffusers passes tensors to np.array.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

TOLERANCE = 1e-6
SHAPE = (2, 4, 6, 6)
GUIDANCE_SCALE = 3.0
STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
CONTEXT = np.linspace(-1.0, 1.0, 4 * 3 * 2).reshape(4, 3, 2)  # 2 images, uncond first

LEADING = {"timestep_spacing": "leading", "steps_offset": 1}
TRAILING = {"timestep_spacing": "trailing"}
KARRAS = {"timestep_spacing": "linspace", "use_karras_sigmas": True}
LDM_DDIM = {"set_alpha_to_one": False, "clip_sample": False}


def network(latents, timesteps, context):
    """Smooth, bounded and curved in every argument."""
    time = timesteps.astype(np.float64)[:, None, None, None] / 1000
    text = context.mean(axis=(1, 2))[:, None, None, None]
    mixed = latents + 0.4 * np.roll(latents, 1, axis=-1) + text
    return np.tanh(1.3 * mixed) * (0.6 + 0.4 * np.cos(5 * time))


def network_of_whole_timesteps(latents, timesteps, context):
    return network(latents, timesteps.round(), context)


def guided(latents, timestep, network):
    """The guided prediction for variance-preserving latents, written without our denoiser."""
    timesteps = np.full(len(latents), timestep)
    uncond = network(latents, timesteps, CONTEXT[:2])
    cond = network(latents, timesteps, CONTEXT[2:])
    return (1 - GUIDANCE_SCALE) * uncond + GUIDANCE_SCALE * cond


def make_draw(seed):
    generator = torch.Generator().manual_seed(seed)
    return lambda *_: torch.randn(SHAPE, generator=generator, dtype=torch.float64).numpy()


@dataclass(frozen=True, kw_only=True)
class Twin:
    """A sampler of ours on one schedule, and the diffusers scheduler that should equal it."""

    name: str
    schedule: str
    scheduler: type
    options: dict
    eta: float = 0.0
    passes_eta: bool = False
    given_timesteps: bool = False
    network: object = network

    def build(self, num_steps, prediction_type):
        """Their scheduler, ready to run, our table made from its, and our sigmas."""
        scheduler = self.scheduler(
            **STABLE_DIFFUSION, **self.options, prediction_type=prediction_type
        )
        table = training_sigmas(scheduler.alphas_cumprod.tolist())
        sigmas = sampling_sigmas(table, num_steps, self.schedule, SAMPLERS[self.name].final_sigma)
        if self.given_timesteps:
            scheduler.set_timesteps(timesteps=[int(timestep_of(s, table)) for s in sigmas[:-1]])
        else:
            scheduler.set_timesteps(num_steps)
        return scheduler, table, sigmas

    def vp_scale(self, sigma):
        """What their latents are multiplied with to become ours at `sigma`."""
        preserves_variance = self.scheduler in (DDIMScheduler, DPMSolverMultistepScheduler)
        return math.hypot(1.0, sigma) if preserves_variance else 1.0


TWINS = {
    "ddim": Twin(
        name="ddim",
        schedule="leading",
        scheduler=DDIMScheduler,
        options=LDM_DDIM | LEADING,
        passes_eta=True,
    ),
    "ddim, eta 1": Twin(
        name="ddim",
        schedule="leading",
        scheduler=DDIMScheduler,
        options=LDM_DDIM | LEADING,
        eta=1.0,
        passes_eta=True,
    ),
    "euler": Twin(
        name="euler", schedule="leading", scheduler=EulerDiscreteScheduler, options=LEADING
    ),
    "euler, trailing": Twin(
        name="euler", schedule="trailing", scheduler=EulerDiscreteScheduler, options=TRAILING
    ),
    "euler, karras": Twin(
        name="euler", schedule="karras", scheduler=EulerDiscreteScheduler, options=KARRAS
    ),
    "euler_ancestral": Twin(
        name="euler_ancestral",
        schedule="leading",
        scheduler=EulerAncestralDiscreteScheduler,
        options=LEADING,
        eta=1.0,
    ),
    "euler_ancestral, trailing": Twin(
        name="euler_ancestral",
        schedule="trailing",
        scheduler=EulerAncestralDiscreteScheduler,
        options=TRAILING,
        eta=1.0,
    ),
    "dpmpp_2m": Twin(
        name="dpmpp_2m",
        schedule="leading",
        scheduler=DPMSolverMultistepScheduler,
        options=LEADING,
        given_timesteps=True,
    ),
    "dpmpp_2m, trailing": Twin(
        name="dpmpp_2m",
        schedule="trailing",
        scheduler=DPMSolverMultistepScheduler,
        options=TRAILING,
    ),
    "dpmpp_2m, karras": Twin(
        name="dpmpp_2m",
        schedule="karras",
        scheduler=DPMSolverMultistepScheduler,
        options=KARRAS,
        network=network_of_whole_timesteps,
    ),
}


def their_steps(twin, scheduler, noise):
    """Latents after every step, as a pipeline of diffusers would have them."""
    generator = torch.Generator().manual_seed(1)
    options = {"eta": twin.eta} if twin.passes_eta else {}
    sample = torch.from_numpy(noise * float(scheduler.init_noise_sigma))
    for timestep in scheduler.timesteps:
        scaled = scheduler.scale_model_input(sample, timestep)
        prediction = torch.from_numpy(guided(scaled.numpy(), float(timestep), twin.network))
        result = scheduler.step(prediction, timestep, sample, generator=generator, **options)
        sample = result.prev_sample
        yield sample.numpy()


def largest_difference(twin, num_steps, prediction_type, plant=lambda denoise: denoise):
    """Largest difference after any step, over the largest latent of that step."""
    scheduler, table, sigmas = twin.build(num_steps, prediction_type)
    noise = make_draw(0)()
    denoise = GuidedDenoiser(
        network=twin.network,
        training_sigmas=table,
        context=CONTEXT,
        guidance_scale=GUIDANCE_SCALE,
        prediction_type=prediction_type,
    )
    latents = noise * float(scheduler.init_noise_sigma) * twin.vp_scale(sigmas[0])

    ours = SAMPLERS[twin.name].function(
        plant(denoise), latents, sigmas, eta=twin.eta, draw=make_draw(1)
    )

    differences = []
    for mine, other, sigma in zip(
        ours, their_steps(twin, scheduler, noise), sigmas[1:], strict=True
    ):
        wanted = other * twin.vp_scale(sigma)
        differences.append(np.abs(mine - wanted).max() / np.abs(wanted).max())
    return max(differences)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("num_steps", [2, 7, 20])  # 7 does not divide 1000
@pytest.mark.parametrize("twin", TWINS.values(), ids=TWINS.keys())
def test_every_step_equals_that_of_the_diffusers_twin(twin, num_steps, prediction_type):
    difference = largest_difference(twin, num_steps, prediction_type)

    assert difference <= TOLERANCE


def swap_uncond_and_cond(denoise):
    return replace(denoise, context=np.concatenate([CONTEXT[2:], CONTEXT[:2]]))


def shift_timestep_by_one(denoise):
    return replace(denoise, network=lambda x, t, context: denoise.network(x, t + 1, context))


def raise_sigma_by_a_thousandth(denoise):
    return lambda latents, sigma: denoise(latents, 1.001 * sigma)


def forget_to_scale_the_input(denoise):
    def network(latents, timesteps, context):
        sigma = np.exp(np.interp(timesteps[0], range(1000), np.log(denoise.training_sigmas)))
        return denoise.network(latents * math.hypot(1, sigma), timesteps, context)

    return replace(denoise, network=network)


@pytest.mark.parametrize(
    "plant",
    [
        swap_uncond_and_cond,
        shift_timestep_by_one,
        raise_sigma_by_a_thousandth,
        forget_to_scale_the_input,
    ],
)
@pytest.mark.parametrize("twin", TWINS.values(), ids=TWINS.keys())
def test_a_planted_bug_is_seen_far_above_the_tolerance(twin, plant):
    difference = largest_difference(twin, 7, "epsilon", plant)

    assert difference > 100 * TOLERANCE


@pytest.mark.parametrize(
    ("schedule", "options", "most"), [("leading", LEADING, 999), ("trailing", TRAILING, 1000)]
)
def test_a_schedule_visits_the_timesteps_of_diffusers_for_every_number_of_steps(
    schedule, options, most
):
    scheduler = DDIMScheduler(**STABLE_DIFFUSION, **LDM_DDIM, **options)
    table = training_sigmas(scheduler.alphas_cumprod.tolist())

    for num_steps in range(1, most + 1):
        scheduler.set_timesteps(num_steps)
        ours = [timestep_of(sigma, table) for sigma in SCHEDULES[schedule](table, num_steps)]
        assert len(ours) == num_steps
        assert ours == scheduler.timesteps.tolist()[:num_steps]


@pytest.mark.parametrize(
    ("schedule", "options"), [("leading", LEADING), ("trailing", TRAILING), ("karras", KARRAS)]
)
def test_sigmas_and_the_initial_scale_are_those_of_the_euler_scheduler(schedule, options):
    scheduler = EulerDiscreteScheduler(**STABLE_DIFFUSION, **options)
    table = training_sigmas(scheduler.alphas_cumprod.tolist())

    for num_steps in (2, 7, 20, 50, 333):
        scheduler.set_timesteps(num_steps)
        sigmas = sampling_sigmas(table, num_steps, schedule, "zero")
        # Their float32 fractions of Karras timesteps are compared by the twins.
        np.testing.assert_allclose(sigmas, scheduler.sigmas, rtol=5e-7)
        scale = initial_scale(sigmas, schedule)
        assert scale == pytest.approx(float(scheduler.init_noise_sigma), rel=5e-7)


def linspace_sigmas(num_steps):
    scheduler = EulerDiscreteScheduler(**STABLE_DIFFUSION, timestep_spacing="linspace")
    scheduler.set_timesteps(num_steps)
    table = training_sigmas(scheduler.alphas_cumprod.tolist())
    return sampling_sigmas(table, num_steps, "linspace", "zero"), scheduler.sigmas.numpy(), table


@pytest.mark.parametrize("num_steps", [2, 4, 10, 28, 38, 112])
def test_linspace_equals_diffusers_where_all_timesteps_are_whole(num_steps):
    ours, theirs, _ = linspace_sigmas(num_steps)

    np.testing.assert_allclose(ours, theirs, rtol=5e-7)


def test_linspace_is_interpolated_in_log_sigma_where_diffusers_is_linear():
    ours, theirs, table = linspace_sigmas(3)

    assert theirs[1] == pytest.approx((table[499] + table[500]) / 2, rel=1e-6)
    assert ours[1] == pytest.approx(math.sqrt(table[499] * table[500]), rel=1e-12)


def test_one_linspace_step_starts_at_the_last_timestep_where_diffusers_starts_at_the_first():
    ours, theirs, table = linspace_sigmas(1)

    assert ours[0] == table[-1]
    assert theirs[0] == pytest.approx(table[0], rel=1e-6)


def test_leading_is_spaced_over_one_more_point_by_the_dpm_solver_of_diffusers():
    scheduler = DPMSolverMultistepScheduler(**STABLE_DIFFUSION, **LEADING)
    table = training_sigmas(scheduler.alphas_cumprod.tolist())
    scheduler.set_timesteps(4)

    ours = [timestep_of(sigma, table) for sigma in SCHEDULES["leading"](table, 4)]

    assert ours == [751, 501, 251, 1]
    assert scheduler.timesteps.tolist() == [801, 601, 401, 201]


def test_karras_timesteps_are_rounded_by_the_dpm_solver_of_diffusers_but_not_by_its_euler():
    table = training_sigmas(DDIMScheduler(**STABLE_DIFFUSION).alphas_cumprod.tolist())
    ours = [timestep_of(sigma, table) for sigma in SCHEDULES["karras"](table, 7)]
    dpm_solver = DPMSolverMultistepScheduler(**STABLE_DIFFUSION, **KARRAS)
    euler = EulerDiscreteScheduler(**STABLE_DIFFUSION, **KARRAS)
    dpm_solver.set_timesteps(7)
    euler.set_timesteps(7)

    np.testing.assert_allclose(ours, euler.timesteps, atol=0.01)
    assert dpm_solver.timesteps.tolist() == [round(timestep) for timestep in ours]
    assert ours != [round(timestep) for timestep in ours]


def test_variance_preserving_schedulers_of_diffusers_start_from_unit_variance_when_trailing():
    scheduler = DDIMScheduler(**STABLE_DIFFUSION, **LDM_DDIM, **TRAILING)
    table = training_sigmas(scheduler.alphas_cumprod.tolist())
    sigmas = sampling_sigmas(table, 20, "trailing", "smallest")

    theirs = float(scheduler.init_noise_sigma) * math.hypot(1, sigmas[0])

    assert initial_scale(sigmas, "leading") == theirs
    assert initial_scale(sigmas, "trailing") == sigmas[0]
    assert sigmas[0] / theirs == pytest.approx(0.9977, abs=5e-5)


def test_trailing_makes_as_many_steps_as_asked_for_where_diffusers_makes_one_more():
    scheduler = DDIMScheduler(**STABLE_DIFFUSION, **LDM_DDIM, **TRAILING)
    table = training_sigmas(scheduler.alphas_cumprod.tolist())
    scheduler.set_timesteps(61)

    ours = SCHEDULES["trailing"](table, 61)

    assert (len(ours), len(scheduler.timesteps)) == (61, 62)


def test_leading_with_every_timestep_ends_inside_our_table_and_outside_that_of_diffusers():
    scheduler = DDIMScheduler(**STABLE_DIFFUSION, **LDM_DDIM, **LEADING)
    table = training_sigmas(scheduler.alphas_cumprod.tolist())
    scheduler.set_timesteps(1000)

    ours = [timestep_of(sigma, table) for sigma in SCHEDULES["leading"](table, 1000)]

    assert scheduler.timesteps.tolist() == [*range(1000, 0, -1)]
    assert ours == [*range(999, -1, -1)]
