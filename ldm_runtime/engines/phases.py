"""Progress of an engine build: the builder's nested phases as one number."""

from dataclasses import dataclass


@dataclass
class _Phase:
    parent: str | None
    steps: int
    done: int = 0


class PhaseTree:
    """Nested phases, each of a number of steps, as one fraction that never decreases."""

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
