"""Every preset against the diffusers scheduler, as its publisher sets that up, step by step."""

import pytest
from diffusers import (
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    TCDScheduler,
)

from ldm_runtime.requests.presets import PRESETS
from ldm_runtime.schedules import initial_scale
from tests.reference.sampler_twin_table import LDM_DDIM
from tests.reference.sampler_twins import TOLERANCE, TRAILING, Twin, largest_difference

pytestmark = [
    pytest.mark.reference,
    # torch's __array__ lacks NumPy 2's `copy`, and diffusers passes tensors to NumPy functions.
    pytest.mark.filterwarnings("ignore:__array:DeprecationWarning"),
]

#: Scheduler and options of each model card; `set_alpha_to_one` is that of SDXL's configuration.
PUBLISHED = {
    "turbo": (EulerAncestralDiscreteScheduler, TRAILING),
    **dict.fromkeys(
        ("lightning-1", "lightning-2", "lightning-4", "lightning-8"),
        (EulerDiscreteScheduler, TRAILING),
    ),
    **dict.fromkeys(("hyper-2", "hyper-4", "hyper-8"), (DDIMScheduler, TRAILING | LDM_DDIM)),
    "lcm": (LCMScheduler, {}),
    "tcd": (TCDScheduler, {}),
}
#: Model cards that list timesteps for `LCMScheduler`.
LISTED = {"hyper-1": [800], "dmd2": [999, 749, 499, 249], "dmd2-1": [399]}


def twin_of(name):
    preset = PRESETS[name]
    scheduler, options = PUBLISHED.get(name, (LCMScheduler, {}))
    return Twin(
        name=preset.sampler,
        schedule=preset.schedule,
        scheduler=scheduler,
        options=options,
        eta=preset.eta,
        given_timesteps=name in LISTED,
    )


def test_every_preset_has_a_scheduler_of_diffusers():
    assert PUBLISHED.keys() | LISTED.keys() == PRESETS.keys()


@pytest.mark.parametrize("name", PRESETS)
def test_every_step_of_a_preset_is_that_of_the_published_scheduler(name):
    preset = PRESETS[name]

    difference = largest_difference(
        twin_of(name), preset.num_inference_steps, preset.prediction_type or "epsilon"
    )

    assert difference <= TOLERANCE


@pytest.mark.parametrize("name", PRESETS)
def test_the_first_latents_have_the_published_scale_and_timesteps(name):
    preset, twin = PRESETS[name], twin_of(name)
    scheduler, _, sigmas = twin.build(preset.num_inference_steps, "epsilon")

    theirs = float(scheduler.init_noise_sigma) * twin.vp_scale(sigmas[0])

    # On "trailing" ours is sigma, and that of schedulers of unit variance 0.2 % more.
    exact = preset.schedule != "trailing" or not twin.preserves_variance
    ours = initial_scale(sigmas, preset.schedule)
    assert ours == pytest.approx(theirs, rel=1e-6 if exact else 0.0025)
    if name in LISTED:
        assert scheduler.timesteps.tolist() == LISTED[name]
