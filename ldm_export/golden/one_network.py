"""Torch's networks of a model, of which one is in memory at a time."""

from collections.abc import Callable

from ldm_runtime.backends.contract import Runner

#: Opens a component in torch, float32, with the checkpoint's own weights.
OpenReference = Callable[[str], Runner]


class OneNetwork:
    """The networks of a model by name, of which one is in memory: the last one requested.

    Args:
        open_reference: Opens a component in torch.
    """

    def __init__(self, open_reference: OpenReference) -> None:
        self._open = open_reference
        self._name = ""
        self._engine: Runner | None = None

    def __call__(self, name: str) -> Runner:
        """Return a network, and free the one before it."""
        if self._engine is None or self._name != name:
            self._engine = None  # freed before the next one is loaded
            self._engine, self._name = self._open(name), name
        return self._engine
