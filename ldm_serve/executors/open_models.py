"""The models that a worker holds open, within a budget of memory."""

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from ldm_runtime.bundle.manifest import load_manifest
from ldm_runtime.closing import Closing
from ldm_runtime.generator import Generator
from ldm_runtime.pipeline.continuous import ContinuousBatch
from ldm_serve.settings import EngineSettings

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class OpenBatch:
    """An open model and the batch of its requests."""

    generator: Generator
    batch: ContinuousBatch
    weights_bytes: int


class OpenModels(Closing):
    """Models by name, opened when they are first asked for; used by one thread.

    Args:
        bundles: Folder of every model.
        settings: How they are opened.
    """

    def __init__(self, bundles: Mapping[str, Path], settings: EngineSettings) -> None:
        self._bundles, self._settings = bundles, settings
        self._open: dict[str, OpenBatch] = {}  # the least recently used first

    def open(self, name: str) -> OpenBatch | None:
        """Return a model; None if it must wait until a busy one can be closed.

        Raises:
            BundleError: The bundle is incomplete or altered.
            BackendError: The backend cannot run here.
        """
        if name in self._open:
            self._open[name] = self._open.pop(name)
            return self._open[name]
        size = _weights_bytes(self._bundles[name])
        if not self._make_room(size):
            return None
        self._open[name] = _opened(self._bundles[name], self._settings, size)
        _LOGGER.info("opened %s: %s", name, self._open[name].generator)
        return self._open[name]

    def busy(self) -> list[OpenBatch]:
        """Return the models that have requests."""
        return [each for each in self._open.values() if each.batch]

    def close(self) -> None:
        """Close all models. Closing twice is harmless."""
        for name in list(self._open):
            self._close(name)

    def _make_room(self, size: int) -> bool:
        """Close idle models until another fits, if need be all of them."""
        budget = self._settings.memory_budget_bytes
        if budget is None:
            return True
        while self._open and self._held() + size > budget:
            idle = next((name for name, each in self._open.items() if not each.batch), None)
            if idle is None:
                return False
            self._close(idle)
        return True

    def _held(self) -> int:
        return sum(each.weights_bytes for each in self._open.values())

    def _close(self, name: str) -> None:
        opened = self._open.pop(name)
        opened.batch.close()
        opened.generator.close()
        _LOGGER.info("closed %s", name)


def _opened(folder: Path, settings: EngineSettings, size: int) -> OpenBatch:
    with ExitStack() as stack:
        generator = stack.enter_context(
            Generator(
                folder,
                backend=settings.backend,
                precision=settings.precision,
                threads=settings.threads,
                low_memory=settings.low_memory,
                trust_engines=settings.trust_engines,
            )
        )
        batch = generator.open_batch(max_batch=settings.max_batch)
        stack.pop_all()
    return OpenBatch(generator=generator, batch=batch, weights_bytes=size)


def _weights_bytes(folder: Path) -> int:
    """Return the bytes of a bundle's weights, the largest part of what an open model takes."""
    files = load_manifest(folder).files
    return sum(file.size_bytes for file in files if Path(file.path).suffix == ".bin")
