"""Which diffusers scheduler each DPM-Solver, stochastic and UniPC sampler should equal.

Three need a correction before they do what their source does; `test_dpm_solver_reference` shows
each difference as well as the match:

* `DPMSolverSinglestepScheduler` gives the second point of a third-order step the weight of a whole
  second-order step ("midpoint"), where the paper and CompVis give it that of "heun".
* `DPMSolverMultistepScheduler` has another sign before 0.5 in the weight of the curvature of
  third-order "sde-dpmsolver++" than k-diffusion and than its own "dpmsolver++". So the weight tends
  to -1 for small steps, where it should tend to 0.
* `DPMSolverSDEScheduler` draws its noise from torchsde and gets the draws of ours instead.

Third-order steps with noise turn the rounding of latents and sigmas to float32 into up to 3e-6 on
"leading", so there both are kept in float64.

The spacing "leading" of the multistep and UniPC schedulers and their rounding of Karras timesteps
are as `test_samplers_reference` says. "dpmsolver" refuses a final sigma of 0, so `dpm_solver` is
compared without a step to it.
"""

import sys
from dataclasses import replace
from functools import wraps
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from unittest.mock import patch

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    UniPCMultistepScheduler,
)
from diffusers.schedulers import scheduling_dpmsolver_multistep

from tests.reference.sampler_twins import (
    KARRAS,
    LEADING,
    TRAILING,
    Twin,
    also_in_the_middle,
    network_of_whole_timesteps,
)


def _dpm_solver_sde_scheduler():
    """Their class, imported with an empty torchsde where there is none: only its noise needs it."""
    missing = find_spec("torchsde") is None
    if missing:
        sys.modules["torchsde"] = ModuleType("torchsde")
    try:
        from diffusers.schedulers.scheduling_dpmsolver_sde import DPMSolverSDEScheduler
    finally:
        if missing:
            del sys.modules["torchsde"]
    return DPMSolverSDEScheduler


_TORCH_OF_DOUBLES = SimpleNamespace(**vars(torch) | {"float32": torch.float64})


def take_draws_of_ours(scheduler, noise_sampler):
    scheduler.noise_sampler = lambda *levels: torch.from_numpy(noise_sampler(*levels))


def weigh_inner_points_as_in_the_paper(scheduler, noise_sampler):
    theirs = scheduler.singlestep_dpm_solver_second_order_update

    def update(outputs, **arguments):
        inside_third_order = 3 in scheduler.order_list[scheduler.step_index + 1 :][:1]
        scheduler.register_to_config(solver_type="heun" if inside_third_order else "midpoint")
        result = theirs(outputs, **arguments)
        scheduler.register_to_config(solver_type="midpoint")
        return result

    scheduler.singlestep_dpm_solver_second_order_update = update


def weigh_curvature_as_in_k_diffusion(scheduler, noise_sampler):
    theirs = scheduler.multistep_dpm_solver_third_order_update

    def update(outputs, **arguments):
        sigmas = scheduler.sigmas[scheduler.step_index - 2 :][:4]
        earliest_width, earlier_width, width = (-sigmas.log()).diff()
        slope = (outputs[-1] - outputs[-2]) * width / earlier_width
        earlier_slope = (outputs[-2] - outputs[-3]) * width / earliest_width
        curvature = (slope - earlier_slope) * width / (earlier_width + earliest_width)
        alpha = 1 / (1 + sigmas[-1] ** 2).sqrt()
        return theirs(outputs, **arguments) + alpha * curvature

    scheduler.multistep_dpm_solver_third_order_update = update


def keep_double_precision(scheduler, noise_sampler):
    theirs = scheduler.step

    def step(*arguments, **options):
        with patch.object(scheduling_dpmsolver_multistep, "torch", _TORCH_OF_DOUBLES):
            return theirs(*arguments, **options)

    scheduler.step = wraps(theirs)(step)  # the signature tells the harness what a step takes


def visit_leading_timesteps(scheduler, noise_sampler):
    """Replace timesteps that are spaced over one point more, and do not round the sigmas."""
    count = scheduler.num_inference_steps
    scheduler.timesteps = 1000 // count * torch.arange(count - 1, -1, -1) + 1
    sigmas = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).sqrt()
    end = sigmas[:1] if scheduler.config.final_sigmas_type == "sigma_min" else torch.zeros(1)
    scheduler.sigmas = torch.cat([sigmas[scheduler.timesteps], end])


def do_all(*prepares):
    return lambda scheduler, noise_sampler: [
        prepare(scheduler, noise_sampler) for prepare in prepares
    ]


def _multistep(name, algorithm, **fields):
    """A sampler on the three schedules of the multistep scheduler."""
    options = {"algorithm_type": algorithm, "lower_order_final": False} | fields.pop("options")
    twin = Twin(name=name, scheduler=DPMSolverMultistepScheduler, **fields)
    return [
        replace(
            twin,
            schedule="leading",
            options=options,
            prepare=do_all(visit_leading_timesteps, twin.prepare),
        ),
        replace(twin, schedule="trailing", options=options | TRAILING),
        replace(
            twin, schedule="karras", options=options | KARRAS, network=network_of_whole_timesteps
        ),
    ]


DPM_SOLVER = Twin(
    name="dpm_solver",
    scheduler=DPMSolverSinglestepScheduler,
    options={
        "algorithm_type": "dpmsolver",
        "solver_order": 3,
        "lower_order_final": True,
        "final_sigmas_type": "sigma_min",
    },
    final_sigma="smallest",
    num_steps=(1, 2, 3, 6, 7, 20),
    prepare=weigh_inner_points_as_in_the_paper,
)
DPMPP_SDE = Twin(
    name="dpmpp_sde",
    scheduler=_dpm_solver_sde_scheduler(),
    eta=1.0,
    visits=also_in_the_middle,
    prepare=take_draws_of_ours,
)
DPMPP_2S = Twin(
    name="dpmpp_sde",
    scheduler=DPMSolverSinglestepScheduler,
    options={"solver_order": 2, "lower_order_final": True},
    visits=also_in_the_middle,
    custom_sigmas=True,
)
UNIPC = Twin(name="unipc", scheduler=UniPCMultistepScheduler)
THIRD_ORDER = {"solver_order": 3, "solver_type": "heun"}
SMALLEST = {"final_sigmas_type": "sigma_min", "lower_order_final": False}

DPM_TWINS = [
    replace(DPM_SOLVER, schedule="leading", given_timesteps=True),
    replace(DPM_SOLVER, schedule="trailing", given_timesteps=True),
    replace(DPM_SOLVER, schedule="karras", custom_sigmas=True, without_zero=True),
    replace(DPMPP_SDE, schedule="leading", options=LEADING),
    replace(DPMPP_SDE, schedule="trailing", options=TRAILING),
    replace(DPMPP_SDE, schedule="karras", options=KARRAS),
    *(replace(DPMPP_2S, schedule=schedule) for schedule in ("leading", "trailing", "karras")),
    *_multistep("dpmpp_2m_sde", "sde-dpmsolver++", options={}, eta=1.0),
    *_multistep("dpmpp_2m_sde", "dpmsolver++", options={}),
    *_multistep(
        "dpmpp_3m_sde",
        "sde-dpmsolver++",
        options=THIRD_ORDER,
        eta=1.0,
        prepare=do_all(keep_double_precision, weigh_curvature_as_in_k_diffusion),
    ),
    *_multistep(
        "dpmpp_3m_sde",
        "dpmsolver++",
        options=THIRD_ORDER,
        prepare=keep_double_precision,
    ),
    replace(UNIPC, schedule="leading", prepare=visit_leading_timesteps),
    replace(UNIPC, schedule="trailing", options=TRAILING),
    replace(UNIPC, schedule="karras", options=KARRAS, network=network_of_whole_timesteps),
]

TO_THE_SMALLEST = [
    Twin(
        name=name,
        scheduler=DPMSolverMultistepScheduler,
        options=SMALLEST | options,
        eta=eta,
        final_sigma="smallest",
        prepare=do_all(keep_double_precision, visit_leading_timesteps, *prepares),
    )
    for name, eta, options, prepares in [
        ("dpmpp_2m", 0.0, {}, []),
        ("dpmpp_2m_sde", 1.0, {"algorithm_type": "sde-dpmsolver++"}, []),
        (
            "dpmpp_3m_sde",
            1.0,
            THIRD_ORDER | {"algorithm_type": "sde-dpmsolver++"},
            [weigh_curvature_as_in_k_diffusion],
        ),
    ]
]
