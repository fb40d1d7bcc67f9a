"""The table that `full_size.py` prints of its rows, in Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from released.released_models import MODELS

_COLUMNS = (
    "model",
    "recognised as",
    "weights",
    "export",
    "peak memory",
    "bundle",
    "fp32 error",
    "fp16 L2",
    "decode",
    "golden",
    "fp16 finite",
    "engines",
)

_FLOAT32_BYTES = 4

Row = Mapping[str, Any]


def report(rows: Sequence[Row]) -> list[str]:
    """Return the last row of each model as lines of a table, and the failures below it.

    Models are in the order of `released_models`, and others before them.
    """
    places = {name: place for place, name in enumerate(MODELS)}
    latest = {row["name"]: row for row in sorted(rows, key=lambda row: places.get(row["name"], -1))}
    lines = [" | ".join(("", *_COLUMNS, "")).strip(), "|---" * len(_COLUMNS) + "|"]
    failures = []
    for name, row in latest.items():
        if row["failure"]:
            failures.append(f"{name}: {row['failure']}")
        if "why_no_engines" in row:  # the last that is measured
            lines.append("| " + " | ".join(_cells(row)) + " |")
            failures += [
                f"{name}: no engine of the {component}: {reason}"
                for component, reason in row["why_no_engines"].items()
            ]
    return [*lines, "", *failures] if failures else lines


def _cells(row: Row) -> tuple[str, ...]:
    golden, at_size = row["golden"], row["fp16_at_size"]
    return (
        row["name"],
        row["family"],
        f"{row['checkpoint_bytes'] / _FLOAT32_BYTES / 1e6:,.1f} M",
        f"{row['export']['seconds']:.0f} s",
        f"{row['export']['peak_bytes'] / 1e9:.2f} GB",
        f"{row['bundle_bytes'] / 1e9:.2f} GB",
        f"{max(row['fp32_max_relative_error'].values()):.1e}",
        f"{max(row['fp16_relative_l2'].values()):.1e}",
        "–" if "unet" in at_size else f"{row['decode_bytes'] / 2**20:.0f} MiB",
        f"{golden['worst_psnr']:.0f} dB" + (", FAILED" if golden["failed"] else ""),
        "yes" if all(each["finite"] for each in at_size.values()) else "NO",
        _engines(row),
    )


def _engines(row: Row) -> str:
    builds, missing = row["engines"], len(row["why_no_engines"])
    if not builds:
        return "none" if missing else "not built"
    seconds = sum(each["seconds"] for each in builds)
    peak = max(each["peak_bytes"] for each in builds)
    rest = f", {missing} missing" if missing else ""
    return f"{len(builds)} in {seconds:.0f} s, {peak / 1e9:.1f} GB{rest}"
