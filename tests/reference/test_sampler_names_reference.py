"""Names of samplers in diffusers, and its table of the names of A1111."""

import diffusers
import pytest
from diffusers.schedulers import KarrasDiffusionSchedulers

from ldm_runtime.requests.request import GenerationRequest
from tests.reference.dpm_twin_table import DPM_TWINS
from tests.reference.sampler_twin_table import TWINS

pytestmark = pytest.mark.reference

#: Scheduler classes of each sampler, from the tables of reference implementations.
CLASSES = {}
for twin in (*TWINS, *DPM_TWINS):
    CLASSES.setdefault(twin.name, set()).add(twin.scheduler.__name__)

#: Several samplers here come from this class; `EDMEulerScheduler` is for models of another kind.
AMBIGUOUS = {"DPMSolverSinglestepScheduler"}
OTHER_MODELS = {"EDMEulerScheduler"}

#: From "Schedulers" in the documentation of diffusers: A1111's name, class, `use_karras_sigmas`.
DOCUMENTED = [
    ("DPM++ 2M", "DPMSolverMultistepScheduler", False),
    ("DPM++ 2M Karras", "DPMSolverMultistepScheduler", True),
    ("DPM++ 2M SDE", "DPMSolverMultistepScheduler", False),
    ("DPM++ 2M SDE Karras", "DPMSolverMultistepScheduler", True),
    ("DPM++ SDE", "DPMSolverSinglestepScheduler", False),
    ("DPM++ SDE Karras", "DPMSolverSinglestepScheduler", True),
    ("DPM2", "KDPM2DiscreteScheduler", False),
    ("DPM2 Karras", "KDPM2DiscreteScheduler", True),
    ("DPM2 a", "KDPM2AncestralDiscreteScheduler", False),
    ("DPM2 a Karras", "KDPM2AncestralDiscreteScheduler", True),
    ("Euler", "EulerDiscreteScheduler", False),
    ("Euler a", "EulerAncestralDiscreteScheduler", False),
    ("Heun", "HeunDiscreteScheduler", False),
    ("LMS", "LMSDiscreteScheduler", False),
    ("LMS Karras", "LMSDiscreteScheduler", True),
]


@pytest.mark.parametrize(("label", "scheduler", "karras"), DOCUMENTED)
def test_a_name_of_a1111_is_the_scheduler_that_diffusers_documents(label, scheduler, karras):
    request = GenerationRequest(sampler=label)

    assert scheduler in CLASSES[request.sampler]
    assert request.schedule == ("karras" if karras else None)


def unambiguous():
    names = {name for classes in CLASSES.values() for name in classes}
    return names | {each.name for each in KarrasDiffusionSchedulers}


@pytest.mark.parametrize("name", sorted(unambiguous() - AMBIGUOUS - OTHER_MODELS))
def test_a_class_of_diffusers_is_the_sampler_it_is_the_reference_of(name):
    assert name in CLASSES[GenerationRequest(sampler=name).sampler]
    assert hasattr(diffusers, name)


def test_a_class_of_several_samplers_means_the_one_of_its_default_options():
    config = diffusers.DPMSolverMultistepScheduler().config

    assert (config.algorithm_type, config.solver_order) == ("dpmsolver++", 2)
    assert GenerationRequest(sampler="DPMSolverMultistepScheduler").sampler == "dpmpp_2m"
