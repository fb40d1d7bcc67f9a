"""The first lines of a description: of a bundle, what people want to know before all else."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ldm_runtime.diagnostics.inspection import able_backends, readable
from ldm_runtime.escaping import printable

_LABEL_WIDTH = 12
_MOST_NAMED = 6  # entries of a property
_MOST_LABELS = 3
_DIGITS = 12  # of a hash, enough to tell bundles apart


def summary(description: Mapping[str, Any]) -> str:
    """Format a description in few lines; `inspection.readable` has the rest.

    Eight lines for a bundle, a property per line for any other file but an image, whose description
    is short.
    """
    match description.get("kind"):
        case "bundle":
            lines = _bundle_lines(description)
        case "image":
            return readable(description)
        case _:
            lines = _short_lines(description)
    return "\n".join(f"{name:<{_LABEL_WIDTH}}{printable(value)}" for name, value in lines)


def _bundle_lines(bundle: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    spec, defaults, build = bundle["spec"], bundle["spec"]["defaults"], bundle["build"]
    yield "task", spec["task"]
    predicts = f"predicts {spec['prediction_type']}{_edm(spec['edm'])}"
    yield "model", f"{spec['family']}, {predicts}, {bundle['weights_dtype']} weights"
    if names := spec["label_names"]:
        yield "labels", f"{len(names)}, {', '.join(names[:_MOST_LABELS])}, ..."
    megabytes = f"{bundle['size_bytes'] / 1e6:.1f} MB on disk"
    yield "size", f"{defaults['width']}x{defaults['height']} pixels by default; {megabytes}"
    yield "backends", f"{able_backends(bundle['backends'])}, of {', '.join(bundle['backends'])}"
    yield "engines", ", ".join(map(_engine, bundle["engines"])) or "none"
    if quantization := bundle["quantization"]:
        layers, lowest = quantization["layers"], min(quantization["psnr"])
        yield "int8", f"{layers} layers of the UNet; images have {lowest:.1f} dB or more to fp32"
    yield "date", f"{bundle['date']}; manifest.json has sha256 {bundle['sha256']}"
    yield "checkpoint", f"{build['checkpoint']}, sha256 {build['checkpoint_sha256'][:_DIGITS]}..."
    for part in build["components"]:
        sha256 = part["sha256"][:_DIGITS]
        yield "components", f"{part['component']} from {part['file']}, sha256 {sha256}..."
    yield "verified", _parity(bundle["components"])


def _engine(engine: Mapping[str, Any]) -> str:
    return f"{engine['component']} for {'/'.join(engine['targets'])}"


def _parity(components: Sequence[Mapping[str, Any]]) -> str:
    """Return the largest error that the export measured with each kind of graph."""
    errors: dict[str, float] = {}
    for record in (each for component in components for each in component["parity"]):
        variant, error = record["variant"], record["max_relative_error"]
        errors[variant] = max(error, errors.get(variant, 0.0))
    measured = ", ".join(f"{error:.1e} in {variant}" for variant, error in sorted(errors.items()))
    at_export = f"at export, largest error {measured}; " if measured else ""
    return f"{at_export}here: by `ldm verify`"


def _edm(edm: Mapping[str, float] | None) -> str:
    return "" if edm is None else f" (EDM, sigma {edm['sigma_min']:g} to {edm['sigma_max']:g})"


def _short_lines(description: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield every property that is there, long ones by how many entries they have."""
    width = max(map(len, description), default=0) + 2
    for name, value in description.items():
        if value is not None:
            yield f"{name:<{width}}", _short(value)


def _short(value: object) -> str:
    if isinstance(value, Mapping | list | tuple):
        has_records = any(isinstance(each, Mapping) for each in value)
        if has_records or len(value) > _MOST_NAMED:
            return f"{len(value)} entries, with --full"
        return ", ".join(map(str, value)) or "none"
    return str(value)
