"""Intervals of shares against SciPy's."""

import pytest
from scipy.stats import binomtest

from models.shapes.evaluation.intervals import share_text, wilson_interval


@pytest.mark.parametrize(("right", "of"), [(0, 200), (1, 3), (151, 200), (185, 200), (200, 200)])
def test_an_interval_is_that_of_scipy(right, of):
    expected = binomtest(right, of).proportion_ci(0.95, method="wilson")

    assert wilson_interval(right, of) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_a_share_is_written_with_its_interval():
    assert share_text(185, 200) == "92.5 % (88.0 to 95.4)"
