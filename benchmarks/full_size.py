"""Measure released models at their full size, with random weights: the paper's, and SD 1 to SDXL.

    python benchmarks/full_size.py                  # all rows that are not there yet: hours
    python benchmarks/full_size.py --only bsr_sr    # one of them
    python benchmarks/full_size.py --report         # the table of what is there
    python benchmarks/full_size.py --smoke --only bsr_sr    # the same layers, narrow: two minutes

For each: write a checkpoint, export it with `ldm-export` in its own process, run the golden
outputs again, run the fp16 graphs at full size, build TensorRT-RTX engines (no GPU needed). A row
is appended to `results/full_size.jsonl` as soon as it is measured (`--smoke` needs `--results` for
that), so that the command goes on where it was interrupted. The largest model takes 28 GB of disk
until its row is there, and 15 GB of memory.
"""

import argparse
import hashlib
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines_full_size import measure_bundle
from export_full_size import write_checkpoint
from ldm_runtime.backends.host_memory import available_bytes
from ldm_runtime.errors import LdmError
from measuring.rows import append_line, commit, machine, read_records
from measuring.watched_export import ask, measure_export, run_apart
from released.full_size_report import report
from released.narrow_models import narrowed
from released.records import ReleasedModel
from released.released_models import MODELS

if TYPE_CHECKING:
    from ldm_runtime.bundle.manifest import Manifest

RESULTS = Path(__file__).parent / "results/full_size.jsonl"
_PROBE = Path(__file__).parent / "released/full_size_probe.py"
#: Bytes for every weight, beside those of the checkpoint: of disk, a bundle in fp16, an engine file
#: and the files of its build; of memory, for writing the checkpoint or exporting a network.
_DISK_A_WEIGHT, _MEMORY_A_WEIGHT = 6, 2
_SPARE_BYTES = 1_500_000_000
#: Fields of a `ModelSpec` that must come back from the checkpoint as they went in.
_HYPERPARAMETERS = ("task", "networks")

Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command: 0 on success, 1 if a row could not be measured as it should."""
    args = build_parser().parse_args(argv)
    results = args.results or (None if args.smoke else RESULTS)
    rows = kept_rows(results)
    if args.report:
        print("\n".join(report(rows)))
        return 0
    failed = []
    for name in args.only or MODELS:
        model = narrowed(MODELS[name]) if args.smoke else MODELS[name]
        if is_measured(rows, model, engines=not args.skip_engines) and not args.again:
            print(f"{name} is there already; --again measures it once more", file=sys.stderr)
            continue
        print(f"{model.name}:", file=sys.stderr, flush=True)
        row = measured_row(model, args.folder, engines=not args.skip_engines)
        rows.append(row)
        if results is not None:
            append_line(results, row)
        if row["failure"]:
            failed.append(name)
    print("\n".join(report(rows)))
    if failed:
        print(f"error: these failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", action="append", choices=tuple(MODELS), help="one row, or some")
    parser.add_argument("--skip-engines", action="store_true", help="build no engines")
    parser.add_argument("--again", action="store_true", help="measure what is there, too")
    parser.add_argument("--report", action="store_true", help="print the table and stop")
    parser.add_argument("--smoke", action="store_true", help="the same layers, narrow")
    parser.add_argument("--folder", type=Path, help="where to put files (default: temporary)")
    parser.add_argument("--results", type=Path, help=f"file of the rows (default: {RESULTS.name})")
    return parser


def row_key(model: ReleasedModel) -> str:
    """Return the hash of all that decides a bundle: hyperparameters, cache version, versions.

    A change of code that changes bundles raises the cache version, see `ldm_export.source`.
    """
    import msgspec

    from ldm_export.source import CACHE_VERSION, versions
    from ldm_runtime.bundle.manifest import SCHEMA_VERSION, encode_networks

    features = [CACHE_VERSION, SCHEMA_VERSION, versions(), model]
    encoded = msgspec.json.encode(features, enc_hook=encode_networks, order="sorted")
    return hashlib.sha256(encoded).hexdigest()


def kept_rows(results: Path | None) -> list[Row]:
    """Return the rows of a file, or none if it is not there."""
    if results is None or not results.is_file():
        return []
    return read_records(results)


def is_measured(rows: Sequence[Row], model: ReleasedModel, *, engines: bool) -> bool:
    """Tell whether there is a row of this model and code, without failure and with its engines."""
    key = row_key(model)
    return any(
        row["key"] == key and not row["failure"] and (row["engines_asked"] or not engines)
        for row in rows
    )


def measured_row(model: ReleasedModel, folder: Path | None, *, engines: bool) -> Row:
    """Return the row of a model; `failure` says in a sentence why it is not whole."""
    row: Row = {
        "name": model.name,
        "key": row_key(model),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": machine(),
        "engines_asked": engines,
        "failure": None,
    }
    try:
        with tempfile.TemporaryDirectory(prefix="ldm-full-size-", dir=folder) as place:
            _check_room(model, Path(place))
            _measure(row, model, Path(place), engines=engines)
            row["failure"] = _fault(row)
    except (RuntimeError, LdmError, OSError) as error:
        row["failure"] = str(error)
    return row


def _measure(row: Row, model: ReleasedModel, place: Path, *, engines: bool) -> None:
    """Add what is measured to a row, part by part: what is there stays if a later one fails."""
    from ldm_runtime.bundle.manifest import load_manifest

    checkpoint, bundle = place / "random.ckpt", place / "engines"
    print("  writing a random checkpoint", file=sys.stderr, flush=True)
    run_apart(write_checkpoint, "writing the checkpoint", checkpoint, model)
    row["checkpoint_bytes"] = checkpoint.stat().st_size
    row["export"] = asdict(measure_export(checkpoint, bundle, "fp16"))
    checkpoint.unlink()
    row |= _of_manifest(load_manifest(bundle), model)
    row["bundle_bytes"] = sum(each.stat().st_size for each in bundle.rglob("*") if each.is_file())
    print("  golden outputs, and fp16 at full size", file=sys.stderr, flush=True)
    row |= ask(_PROBE, str(bundle)).value
    row |= {"engines": [], "why_no_engines": {}}
    if engines:
        print("  engines", file=sys.stderr, flush=True)
        row |= _engines(bundle, place)


def _of_manifest(manifest: "Manifest", model: ReleasedModel) -> Row:
    """Return the features that a bundle records, and where they differ from the model."""
    worst: dict[str, dict[str, float]] = {"max_relative_error": {}, "relative_l2": {}}
    for component in manifest.components:
        for record in component.parity:
            measure = "relative_l2" if record.variant == "fp16" else "max_relative_error"
            if record.variant == "fp16" or record.reference == "stored":
                known = worst[measure].get(component.name, 0.0)
                worst[measure][component.name] = max(known, getattr(record, measure))
    return {
        "family": manifest.spec.family,
        "versions": manifest.build.versions,
        "assumptions": len(manifest.spec.assumptions),
        "differs": [
            f"{name}: {getattr(manifest.spec, name)} instead of {getattr(model, name)}"
            for name in _HYPERPARAMETERS
            if getattr(manifest.spec, name) != getattr(model, name)
        ],
        "fp32_max_relative_error": worst["max_relative_error"],
        "fp16_relative_l2": worst["relative_l2"],
    }


def _engines(bundle: Path, place: Path) -> Row:
    try:
        builds, reasons = measure_bundle(bundle, place)
    except LdmError as error:
        return {"why_no_engines": {"model": str(error)}}
    return {"engines": [asdict(build) for build in builds], "why_no_engines": reasons}


def _fault(row: Mapping[str, Any]) -> str | None:
    """Return the first promise that a measured row breaks."""
    if row["differs"]:
        return f"recognised as something else: {row['differs'][0]}"
    if row["golden"]["failed"]:
        return f"golden outputs: {row['golden']['failed'][0]}"
    broken = [name for name, each in row["fp16_at_size"].items() if not each["finite"]]
    return f"the fp16 graph of {broken[0]} gives NaN or infinity" if broken else None


def _check_room(model: ReleasedModel, place: Path) -> None:
    weights = 1e6 * sum(model.parameters_millions)
    checkpoint_bytes = (2 if model.half else 4) * weights
    free = shutil.disk_usage(place).free
    if free < (wanted := checkpoint_bytes + _DISK_A_WEIGHT * weights + _SPARE_BYTES):
        raise RuntimeError(
            f"{place.parent} has {free / 1e9:.0f} GB free, but this takes {wanted / 1e9:.0f} GB; "
            "give --folder another place"
        )
    available = available_bytes(swap=False)
    if available < (wanted := checkpoint_bytes + _MEMORY_A_WEIGHT * weights + _SPARE_BYTES):
        raise RuntimeError(
            f"{available / 1e9:.1f} GB of memory are free, but this takes {wanted / 1e9:.1f} GB; "
            "wait for other programs to end"
        )


if __name__ == "__main__":
    sys.exit(main())
