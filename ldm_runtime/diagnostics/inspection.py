"""Description of a file or folder: a bundle, an image, an adapter, or another known format.

Packages add formats through the entry point group `ldm_runtime.inspectors`: functions from a path
to a dictionary, or to None for a file of another format.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import msgspec

from ldm_runtime.backends import BACKENDS, why_not
from ldm_runtime.bundle.files import sha256_of
from ldm_runtime.bundle.manifest import MANIFEST_NAME, encode_networks, load_manifest
from ldm_runtime.diagnostics.adapter_inspection import inspect_adapter
from ldm_runtime.engines.records import load_engine_records
from ldm_runtime.errors import LdmError
from ldm_runtime.escaping import printable
from ldm_runtime.pipeline.image_files import read_metadata
from ldm_runtime.version import extra

INSPECTORS_GROUP = "ldm_runtime.inspectors"

Inspector = Callable[[Path], dict[str, Any] | None]

# Of PNG, JPEG and WebP; dots stand for the length of a WebP file.
_IMAGE = re.compile(rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|RIFF....WEBP", re.DOTALL)
_SIGNATURE_BYTES = 12
_LONG = 16


def inspect(
    path: Path, inspectors: Mapping[str, Callable[[], Inspector]] | None = None
) -> dict[str, Any]:
    """Describe the file or folder at `path`; the key "kind" says what it is.

    What an image says of itself is under "metadata": it may say anything.

    Args:
        path: A bundle, an image made by `ldm generate`, an adapter, or what an inspector knows.
        inspectors: Loader of each inspector; None is those of the installed packages.

    Raises:
        LdmError: Nothing is there, its format is unknown, or it is damaged.
    """
    known = _installed() if inspectors is None else inspectors
    if path.is_dir():
        is_bundle = (path / MANIFEST_NAME).is_file()
        found = None if is_bundle else _ask_inspectors(path, known)[0]
        return found or _inspect_bundle(path)
    if _starts_like_image(path):
        return {"kind": "image", "path": str(path), "metadata": read_metadata(path)}
    if path.is_file() and (adapter := inspect_adapter(path)) is not None:
        return adapter
    found, missing = _ask_inspectors(path, known)
    if found is not None:
        return found
    hint = (
        f"these inspectors do not load: {', '.join(missing)}; install {extra('export')}"
        if missing
        else "it is not a bundle, nor an image, adapter or checkpoint of a known format"
    )
    raise LdmError(f"cannot tell what {path} is: {hint}")


def readable(description: Mapping[str, Any]) -> str:
    """Format a description as text, one property per line, without those that are None.

    A bundle is summarized.
    """
    if description.get("kind") == "bundle":
        description = {
            **description,
            "components": {each["name"]: _summary(each) for each in description["components"]},
            "engines": dict(map(_engine_summary, description.get("engines", ()))),
            "backends": able_backends(description.get("backends", {})),
            "files": len(description["files"]),
            "preview": _preview_summary(description.get("preview")),
        }
    return "\n".join(_lines(description))


def able_backends(reasons: Mapping[str, str | None]) -> str:
    """Return which backends can run here, given why each of them cannot."""
    able = [name for name, reason in reasons.items() if reason is None]
    return f"{', '.join(able) or 'none'} can run here"


def _lines(value: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    for key, each in value.items():
        if inner := _inner(each):
            yield f"{indent}{printable(key)}:"
            yield from _lines(inner, f"{indent}  ")
        elif each is not None:
            yield f"{indent}{printable(key)}: {printable(each)}"


def _inner(value: object) -> Mapping[str, Any]:
    """Return the nested properties of a value: a record's fields, a list's items by number."""
    if isinstance(value, Mapping):
        return value
    if isinstance(value, list | tuple) and any(isinstance(each, Mapping | list) for each in value):
        return {str(number): each for number, each in enumerate(value)}
    return {}


def _summary(component: Mapping[str, Any]) -> str:
    parts = []
    for graph in component["graphs"]:
        errors = [
            each["max_relative_error"]
            for each in component["parity"]
            if each["variant"] == graph["variant"]
        ]
        measured = f" (max relative error {max(errors):.1e})" if errors else ""
        parts.append(f"{graph['variant']} graph{measured}")
    if len({graph["file"] for graph in component["graphs"]}) < len(parts):
        parts.append("both one file: half precision cannot hold this network")
    return ", ".join(parts)


def _preview_summary(preview: Mapping[str, Any] | None) -> str | None:
    return None if preview is None else f"explains {preview['r2']:.0%} of an image's colours"


def _engine_summary(engine: Mapping[str, Any]) -> tuple[str, str]:
    """Return the name of an engine and its description."""
    shapes = [
        f"{each['input']} {_times(each['min'])} to {_times(each['max'])}"
        if each["min"] != each["max"]
        else f"{each['input']} {_times(each['min'])}"
        for each in engine["profiles"]
    ]
    built_with = f"{engine['builder']} {engine['builder_version']}"
    gpu = [engine["gpu_name"]] if engine["gpu_name"] else []
    megabytes = f"{engine['size_bytes'] / 1e6:.1f} MB"
    name = f"{engine['component']} for {', '.join(engine['targets'])}"
    return name, ", ".join((built_with, *gpu, megabytes, *shapes, *engine["flags"]))


def _times(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _starts_like_image(path: Path) -> bool:
    if path.exists() and not path.is_file():  # a pipe, say, which reading would wait for
        raise LdmError(f"{path} is neither a file nor a folder; give one of these")
    try:
        with path.open("rb") as file:
            return _IMAGE.match(file.read(_SIGNATURE_BYTES)) is not None
    except OSError as error:
        raise LdmError(f"{path} cannot be read: {error.strerror}") from error


def _inspect_bundle(path: Path) -> dict[str, Any]:
    manifest = load_manifest(path)
    description: dict[str, Any] = msgspec.to_builtins(manifest, enc_hook=encode_networks)
    engines = msgspec.to_builtins(load_engine_records(path, manifest))
    return {
        "kind": "bundle",
        "path": str(path),
        "sha256": sha256_of(path / MANIFEST_NAME),
        "date": _date_of(path / MANIFEST_NAME),
        "backends": {name: why_not(name, manifest, path) for name in BACKENDS},
        "size_bytes": sum(record.size_bytes for record in manifest.files),
        **_shortened(description | {"engines": engines}),
        "quantization": description["quantization"],  # its images are few, and each counts
    }


def _date_of(path: Path) -> str:
    """Return when a file was last written, in UTC to the minute."""
    written = datetime.fromtimestamp(path.stat().st_mtime, tz=UTC)
    return f"{written:%Y-%m-%d %H:%M} UTC"


def _shortened(value: Any) -> Any:  # noqa: ANN401  (JSON)
    """Replace long lists of numbers, such as a training schedule, by their ends."""
    if isinstance(value, dict):
        return {key: _shortened(each) for key, each in value.items()}
    if not isinstance(value, list | tuple):
        return value
    if len(value) > _LONG and all(isinstance(each, float) for each in value):
        return {"length": len(value), "first": value[0], "last": value[-1]}
    return [_shortened(each) for each in value]


def _installed() -> dict[str, Callable[[], Inspector]]:
    return {point.name: point.load for point in entry_points(group=INSPECTORS_GROUP)}


def _ask_inspectors(
    path: Path, inspectors: Mapping[str, Callable[[], Inspector]]
) -> tuple[dict[str, Any] | None, list[str]]:
    """Return the first description, or None, and the inspectors that do not load."""
    missing: list[str] = []
    for name, load in inspectors.items():
        try:
            description = load()(path)
        except ImportError as error:  # of the inspector, or of what it needs for this file alone
            missing.append(f"{name} ({error})")
            continue
        if description is not None:
            return description, missing
    return None, missing
