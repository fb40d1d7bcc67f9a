"""Networks of a bundle: opened when first needed, their outputs checked, closed together."""

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from threading import Lock
from weakref import WeakSet

import numpy as np

from ldm_runtime.backends.contract import Engine, Runner, Tensors, bind_constants
from ldm_runtime.backends.turns import TakingTurns, Turns, never_drop
from ldm_runtime.closing import Closing
from ldm_runtime.errors import BackendError


@dataclass(frozen=True, kw_only=True)
class FiniteOutputs:
    """A network whose outputs are finite numbers, or `run` raises.

    Attributes:
        name: The component, for the message.
        runner: The network.
    """

    name: str
    runner: Runner

    def run(self, inputs: Tensors) -> Tensors:
        """Run once; see `ldm_runtime.backends.contract.Runner`.

        Raises:
            BackendError: An output holds NaN or infinity.
        """
        outputs = self.runner.run(inputs)
        if not all(np.isfinite(array).all() for array in outputs.values()):
            raise BackendError(
                f"{self.name} produced NaN or infinity; run `ldm verify`, and if that fails, use "
                "`--backend onnxruntime`, which computes in fp32, or export with "
                "--weights-dtype fp32"
            )
        return outputs

    def bind(self, constants: Tensors) -> Runner:
        """Fix some inputs; see `ldm_runtime.backends.contract.BindingRunner`."""
        return FiniteOutputs(name=self.name, runner=bind_constants(self.runner, constants))


class OpenNetworks(Closing):
    """The networks of one bundle by name, each opened by the first call for it.

    Threads may share them. A forked process opens its own when it first needs them: the engines of
    its parent count on threads that exist in the parent only, and closing them there waits for
    these threads or crashes.

    Args:
        open_engine: Opens a component.
        owner: What holds the networks, for error messages.
        survives_fork: Whether a forked process can open engines; with CUDA it cannot, nor with
            OpenVINO.
        turns: Given, one network at a time is in memory, of all bundles that share it: each is
            opened when it runs, and closed when another one is to run.
    """

    def __init__(
        self,
        open_engine: Callable[[str], Engine],
        owner: str,
        *,
        survives_fork: bool,
        turns: Turns | None = None,
    ) -> None:
        self._open_engine = open_engine
        self._owner = owner
        self._survives_fork = survives_fork
        self._turns = turns
        self._is_forked = False
        self._closed = False
        self._start()
        _ALL.add(self)

    def __call__(self, name: str) -> FiniteOutputs:
        """Return a network.

        Raises:
            BackendError: It cannot be opened, or this process or the networks cannot be used.
            BundleError: A file of it is missing or altered.
        """
        with self._lock:
            self._check_usable()
            if self._turns is not None:
                open_engine = partial(self._open_now, name)
                runner = TakingTurns(
                    turns=self._turns, key=(id(self), name), open_engine=open_engine
                )
                return FiniteOutputs(name=name, runner=runner)
            if name not in self._opened:
                self._opened[name] = self._engines.enter_context(self._open_engine(name))
            return FiniteOutputs(name=name, runner=self._opened[name])

    def _check_usable(self) -> None:
        if self._closed:
            raise BackendError(f"{self._owner} is closed; open it again")
        if self._is_forked and not self._survives_fork:
            raise BackendError(
                f"{self._owner} was opened before this process was forked, and its backend "
                "does not follow a fork; open it in every process, or start them by spawning"
            )

    def _open_now(self, name: str) -> Engine:
        self._check_usable()  # it may have been closed since the network was asked for
        return self._open_engine(name)

    @property
    def takes_turns(self) -> bool:
        """Whether each is opened when it runs, and closed when another one is to run."""
        return self._turns is not None

    @property
    def is_closed(self) -> bool:
        """Whether they are closed for good."""
        return self._closed

    def close(self) -> None:
        """Close what this process opened. Closing twice is harmless."""
        with self._lock:
            self._closed = True
        self._engines.close()
        if self._turns is not None:
            self._turns.close()

    def _start(self) -> None:
        self._lock = Lock()
        self._engines = ExitStack()
        self._opened: dict[str, Engine] = {}

    def abandon(self) -> None:
        """Start without engines in a forked process, and let those of its parent be."""
        never_drop((self._engines, self._opened))
        if self._turns is not None:
            self._turns.abandon()
        self._is_forked = True
        self._start()


_ALL: "WeakSet[OpenNetworks]" = WeakSet()


def _abandon_all() -> None:
    for networks in _ALL:
        networks.abandon()


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_abandon_all)
