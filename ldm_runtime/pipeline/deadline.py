"""A limit to how long a request may take."""

import math
import time

from ldm_runtime.errors import DeadlineError, RequestError
from ldm_runtime.pipeline.sampling import Step


class Deadline:
    """Raises once time is up; it starts with `start`.

    Args:
        seconds: How long a request may take; None is for ever.

    Raises:
        RequestError: The number of seconds is not one above 0.
    """

    def __init__(self, seconds: float | None) -> None:
        if seconds is not None and not seconds > 0:
            raise RequestError("deadline_seconds", f"must be above 0, got {seconds!r}")
        self._seconds = math.inf if seconds is None else float(seconds)
        self._end = math.inf

    def start(self) -> None:
        """Begin to count."""
        self._end = time.monotonic() + self._seconds

    def check(self, step: Step) -> None:
        """Go on, if there is time for more than the step just done.

        Raises:
            DeadlineError: Time is up.
        """
        if time.monotonic() > self._end:
            raise DeadlineError(
                f"{self._seconds:g} s are over after step {step.index} of {step.total} of "
                f"image {step.images[0] + 1}; allow more or ask for fewer steps"
            )
