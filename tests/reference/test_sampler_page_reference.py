"""The page about samplers against the code that it is written from."""

import re

import pytest

from ldm_runtime.samplers import SAMPLERS
from ldm_runtime.schedules import SCHEDULES
from scripts.sampler_page import PAGE, largest_difference, page
from tests.reference.sampler_twins import TOLERANCE

pytestmark = [
    pytest.mark.reference,
    # torch's __array__ lacks NumPy 2's `copy`, and diffusers passes tensors to NumPy functions.
    pytest.mark.filterwarnings("ignore:__array:DeprecationWarning"),
]

TEXT = PAGE.read_text(encoding="utf-8")
MEASURED = dict(re.findall(r"^\| `(\w+)` \|.*\| ([\d.e-]+) \|$", TEXT, flags=re.MULTILINE))


def test_the_page_is_what_the_script_writes_but_for_what_it_measures():
    assert page(lambda name: float(MEASURED.get(name, "nan"))) == TEXT


def test_the_page_lists_exactly_the_samplers_and_schedules():
    assert list(MEASURED) == list(SAMPLERS)
    assert re.findall(r"^\* `(\w+)`: ", TEXT, flags=re.MULTILINE) == list(SCHEDULES)


def test_no_difference_on_the_page_is_above_the_tolerance():
    assert max(map(float, MEASURED.values())) <= TOLERANCE


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m", "lms"])
def test_a_difference_on_the_page_is_the_measured_one_but_for_the_machine_s_rounding(name):
    measured = largest_difference(name)

    assert float(MEASURED[name]) / 3 < measured < 3 * float(MEASURED[name])
