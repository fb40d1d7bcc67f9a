"""How a learning rate goes: warmed up, then down along a cosine, perhaps more than once."""

import math
from dataclasses import dataclass

LEARNING_RATE = 1e-3
WARM_UP = 200


@dataclass(frozen=True, kw_only=True)
class Cycle:
    """Steps over which the learning rate warms up and then falls to nearly zero along a cosine.

    A later cycle is a warm restart (Loshchilov and Hutter 2017, arXiv:1608.03983); it may begin
    before the one in front of it has ended.

    Attributes:
        start: First step.
        end: Step at which the cosine ends.
        learning_rate: Highest.
    """

    start: int = 0
    end: int
    learning_rate: float = LEARNING_RATE

    def rate_at(self, step: int) -> float:
        """Return the learning rate of a step."""
        warm = min(1.0, (step - self.start + 1) / WARM_UP)
        done = (step - self.start) / (self.end - self.start)
        return self.learning_rate * warm * max(0.5 * (1 + math.cos(math.pi * done)), 0.01)
