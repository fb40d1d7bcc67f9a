"""How far an engine's build is: the builder reports nested phases, a person wants one number."""

from dataclasses import dataclass
from typing import Protocol


class BuildProgress(Protocol):
    """Told what happens to the engines of a bundle."""

    def begin(self, stage: str) -> None:
        """An engine's turn has come."""
        ...

    def advance(self, fraction: float) -> None:
        """Its build is as far as `fraction` of the whole, by the builder's own count.

        Called from another thread.
        """
        ...

    def end(self, stage: str, outcome: str) -> None:
        """It is there; `outcome` is "built" or "reused"."""
        ...


class SilentBuild:
    """Tells nobody."""

    def begin(self, stage: str) -> None:
        """Ignore it."""

    def advance(self, fraction: float) -> None:
        """Ignore it."""

    def end(self, stage: str, outcome: str) -> None:
        """Ignore it."""


@dataclass
class _Phase:
    parent: str | None
    steps: int
    done: int = 0


class PhaseTree:
    """Phases within phases, each of a number of steps, as one fraction that never falls."""

    def __init__(self) -> None:
        self._phases: dict[str, _Phase] = {}
        self._highest = 0.0

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """A phase begins, inside a step of `parent`."""
        self._phases[name] = _Phase(parent=parent, steps=max(steps, 1))

    def step(self, name: str, index: int) -> None:
        """Step `index` of a phase, counted from 0, is done."""
        if name in self._phases:
            self._phases[name].done = index + 1

    def finish(self, name: str) -> None:
        """A phase is over."""
        phase = self._phases.pop(name, None)
        if phase is not None and phase.parent is None:
            self._highest = 1.0

    @property
    def fraction(self) -> float:
        """How much of the outermost phase is done, from 0 to 1."""
        roots = [name for name, phase in self._phases.items() if phase.parent is None]
        self._highest = max([self._highest, *map(self._share, roots)])
        return self._highest

    def _share(self, name: str) -> float:
        phase = self._phases[name]
        inner = [self._share(each) for each, it in self._phases.items() if it.parent == name]
        return min((phase.done + max(inner, default=0.0)) / phase.steps, 1.0)
