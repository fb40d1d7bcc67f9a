"""The models that a worker holds open, within a budget of memory."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from ldm_runtime.adapters.files import adapter_sha256
from ldm_runtime.bundle.files import sha256_of
from ldm_runtime.bundle.manifest import MANIFEST_NAME, load_manifest
from ldm_runtime.closing import Closing
from ldm_runtime.errors import LdmError, RequestError
from ldm_runtime.generator import Generator
from ldm_runtime.pipeline.continuous import ContinuousBatch
from ldm_serve.adapters import AdapterUse, alias_of, paths_that_fit
from ldm_serve.settings import EngineSettings

_LOGGER = logging.getLogger(__name__)

#: What tells open models apart: the name of the bundle, and the adapters in it.
_Key: TypeAlias = tuple[str, tuple[AdapterUse, ...]]


@dataclass(frozen=True, kw_only=True, eq=False)
class OpenBatch:
    """An open model and the batch of its requests.

    Attributes:
        generator: The model.
        batch: Its requests.
        weights_bytes: Bytes of its weights.
        is_live: Whether its adapters are inputs, which each request scales.
    """

    generator: Generator
    batch: ContinuousBatch
    weights_bytes: int
    is_live: bool

    def scales(self, adapters: Sequence[AdapterUse]) -> dict[str, float]:
        """Return the scales of adapters for a request, none where they are merged.

        Raises:
            LdmError: An adapter is not the one that the request was checked against.
        """
        if not self.is_live:
            return {}
        live = self.generator.live_adapters
        files = {} if live is None else live.files
        for each in adapters:
            if each.name not in files or files[each.name].sha256 != each.sha256:
                raise _has_changed(each)
        return {each.name: each.scale for each in adapters}


class OpenModels(Closing):
    """Models by name and adapters, opened when they are first asked for; used by one thread.

    Args:
        bundles: Folder of every model.
        settings: How they are opened.
    """

    def __init__(self, bundles: Mapping[str, Path], settings: EngineSettings) -> None:
        self._bundles, self._settings = bundles, settings
        self._open: dict[_Key, OpenBatch] = {}  # the least recently used first

    def open(
        self, name: str, adapters: Sequence[AdapterUse] = (), sha256: str | None = None
    ) -> OpenBatch | None:
        """Return a model; None if it must wait until a busy one can be closed.

        Args:
            name: Its name.
            adapters: Adapters that are merged into it, in their order; or that a request scales.
            sha256: Hash that the manifest of its bundle must have; None takes any.

        Raises:
            RequestError: An adapter cannot be merged at its scale.
            BundleError: The bundle is incomplete or altered.
            BackendError: The backend cannot run here.
            LdmError: The bundle, or the file of an adapter, is another one now.
        """
        key = name, () if self._settings.live_adapters else tuple(adapters)
        if key in self._open:
            opened = self._open[key] = self._open.pop(key)
            _check_bundle(name, opened.generator.bundle_sha256, sha256)
            return opened
        size = self._weights_bytes(name, sha256)
        if not self._make_room(key, size):
            return None
        self._open[key] = self._opened(key, size, sha256)
        _LOGGER.info("opened %s: %s", alias_of(*key), self._open[key].generator)
        return self._open[key]

    def busy(self) -> list[OpenBatch]:
        """Return the models that have requests."""
        return [each for each in self._open.values() if each.batch]

    def close(self) -> None:
        """Close all models. Closing twice is harmless."""
        for key in list(self._open):
            self._close(key)

    def _make_room(self, key: _Key, size: int) -> bool:
        """Close idle models until another fits, if need be all of them."""
        while surplus := self._surplus(key, size):
            idle = next((each for each in surplus if not self._open[each].batch), None)
            if idle is None:
                return False
            self._close(idle)
        return True

    def _surplus(self, key: _Key, size: int) -> list[_Key]:
        """Return the models of which one is to be closed before another is opened, if any."""
        budget = self._settings.memory_budget_bytes
        adapted = [each for each in self._open if each[1]]
        if key[1] and len(adapted) >= self._settings.max_adapted:
            return adapted
        is_beyond = budget is not None and self._held() + size > budget
        return list(self._open) if is_beyond else []

    def _held(self) -> int:
        return sum(each.weights_bytes for each in self._open.values())

    def _close(self, key: _Key) -> None:
        opened = self._open.pop(key)
        opened.batch.close()
        opened.generator.close()
        _LOGGER.info("closed %s", alias_of(*key))

    def _weights_bytes(self, name: str, sha256: str | None) -> int:
        """Return the bytes of a bundle's weights, the largest part of what an open model takes."""
        folder = self._bundles[name]
        path = folder / MANIFEST_NAME
        if path.is_file():
            _check_bundle(name, sha256_of(path), sha256)
        files = load_manifest(folder).files
        return sum(file.size_bytes for file in files if Path(file.path).suffix == ".bin")

    def _opened(self, key: _Key, size: int, sha256: str | None) -> OpenBatch:
        (name, adapters), settings = key, self._settings
        with ExitStack() as stack:
            generator = stack.enter_context(
                _generator(self._bundles[name], adapters, settings, sha256)
            )
            batch = generator.open_batch(max_batch=settings.max_batch)
            stack.pop_all()
        return OpenBatch(
            generator=generator,
            batch=batch,
            weights_bytes=size,
            is_live=settings.live_adapters,
        )


def _generator(
    folder: Path, adapters: Sequence[AdapterUse], settings: EngineSettings, sha256: str | None
) -> Generator:
    files = {_file_of(each, settings.adapters): each.scale for each in adapters}
    live = paths_that_fit(settings.adapters, folder) if settings.live_adapters else {}
    try:
        return Generator(
            folder,
            backend=settings.backend,
            precision=settings.precision,
            threads=settings.threads,
            low_memory=settings.low_memory,
            trust_engines=settings.trust_engines,
            adapters=files,
            live_adapters=live,
            sha256=sha256,
        )
    except RequestError as error:
        raise _with_names(error, settings.adapters) from error


def _with_names(error: RequestError, files: Mapping[str, Path]) -> RequestError:
    """Return an error that clients may see: where files lie is the operator's own business."""
    message = str(error).removeprefix(f"{error.field}: ")
    for name, path in files.items():
        message = message.replace(str(path), name)
    return RequestError(error.field, message)


def _file_of(adapter: AdapterUse, files: Mapping[str, Path]) -> Path:
    """Return the file of an adapter.

    Raises:
        LdmError: It is not the one that a request was checked against.
    """
    file = files[adapter.name]
    try:
        found = adapter_sha256(file)
    except (OSError, ValueError) as error:
        found = getattr(error, "strerror", None) or str(error)
    if found != adapter.sha256:
        _LOGGER.error("the adapter in %s was %s, and is %s", file, adapter.sha256, found)
        raise _has_changed(adapter)
    return file


def _has_changed(adapter: AdapterUse) -> LdmError:
    return LdmError(f"the file of the adapter {adapter.name!r} has changed; start again with it")


def _check_bundle(name: str, found: str, expected: str | None) -> None:
    """Check that a bundle is the one that a request was checked against.

    Raises:
        LdmError: It is not.
    """
    if expected not in (None, found):
        _LOGGER.error("the manifest of model %s was %s, and is %s", name, expected, found)
        raise LdmError(
            f"the bundle of model {name!r} was replaced since the start; start the server, or the "
            "batch, again"
        )
