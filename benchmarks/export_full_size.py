"""Measure the export of a checkpoint of Stable Diffusion 1.5's size, with random weights.

    python benchmarks/export_full_size.py           # needs 6 GB of disk (10 GB with --dtype fp32)
    python benchmarks/export_full_size.py --tiny    # the same layers, narrow: two minutes

Prints a table and appends one line of JSON to `results/export_full_size.jsonl` (not for `--tiny`).
Checkpoint and bundle go to a temporary folder and are removed.
"""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm_runtime.specs.networks import AutoencoderSpec, Networks, TextEncoderSpec, UNetSpec
from measuring.rows import ROOT, append_line, as_line, commit, machine
from measuring.watched_export import Measurement, measure_export, run_apart, step_seconds
from released.records import ReleasedModel
from released.released_models import MODELS

if TYPE_CHECKING:
    from ldm_runtime.bundle.manifest import Manifest

__all__ = ["stable_diffusion_1", "step_seconds", "tiny", "write_checkpoint"]

RESULTS = Path(__file__).parent / "results/export_full_size.jsonl"
#: Promises of the README.
MAX_SECONDS, MAX_BYTES = 300.0, 8_000_000_000


def stable_diffusion_1() -> ReleasedModel:
    """Return the hyperparameters of Stable Diffusion 1.5, whose weights are in fp16."""
    return replace(MODELS["v1-5-pruned-emaonly"], half=True)


def tiny(model: ReleasedModel) -> ReleasedModel:
    """Return the same layers, as narrow as their normalisations allow."""
    full = model.networks
    networks = Networks(
        unet=replace(full.of(UNetSpec), model_channels=32, context_dim=64),
        autoencoder=replace(full.of(AutoencoderSpec), channels=32),
        text_encoder=replace(full.of(TextEncoderSpec), width=64, num_heads=1, feed_forward_dim=256),
    )
    return replace(model, networks=networks)


def write_checkpoint(path: Path, model: ReleasedModel) -> None:
    """Write a checkpoint as PyTorch Lightning did; it loads torch, so do it in another process."""
    from released import random_checkpoints

    random_checkpoints.write_checkpoint(path, model)


def as_record(
    measurement: Measurement, manifest: "Manifest", settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the row to keep."""
    worst = {
        f"{component.name}/{record.variant}/{record.reference}": record.relative_l2
        for component in manifest.components
        for record in sorted(component.parity, key=lambda each: each.relative_l2)
    }
    return {
        "name": "export_full_size",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": machine(),
        "versions": manifest.build.versions,
        "settings": dict(settings),
        "seconds": [measurement.seconds],
        "cpu_seconds": measurement.cpu_seconds,
        "steps": dict(measurement.steps),
        "peak_bytes": measurement.peak_bytes,
        "peak_anonymous_bytes": measurement.peak_anonymous_bytes,
        "worst_relative_l2": worst,
    }


def table(record: Mapping[str, Any]) -> list[str]:
    """Return a record as lines for a person."""
    (total,), settings = record["seconds"], record["settings"]
    lines = [f"machine            {record['device']}"]
    lines += [f"{name:<19}{value}" for name, value in settings.items()]
    lines += [f"  {name:<17}{seconds:8.1f} s" for name, seconds in record["steps"].items()]
    lines += [
        f"  {'whole':<17}{total:8.1f} s (promised: {MAX_SECONDS:.0f} s, "
        f"{'kept' if total <= MAX_SECONDS else 'MISSED'})",
        f"  {'computing':<17}{record['cpu_seconds']:8.1f} s of CPU time",
        f"peak memory        {record['peak_bytes'] / 1e9:.2f} GB, "
        f"{record['peak_anonymous_bytes'] / 1e9:.2f} GB of it no mapped file (promised: "
        f"{MAX_BYTES / 1e9:.0f} GB, {'kept' if record['peak_bytes'] <= MAX_BYTES else 'MISSED'})",
    ]
    errors = record["worst_relative_l2"]
    return lines + [f"error of {name:<32}{error:.1e}" for name, error in errors.items()]


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="the same layers, narrow")
    parser.add_argument("--dtype", choices=("fp16", "fp32"), default="fp16", help="checkpoint's")
    parser.add_argument(
        "--weights-dtype", choices=("fp16", "fp32"), default="fp16", help="bundle's"
    )
    parser.add_argument("--folder", type=Path, help="where to put files (default: temporary)")
    parser.add_argument("--keep", action="store_true", help="leave checkpoint and bundle there")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command: 0 on success, 1 if the export failed."""
    args = build_parser().parse_args(argv)
    folder = Path(tempfile.mkdtemp(prefix="ldm-export-", dir=args.folder))
    try:
        record = _run(args, folder)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        print(
            f"error: the package {error.name!r} is not installed; "
            f"run `pip install -e '.[export,cpu]'` in {ROOT}",
            file=sys.stderr,
        )
        return 1
    finally:
        if not args.keep:
            shutil.rmtree(folder)
    print("\n".join(table(record)))
    print(as_line(record))
    if not args.tiny:
        append_line(RESULTS, record)
    return 0


def _run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from ldm_runtime.bundle.manifest import load_manifest

    model = tiny(stable_diffusion_1()) if args.tiny else stable_diffusion_1()
    checkpoint, out = folder / "random.ckpt", folder / "engines"
    print(f"writing a random checkpoint to {folder}", file=sys.stderr, flush=True)
    model = replace(model, half=args.dtype == "fp16")
    run_apart(write_checkpoint, "writing the checkpoint", checkpoint, model)
    measurement = measure_export(checkpoint, out, args.weights_dtype)
    settings = {
        "model": "tiny" if args.tiny else "stable-diffusion-1.5",
        "checkpoint_dtype": args.dtype,
        "weights_dtype": args.weights_dtype,
        "checkpoint_bytes": checkpoint.stat().st_size,
        "bundle_bytes": sum(each.stat().st_size for each in out.rglob("*") if each.is_file()),
    }
    return as_record(measurement, load_manifest(out), settings)


if __name__ == "__main__":
    sys.exit(main())
