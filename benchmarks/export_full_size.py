"""Measure the export of a checkpoint of Stable Diffusion 1.5's size, with random weights.

    python benchmarks/export_full_size.py           # needs 6 GB of disk (10 GB with --dtype fp32)
    python benchmarks/export_full_size.py --tiny    # the same layers, narrow: two minutes

Prints a table and appends one line of JSON to `results/export_full_size.jsonl` (not for `--tiny`).
Checkpoint and bundle go to a temporary folder and are removed.
"""

import argparse
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rows import ROOT, as_line, commit, machine

if TYPE_CHECKING:
    import torch

    from ldm_runtime.manifest import AutoencoderSpec, Manifest, TextEncoderSpec, UNetSpec

RESULTS = Path(__file__).parent / "results/export_full_size.jsonl"
#: What the README promises.
MAX_SECONDS, MAX_BYTES = 300.0, 8_000_000_000
#: Size of the layers that training starts at zero, against the others: small, but there.
_LATE_GAIN = 0.5
_STAGE = re.compile(r"^(?P<stage>\w+) +(?:built|reused) in (?P<seconds>[\d.]+) s$")
_TICK_SECONDS = 0.05


@dataclass(frozen=True, kw_only=True)
class Model:
    """The networks of a checkpoint."""

    unet: "UNetSpec"
    autoencoder: "AutoencoderSpec"
    text_encoder: "TextEncoderSpec"


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What an export took.

    Attributes:
        seconds: From start to end of the process.
        cpu_seconds: Time its threads computed, which other programs disturb less.
        stages: Seconds of each stage, and of what lies before and after them; they add up.
        peak_bytes: Highest resident memory of the process, mapped files included.
        peak_anonymous_bytes: Highest part of it that is no mapped file, to 50 ms.
    """

    seconds: float
    cpu_seconds: float
    stages: Mapping[str, float]
    peak_bytes: int
    peak_anonymous_bytes: int


def stable_diffusion_1() -> Model:
    """Return the hyperparameters of Stable Diffusion 1.5."""
    from ldm_runtime.manifest import AutoencoderSpec, TextEncoderSpec, UNetSpec

    return Model(
        unet=UNetSpec(
            in_channels=4,
            out_channels=4,
            model_channels=320,
            channel_mult=(1, 2, 4, 4),
            num_res_blocks=2,
            transformer_depth=(1, 1, 1, 0),
            middle_depth=1,
            num_heads=8,
            num_head_channels=None,
            context_dim=768,
            linear_projection=False,
        ),
        autoencoder=AutoencoderSpec(
            kind="kl",
            image_channels=3,
            channels=128,
            channel_mult=(1, 2, 4, 4),
            num_res_blocks=2,
            attention_levels=(),
            z_channels=4,
            embed_dim=4,
            latent_scale_factor=0.18215,
        ),
        text_encoder=TextEncoderSpec(
            kind="clip",
            width=768,
            num_layers=12,
            num_heads=12,
            feed_forward_dim=3072,
            vocab_size=49408,
            max_tokens=77,
            activation="quick_gelu",
            pad_token_id=49407,
        ),
    )


def tiny(model: Model) -> Model:
    """Return the same layers, as narrow as their normalisations allow."""
    return Model(
        unet=replace(model.unet, model_channels=32, context_dim=64),
        autoencoder=replace(model.autoencoder, channels=32),
        text_encoder=replace(model.text_encoder, width=64, num_heads=1, feed_forward_dim=256),
    )


def write_checkpoint(path: Path, model: Model, *, half: bool) -> None:
    """Write a checkpoint in CompVis's layout as PyTorch Lightning did.

    Args:
        path: The file.
        model: Its networks.
        half: Whether weights are fp16; the schedule is fp32 either way.
    """
    import torch

    from ldm_export.networks.autoencoder import LatentDecoder, LatentEncoder
    from ldm_export.networks.clip import ClipTextEncoder
    from ldm_export.networks.unet import UNet

    with torch.device("meta"):
        networks = {
            "model.diffusion_model.": UNet(model.unet),
            "first_stage_model.": torch.nn.ModuleList(
                [LatentEncoder(model.autoencoder), LatentDecoder(model.autoencoder)]
            ),
            "cond_stage_model.transformer.": ClipTextEncoder(model.text_encoder),
        }
    state: dict[str, torch.Tensor] = dict(_schedule_buffers())
    random = torch.Generator().manual_seed(0)
    for prefix, network in networks.items():
        for name, parameter in network.named_parameters():
            name = prefix + re.sub(r"^\d+\.(?=(?:en|de)coder|(?:post_)?quant)", "", name)
            value = _random_weight(name, tuple(parameter.shape), random)
            state[name] = value.half() if half else value
    positions = torch.arange(model.text_encoder.max_tokens)[None]
    state["cond_stage_model.transformer.text_model.embeddings.position_ids"] = positions
    torch.save({"state_dict": state, "global_step": 0, "epoch": 0}, path)


def _random_weight(name: str, shape: tuple[int, ...], random: "torch.Generator") -> "torch.Tensor":
    """Return values that keep activations near one through all layers, and no layer at zero."""
    import torch

    value: torch.Tensor = torch.randn(shape, generator=random)
    if len(shape) == 1:  # biases, and gains of normalisations
        is_gain = "norm" in name or re.search(r"(?:in_layers|out_layers|\.out)\.0\.weight", name)
        return 0.1 * value + (1.0 if is_gain and name.endswith("weight") else 0.0)
    if "embedding" in name:
        return 0.5 * value
    is_late = re.search(r"out_layers\.3|proj_out|\.out\.2|to_out|net\.2|conv2|out_proj|fc2", name)
    spread: float = (_LATE_GAIN if is_late else 1.0) * value[0].numel() ** -0.5
    return value * spread


def _schedule_buffers() -> Iterator[tuple[str, "torch.Tensor"]]:
    import torch

    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
    alphas = torch.cumprod(1 - betas, 0)
    before = torch.cat([torch.ones(1, dtype=torch.float64), alphas[:-1]])
    buffers = {
        "betas": betas,
        "alphas_cumprod": alphas,
        "alphas_cumprod_prev": before,
        "sqrt_alphas_cumprod": alphas.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - alphas).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - alphas).log(),
        "sqrt_recip_alphas_cumprod": alphas.rsqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / alphas - 1).sqrt(),
        "posterior_variance": betas * (1 - before) / (1 - alphas),
    }
    yield from ((name, values.float()) for name, values in buffers.items())


def measure_export(checkpoint: Path, out: Path, weights_dtype: str) -> Measurement:
    """Export in a process of its own and watch it.

    Raises:
        RuntimeError: It failed; its reason went to stderr.
    """
    command = ["-m", "ldm_export.cli", "--ckpt", str(checkpoint), "--out", str(out)]
    command += ["--engines", "none"]
    command += ["--weights-dtype", weights_dtype]
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *command], stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stderr is not None, "it is a pipe"
    memory = _AnonymousMemory(process.pid)
    memory.start()
    arrivals = []
    for line in process.stderr:
        arrivals.append((time.monotonic() - started, line.rstrip()))
        print(f"  {line.rstrip()}", file=sys.stderr, flush=True)
    # This process never loaded torch, so what the child inherits of its peak is nothing.
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    memory.join()
    if process.returncode:
        raise RuntimeError(f"the export ended with {process.returncode}")
    return Measurement(
        seconds=seconds,
        cpu_seconds=usage.ru_utime + usage.ru_stime,
        stages=stage_seconds(arrivals, seconds),
        peak_bytes=usage.ru_maxrss * 1024,
        peak_anonymous_bytes=memory.peak_bytes,
    )


def stage_seconds(arrivals: Sequence[tuple[float, str]], total: float) -> dict[str, float]:
    """Return the seconds of each stage from the lines of an export and when they came.

    Args:
        arrivals: Seconds since the start, and the line that came then.
        total: Seconds until the end.
    """
    ends = [(at, match) for at, line in arrivals if (match := _STAGE.match(line))]
    if not ends:
        return {"everything": total}
    stages = {match["stage"]: float(match["seconds"]) for _, match in ends}
    first_end, first = ends[0]
    before = first_end - float(first["seconds"])
    after = total - before - sum(stages.values())
    return {"start, read, hash": before, **stages, "publish, rest": after}


class _AnonymousMemory(threading.Thread):
    """Watches how much memory of a process is not a mapped file."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._status = Path(f"/proc/{pid}/status")
        self.peak_bytes = 0

    def run(self) -> None:
        """Look until the process ends."""
        while True:
            try:
                text = self._status.read_text()
            except OSError:
                return
            match = re.search(r"^RssAnon:\s+(\d+) kB", text, re.MULTILINE)
            if match is None:  # ended, but not yet waited for
                return
            self.peak_bytes = max(self.peak_bytes, int(match[1]) * 1024)
            time.sleep(_TICK_SECONDS)


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
        "stages": dict(measurement.stages),
        "peak_bytes": measurement.peak_bytes,
        "peak_anonymous_bytes": measurement.peak_anonymous_bytes,
        "worst_relative_l2": worst,
    }


def table(record: Mapping[str, Any]) -> list[str]:
    """Return a record as lines for a person."""
    (total,), settings = record["seconds"], record["settings"]
    lines = [f"machine            {record['device']}"]
    lines += [f"{name:<19}{value}" for name, value in settings.items()]
    lines += [f"  {name:<17}{seconds:8.1f} s" for name, seconds in record["stages"].items()]
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
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a") as file:
            file.write(as_line(record) + "\n")
    return 0


def _run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from ldm_runtime.manifest import load_manifest

    model = tiny(stable_diffusion_1()) if args.tiny else stable_diffusion_1()
    checkpoint, out = folder / "random.ckpt", folder / "engines"
    print(f"writing a random checkpoint to {folder}", file=sys.stderr, flush=True)
    # In a process of its own, so that this one stays small; see `measure_export`.
    writer = multiprocessing.get_context("spawn").Process(
        target=write_checkpoint, args=(checkpoint, model), kwargs={"half": args.dtype == "fp16"}
    )
    writer.start()
    writer.join()
    if writer.exitcode:
        raise RuntimeError(f"writing the checkpoint ended with {writer.exitcode}")
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
