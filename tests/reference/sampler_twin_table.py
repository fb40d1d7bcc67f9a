"""Which diffusers scheduler each sampler should equal, on three schedules.

What keeps a scheduler from some schedule or number of steps is said where its row is made.
"""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    IPNDMScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    TCDScheduler,
)
from diffusers.schedulers import scheduling_lms_discrete

from tests.reference.sampler_twins import (
    KARRAS,
    LEADING,
    TRAILING,
    Twin,
    also_at_the_end,
    also_in_the_middle,
    network_of_whole_timesteps,
    two_in_the_first_step,
)

LDM_DDIM = {"set_alpha_to_one": False, "clip_sample": False}
LDM_PLMS = {"set_alpha_to_one": False, "skip_prk_steps": True}
DIVIDING = (2, 8, 20)  # numbers of steps that divide 1000


def quad(function, low, high, epsrel):
    """What scipy.integrate.quad gives for a polynomial of degree 3, all that diffusers has for it.

    It imports scipy.integrate for this one call, and scipy is not among the packages of the tests.
    """
    nodes, weights = np.polynomial.legendre.leggauss(2)
    half = float(high - low) / 2
    values = (float(function(float(low) + half * (node + 1))) for node in nodes.tolist())
    return (half * float(weights @ np.fromiter(values, float)), 0.0)


scheduling_lms_discrete.integrate = SimpleNamespace(quad=quad)


def with_options(twin, schedule, options, **changes):
    """The twin on a schedule that its scheduler has under these options."""
    return replace(twin, schedule=schedule, options=twin.options | options, **changes)


def leading_and_trailing(twin):
    """The twin on the schedules that most schedulers have under these names."""
    return [with_options(twin, "leading", LEADING), with_options(twin, "trailing", TRAILING)]


def visiting(twin, *schedules):
    """The twin on schedules that its scheduler lacks and is made to visit."""
    return [replace(twin, schedule=schedule, custom_sigmas=True) for schedule in schedules]


def of_uniform_strides(twin):
    """The twin of a scheduler that steps by 1000 // num_steps whatever it visits."""
    return [
        with_options(twin, "leading", LEADING),
        with_options(twin, "trailing", TRAILING, num_steps=DIVIDING),
        *visiting(twin, "karras"),
    ]


def ddim_twins(eta):
    """DDIM with a share of noise."""
    return of_uniform_strides(Twin(name="ddim", scheduler=DDIMScheduler, options=LDM_DDIM, eta=eta))


def ddpm_twins():
    """Their last step adds 1e-10 of noise, the root of the least variance they allow."""
    twin = Twin(name="ddpm", scheduler=DDPMScheduler, options={"clip_sample": False})
    return [*leading_and_trailing(twin), *visiting(twin, "karras")]


def euler_twins():
    """Euler's method."""
    twin = Twin(name="euler", scheduler=EulerDiscreteScheduler)
    return [*leading_and_trailing(twin), with_options(twin, "karras", KARRAS)]


def euler_ancestral_twins():
    """They have no Karras sigmas."""
    twin = Twin(name="euler_ancestral", scheduler=EulerAncestralDiscreteScheduler, eta=1.0)
    return [*leading_and_trailing(twin), *visiting(twin, "karras")]


def lcm_twins():
    """A large `timestep_scaling` makes c_skip 0 and c_out 1: the sampler without the model."""
    options = {"timestep_scaling": 1e9, "original_inference_steps": 2}
    twin = Twin(name="lcm", scheduler=LCMScheduler, options=options)
    return [
        replace(twin, schedule="leading", given_timesteps=True),
        replace(twin, schedule="trailing", given_timesteps=True),
        *visiting(twin, "karras"),
    ]


def tcd_twins(eta):
    """They step by the timesteps of the training schedule, visited ones alone on "karras"."""
    options = {"original_inference_steps": 2}
    twin = Twin(name="tcd", scheduler=TCDScheduler, options=options, eta=eta)
    return [
        replace(twin, schedule="leading", given_timesteps=True),
        replace(twin, schedule="trailing", given_timesteps=True),
        *visiting(twin, "karras"),
    ]


def heun_twins():
    """Heun's method."""
    twin = Twin(name="heun", scheduler=HeunDiscreteScheduler, visits=also_at_the_end)
    return [*leading_and_trailing(twin), with_options(twin, "karras", KARRAS)]


def dpm2_twins():
    """They round Karras timesteps, but not those in the middle, and so are made to visit them."""
    twin = Twin(
        name="dpm2", scheduler=KDPM2DiscreteScheduler, visits=also_in_the_middle, own_visits=True
    )
    return [*leading_and_trailing(twin), *visiting(twin, "karras")]


def dpm2_ancestral_twins():
    """With eta 1 the middle between sigma and sigma_down is sigma_next. Karras as in `dpm2`.

    Theirs works out sigma_down in float32 as the root of a difference. In steps as long as those
    of two "leading" or "karras" ones that cancels to 4 digits, so there are 7 steps at least.
    """
    twin = Twin(
        name="dpm2_ancestral",
        scheduler=KDPM2AncestralDiscreteScheduler,
        eta=1.0,
        num_steps=(7, 10, 20),
        visits=also_at_the_end,
        own_visits=True,
    )
    return [*leading_and_trailing(twin), *visiting(twin, "karras")]


def dpmpp_2s_twins():
    """Only without noise, as two steps of theirs, the first of them to the middle."""
    twin = Twin(
        name="dpmpp_2s_ancestral",
        scheduler=DPMSolverSinglestepScheduler,
        options={"solver_order": 2, "lower_order_final": True, "final_sigmas_type": "zero"},
        visits=also_in_the_middle,
    )
    return visiting(twin, "leading", "trailing", "karras")


def plms_twins():
    """Theirs extrapolates v where the source extrapolates epsilon, and so gets epsilon."""
    return of_uniform_strides(
        Twin(
            name="plms",
            scheduler=PNDMScheduler,
            options=LDM_PLMS,
            visits=two_in_the_first_step,
            own_visits=True,
            their_prediction_type="epsilon",
        )
    )


def lms_twins():
    """Linear multistep."""
    twin = Twin(name="lms", scheduler=scheduling_lms_discrete.LMSDiscreteScheduler)
    return [*leading_and_trailing(twin), with_options(twin, "karras", KARRAS)]


def ipndm_twins():
    """They have a schedule of their own alone, and take v alone whatever the model predicts."""
    twin = Twin(name="ipndm", scheduler=IPNDMScheduler, their_prediction_type="v_prediction")
    return visiting(twin, "leading", "trailing", "karras")


def deis_twins():
    """They space "leading" over a point more and never go to 0: their last Karras step is none."""
    options = {"solver_order": 3, "lower_order_final": False}
    twin = Twin(name="deis", scheduler=DEISMultistepScheduler, options=options)
    return [
        with_options(twin, "trailing", TRAILING),
        *visiting(twin, "leading"),
        *visiting(replace(twin, without_zero=True), "karras"),
    ]


def dpmpp_2m_twins():
    """They space "leading" over a point more, and round Karras timesteps."""
    twin = Twin(name="dpmpp_2m", scheduler=DPMSolverMultistepScheduler)
    return [
        with_options(twin, "leading", LEADING, given_timesteps=True),
        with_options(twin, "trailing", TRAILING),
        with_options(twin, "karras", KARRAS, network=network_of_whole_timesteps),
    ]


TWINS = [
    *ddpm_twins(),
    *ddim_twins(eta=0.0),
    *ddim_twins(eta=1.0),
    *euler_twins(),
    *euler_ancestral_twins(),
    *lcm_twins(),
    *tcd_twins(eta=0.3),
    *tcd_twins(eta=1.0),
    *tcd_twins(eta=0.0),
    *heun_twins(),
    *dpm2_twins(),
    *dpm2_ancestral_twins(),
    *dpmpp_2s_twins(),
    *plms_twins(),
    *lms_twins(),
    *ipndm_twins(),
    *deis_twins(),
    *dpmpp_2m_twins(),
]
