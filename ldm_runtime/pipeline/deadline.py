"""A deadline for a request."""

import math
import numbers
import time

from ldm_runtime.errors import DeadlineError, RequestError
from ldm_runtime.pipeline.sampling import Step


class Deadline:
    """A time limit, which counts from `start` on.

    Args:
        seconds: Limit of the time a request takes; None is no limit.

    Raises:
        RequestError: It is not a number above 0.
    """

    def __init__(self, seconds: float | None) -> None:
        limit: object = math.inf if seconds is None else seconds
        if isinstance(limit, bool) or not isinstance(limit, numbers.Real) or not float(limit) > 0:
            raise RequestError("deadline_seconds", f"must be a number above 0, got {seconds!r}")
        self._seconds = float(limit)
        self._end = math.inf

    def start(self) -> None:
        """Start the clock."""
        self._end = time.monotonic() + self._seconds

    def check(self, step: Step) -> None:
        """Return if there is time left after a step.

        Raises:
            DeadlineError: Time is up.
        """
        if time.monotonic() > self._end:
            raise DeadlineError(
                f"{self._seconds:g} s are over after step {step.index} of {step.total} of "
                f"image {step.images[0] + 1}; allow more or ask for fewer steps"
            )
