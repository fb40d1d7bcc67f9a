"""The adapters that a server or a batch has, by name, and those that a request chooses.

A request names no file: the names are those that the operator gave.
"""

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TypeAlias

import msgspec

from ldm_runtime.adapters.files import AdapterFile, read_adapter
from ldm_runtime.adapters.live import LiveAdapters
from ldm_runtime.adapters.merging import Adapter, MergedAdapters
from ldm_runtime.bundle.manifest import load_manifest
from ldm_runtime.errors import RequestError
from ldm_runtime.inputs.reading import shown
from ldm_runtime.suggestions import did_you_mean

_LOGGER = logging.getLogger(__name__)

#: Largest scale, up or down; what is beyond is a slip, and far beyond what networks can compute.
MAX_SCALE = 10.0
#: What separates names from scales and from each other, and ends a tag in a prompt.
_SEPARATOR = re.compile(r"[@+:,<>=\s]")


class AdapterChoice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An adapter that a request names.

    Attributes:
        name: Its name.
        scale: Factor of its updates.
    """

    name: str
    scale: float = 1.0


#: What a request has: a list, or text such as "style@0.7+other@0.3".
AdapterChoices: TypeAlias = list[AdapterChoice] | str


class AdapterUse(msgspec.Struct, frozen=True, kw_only=True):
    """An adapter in a model that generates.

    Attributes:
        name: Its name.
        sha256: Hash of its file.
        scale: Factor of its updates, not 0.
    """

    name: str
    sha256: str
    scale: float


@dataclass(frozen=True, kw_only=True)
class NamedAdapter:
    """An adapter that requests can name.

    Attributes:
        name: Its name.
        path: Its file.
        sha256: Hash of the file.
        metadata: The file's own: untrusted text.
    """

    name: str
    path: Path
    sha256: str
    metadata: Mapping[str, str]


def adapter_paths(texts: Iterable[str]) -> dict[str, Path]:
    """Return the absolute paths of adapters by name, from `NAME=FILE` or the file alone.

    Raises:
        RequestError: A name is given twice, or cannot be told from what stands around it.
    """
    paths: dict[str, Path] = {}
    for text in texts:
        name, equals, file = text.partition("=")
        name, path = (name, Path(file)) if equals else (Path(text).stem, Path(text))
        if not name or _SEPARATOR.search(name):
            raise RequestError(
                "adapter",
                f"{shown(name)!r} cannot be a name, which has neither spaces nor any of @+:,<>=; "
                f"say NAME={path}",
            )
        if name in paths:
            raise RequestError("adapter", f"two are called {name!r}; say {name}2={path}")
        paths[name] = path.absolute()
    return paths


def fitting_adapters(
    paths: Mapping[str, Path], bundles: Mapping[str, Path], *, live: bool = False
) -> dict[str, Mapping[str, NamedAdapter]]:
    """Return the adapters of every model, in the order of their names.

    Args:
        paths: Their files.
        bundles: Folder of every model.
        live: Whether they are to be inputs of the networks.

    Raises:
        RequestError: A file cannot be read, is another one's, fits none of the models, or cannot be
            an input.
        BundleError: A folder is not a bundle.
    """
    fitting: dict[str, dict[str, NamedAdapter]] = {model: {} for model in bundles}
    files = _read_all(paths)
    for name, file in files.items():
        adapter = NamedAdapter(
            name=name, path=paths[name], sha256=file.sha256, metadata=file.metadata
        )
        reasons = {model: _why_not(file, folder) for model, folder in bundles.items()}
        for model in (model for model, reason in reasons.items() if reason is None):
            fitting[model][name] = adapter
        if None not in reasons.values():
            model, reason = next(iter(reasons.items()))
            raise RequestError("adapter", f"{name!r} fits none of the models, {model}: {reason}")
    if live:
        for model, adapters in fitting.items():
            _check_live({name: files[name] for name in adapters}, bundles[model])
    return {model: MappingProxyType(adapters) for model, adapters in fitting.items()}


def paths_that_fit(paths: Mapping[str, Path], bundle: Path) -> dict[str, Path]:
    """Return the adapters, by name, that fit a bundle; what cannot be read any more is left out.

    Raises:
        BundleError: The folder is not a bundle.
    """
    fitting = {}
    for name, path in paths.items():
        try:
            file = read_adapter(path)
        except ValueError as error:
            _LOGGER.error("the adapter %r is left out: %s", name, error)
            continue
        if _why_not(file, bundle) is None:
            fitting[name] = path
    return fitting


def chosen_adapters(
    choices: AdapterChoices, adapters: Mapping[str, NamedAdapter], field: str = "adapters"
) -> tuple[AdapterUse, ...]:
    """Return the adapters that a request asks for, sorted by name; a scale of 0 leaves one out.

    Args:
        choices: What the request has.
        adapters: The adapters of its model.
        field: Name of the field, for messages.

    Raises:
        RequestError: One is unknown, there twice, or has a scale beyond `MAX_SCALE`.
    """
    known = f"the adapters of this model are {', '.join(adapters) or 'none'}"
    uses: dict[str, AdapterUse] = {}
    for choice in _parsed(choices, field, known) if isinstance(choices, str) else choices:
        name = shown(choice.name)
        if choice.name not in adapters:
            hint = did_you_mean(name, adapters)
            raise RequestError(field, f"there is no adapter {name!r}{hint}; {known}")
        if choice.name in uses:
            raise RequestError(field, f"has the adapter {name!r} twice; {known}")
        if not abs(choice.scale) <= MAX_SCALE:  # nor is it a number
            raise RequestError(
                field,
                f"the scale of {name!r} must be from {-MAX_SCALE:g} to {MAX_SCALE:g}, got "
                f"{choice.scale:g}; {known}",
            )
        sha256 = adapters[choice.name].sha256
        uses[choice.name] = AdapterUse(name=choice.name, sha256=sha256, scale=choice.scale)
    return tuple(uses[name] for name in sorted(uses) if uses[name].scale)


def alias_of(model: str, uses: Iterable[AdapterUse]) -> str:
    """Return the name of a model with adapters, as in "engines:other@0.3+style"."""
    parts = [use.name if use.scale == 1 else f"{use.name}@{use.scale!r}" for use in uses]
    return f"{model}:{'+'.join(parts)}" if parts else model


def _read_all(paths: Mapping[str, Path]) -> dict[str, AdapterFile]:
    """Return the adapters by name, sorted."""
    files: dict[str, AdapterFile] = {}
    names: dict[str, str] = {}
    for name in sorted(paths):
        try:
            files[name] = read_adapter(paths[name])
        except ValueError as error:
            raise RequestError("adapter", str(error)) from error
        first = names.setdefault(files[name].sha256, name)
        if first != name:
            raise RequestError("adapter", f"{first!r} and {name!r} are one file; leave one out")
    return files


def _why_not(file: AdapterFile, bundle: Path) -> str | None:
    """Say why an adapter does not fit a bundle; None if it does."""
    adapters = [Adapter(file=file, scale=1.0)]
    try:
        MergedAdapters(adapters, bundle, load_manifest(bundle)).check_shapes()
    except (ValueError, RequestError) as error:
        return str(error)
    return None


def _check_live(files: Mapping[str, AdapterFile], bundle: Path) -> None:
    """Check that adapters can be inputs of the networks of a bundle that they fit."""
    try:
        LiveAdapters(files, bundle, load_manifest(bundle))
    except ValueError as error:
        raise RequestError("live_adapters", str(error)) from error


def _parsed(text: str, field: str, known: str) -> list[AdapterChoice]:
    """Return the adapters of a text such as "style@0.7+other"."""
    choices = []
    for part in text.split("+"):
        name, at, scale = part.partition("@")
        try:
            choices.append(AdapterChoice(name, float(scale) if at else 1.0))
        except ValueError:
            raise RequestError(
                field,
                f"the scale of {shown(name)!r} must be a number, got {shown(scale)!r}; {known}",
            ) from None
    return choices
