"""Print how many images a fleet of GPUs generates, on paper: `python -m scripts.capacity`.

No GPU has been measured: what a GPU does is an assumption, a flag with a default. Operations are
counted by `ldm_runtime.benchmark.work`, and what was measured comes from rows of
`benchmarks/results/`. docs/deployment.md has the formulas, and the tables that this prints.

Sources: Kleinrock, Queueing Systems I (1975), for Little's law and M/M/c; Allen, Probability,
Statistics and Queueing Theory (1990), for the approximation of M/G/c.
"""

import argparse
import inspect
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

from ldm_runtime.benchmark.work import Work, decoder_work, text_encoder_work, unet_work
from ldm_runtime.specs.networks import AutoencoderSpec, TextEncoderSpec, UNetSpec
from measuring.rows import ROOT, read_records
from released.released_models import MODELS

_MODEL = "v1-5-pruned-emaonly"
_FACTOR = 8  # pixels of an image per pixel of its latents
_RESULTS = ROOT / "benchmarks/results"
_LOADS = (0.5, 0.7, 0.85, 0.95)
_HOUR = 3600.0


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What nothing here has measured; every field is a flag.

    Attributes:
        gpus: GPUs.
        gpus_per_server: GPUs behind one queue.
        peak_tflops: Dense fp16 operations of a GPU per second, in 10^12.
        size: Sides of an image, in pixels.
        steps: Steps of an image, each with guidance.
        max_batch: Images in a call of the UNet.
        fixed_share: Share of the time of a call of one image that does not grow with the batch.
        variation: Standard deviation of the time of an image over its mean, for different steps.
        read_gbps: Gigabytes per second that a worker reads and hashes weights at.
        open_seconds: Seconds to load engines, once the weights are read.
        failure_hours: GPU hours between two failures of hardware.
        repair_hours: Hours until a failed GPU is replaced.
        price: Price of a GPU per hour, in dollars.
    """

    gpus: int = 1000
    gpus_per_server: int = 8
    peak_tflops: float = 989.0
    size: int = 512
    steps: int = 25
    max_batch: int = 4
    fixed_share: float = 0.3
    variation: float = 0.29
    read_gbps: float = 1.0
    open_seconds: float = 5.0
    failure_hours: float = 50_700.0
    repair_hours: float = 4.0
    price: float = 2.5


#: Units of the assumptions that have one, as the table names them.
_UNITS = {
    "peak_tflops": "× 10¹² operations per second",
    "size": "pixels",
    "read_gbps": "GB/s",
    "open_seconds": "s",
    "failure_hours": "GPU hours",
    "repair_hours": "h",
    "price": "$ per GPU hour",
}
_NOTES = {
    "peak_tflops": "H100 SXM, NVIDIA's data sheet",
    "fixed_share": "launches of kernels, and what a small batch leaves idle",
    "variation": "half to one and a half times the steps, all as frequent",
    "failure_hours": "419 in 54 days of 16,384 GPUs: Llama 3, arXiv 2407.21783, section 3.3.4",
}


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was measured, on CPUs, and is used for GPUs.

    Attributes:
        efficiency: Share of the peak that the UNet reaches.
        bundle_bytes: Bytes of a bundle of the model's size.
        import_seconds: Seconds to import the runtime.
    """

    efficiency: float
    bundle_bytes: int
    import_seconds: float


def measured() -> Measured:
    """Return what the last rows of `benchmarks/results/` say."""
    latency = read_records(_RESULTS / "latency.jsonl")[-1]
    rows = {(row["name"], row["settings"]["state"]): row for row in latency["rows"]}
    seconds = rows["unet", "steady"]["median_seconds"]
    flops = latency["work"]["unet"]["flops"]
    export = read_records(_RESULTS / "export_full_size.jsonl")[-1]
    return Measured(
        efficiency=flops / seconds / latency["ceilings"]["matmul_flops"],
        bundle_bytes=export["settings"]["bundle_bytes"],
        import_seconds=rows["import", "first"]["median_seconds"],
    )


def image_work(assumed: Assumptions) -> Work:
    """Return the work of one image: two samples of the UNet per step, two prompts, the decoder."""
    networks = {type(each): each for each in MODELS[_MODEL].networks.values()}
    unet, decoder = networks[UNetSpec], networks[AutoencoderSpec]
    encoder = networks[TextEncoderSpec]
    assert isinstance(unet, UNetSpec), "it is that of the model"
    assert isinstance(decoder, AutoencoderSpec), "likewise"
    assert isinstance(encoder, TextEncoderSpec), "likewise"
    side = assumed.size // _FACTOR
    step = unet_work(unet, side, side, encoder.max_tokens).rows(2)
    flops = assumed.steps * step.flops + decoder_work(decoder, side, side).flops
    return Work(flops=flops + text_encoder_work(encoder).rows(2).flops)


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """What follows for the fleet.

    Attributes:
        alone_seconds: Seconds of an image that has a GPU for itself.
        full_seconds: Seconds of an image in a full batch.
        warm_up_seconds: Seconds until a new worker takes requests.
        failures_per_day: Failures of hardware of all GPUs in a day.
        available_gpus: GPUs that work, on average.
        images_per_second: Images of those GPUs, all batches full.
    """

    alone_seconds: float
    full_seconds: float
    warm_up_seconds: float
    failures_per_day: float
    available_gpus: float
    images_per_second: float


def fleet(assumed: Assumptions, known: Measured) -> Fleet:
    """Return what follows from the assumptions and from what was measured."""
    alone = image_work(assumed).flops / (assumed.peak_tflops * 1e12 * known.efficiency)
    full = alone * (assumed.fixed_share + (1 - assumed.fixed_share) * assumed.max_batch)
    reading = known.bundle_bytes / (assumed.read_gbps * 1e9)
    warm_up = known.import_seconds + reading + assumed.open_seconds
    down = assumed.repair_hours + warm_up / _HOUR
    available = assumed.gpus * assumed.failure_hours / (assumed.failure_hours + down)
    return Fleet(
        alone_seconds=alone,
        full_seconds=full,
        warm_up_seconds=warm_up,
        failures_per_day=24 * assumed.gpus / assumed.failure_hours,
        available_gpus=available,
        images_per_second=available * assumed.max_batch / full,
    )


def erlang_c(places: int, load: float) -> float:
    """Return the probability that an arrival waits in M/M/c.

    Args:
        places: Images that are generated at once, c.
        load: Share of them that are busy on average, below 1.
    """
    offered, blocked = places * load, 1.0
    for count in range(1, places + 1):  # Erlang's B, by its recursion
        blocked = offered * blocked / (count + offered * blocked)
    return blocked / (1 - load * (1 - blocked))


def waits(places: int, load: float, seconds: float, variation: float) -> tuple[float, float]:
    """Return the mean and the 95th percentile of the wait in M/G/c, in seconds.

    Args:
        places: Images that are generated at once.
        load: Share of them that are busy on average.
        seconds: Mean time of an image.
        variation: Standard deviation of that time over the mean.
    """
    probability = erlang_c(places, load)
    scale = (1 + variation**2) / 2 * seconds / (places * (1 - load))
    tail = math.log(probability / 0.05) if probability > 0.05 else 0.0
    return probability * scale, scale * tail


def tables(assumed: Assumptions, known: Measured) -> str:
    """Return the tables of the page: what goes in, what follows, and that per load."""
    return "\n\n".join(
        "\n".join(table)
        for table in (
            _inputs(assumed, known),
            _results(fleet(assumed, known)),
            _loads(assumed, known),
        )
    )


def _inputs(assumed: Assumptions, known: Measured) -> Iterator[str]:
    yield "| input | value | from |"
    yield "|---|---|---|"
    flops = image_work(assumed).flops
    yield f"| operations of an image | {flops / 1e12:.1f} × 10¹² | counted: Stable Diffusion 1.5 |"
    source = "measured on a CPU, the UNet in `latency.jsonl`; **assumed** of GPUs"
    yield f"| share of the peak | {100 * known.efficiency:.0f} % | {source} |"
    size, seconds = f"{known.bundle_bytes / 1e9:.2f} GB", f"{known.import_seconds:.2f} s"
    source = "measured: `export_full_size.jsonl` and `latency.jsonl`"
    yield f"| bundle, and import | {size}, {seconds} | {source} |"
    plain = []
    for field in fields(assumed):
        flag = f"`--{_flag(field.name)}`"
        value = f"{getattr(assumed, field.name):,g} {_UNITS.get(field.name, '')}".rstrip()
        if field.name in _NOTES:
            yield f"| {flag} | {value} | **assumption**: {_NOTES[field.name]} |"
        else:
            plain.append(f"{flag} {value}")
    yield f"| {', '.join(plain)} | | **assumptions** |"


def _results(found: Fleet) -> Iterator[str]:
    cells = {
        "image alone on a GPU": f"{found.alone_seconds:.3f} s",
        "image in a full batch": f"{found.full_seconds:.3f} s",
        "warm-up of a worker": f"{found.warm_up_seconds:.1f} s",
        "failures of hardware": f"{found.failures_per_day:.2f} per day",
        "GPUs that work": f"{found.available_gpus:,.1f}",
        "images per second": f"{found.images_per_second:,.0f}",
    }
    yield f"| {' | '.join(cells)} |"
    yield "|---" * len(cells) + "|"
    yield f"| {' | '.join(cells.values())} |"


def _loads(assumed: Assumptions, known: Measured) -> Iterator[str]:
    found, places = fleet(assumed, known), assumed.max_batch
    groups = (places, places * assumed.gpus_per_server, places * assumed.gpus)
    names = ("1 GPU", f"{assumed.gpus_per_server} GPUs", f"{assumed.gpus:,} GPUs")
    heads = " | ".join(f"wait behind {name}, mean and p95" for name in names)
    yield f"| load | images per second | in flight | {heads} | $ per 1,000 images |"
    yield "|---" * (4 + len(groups)) + "|"
    for load in _LOADS:
        rate = load * found.images_per_second
        cells = [waits(group, load, found.full_seconds, assumed.variation) for group in groups]
        shown = " | ".join(f"{mean:.2f} s, {p95:.2f} s" for mean, p95 in cells)
        in_flight = rate * (found.full_seconds + cells[1][0])
        price = 1000 * assumed.gpus * assumed.price / (rate * _HOUR)
        yield f"| {load:.0%} | {rate:,.0f} | {in_flight:,.0f} | {shown} | {price:.2f} |"


def _flag(name: str) -> str:
    return name.replace("_", "-")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command: a flag per assumption."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    texts = _descriptions()
    for field in fields(Assumptions):
        kind, default = type(field.default), field.default
        parser.add_argument(
            f"--{_flag(field.name)}",
            type=_above_zero(kind),
            default=default,
            metavar="N",
            help=f"{texts[field.name]} (default: {default:g})",
        )
    return parser


def _descriptions() -> dict[str, str]:
    """Return the descriptions of the assumptions, from their docstring."""
    _, _, listed = (inspect.getdoc(Assumptions) or "").partition("Attributes:\n")
    pairs = (line.strip().partition(": ") for line in listed.splitlines())
    return {name: text.rstrip(".") for name, _, text in pairs}


def _above_zero(kind: Any) -> Any:  # noqa: ANN401  (a type, and a function that reads it)
    def read(text: str) -> Any:  # noqa: ANN401
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not 0 < value < float("inf"):
            number = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"must be a {number} above 0, got {text!r}")
        return value

    return read


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables."""
    parser = build_parser()
    assumed = Assumptions(**vars(parser.parse_args(argv)))
    if assumed.size % (8 * _FACTOR):
        parser.error(f"--size: must be a multiple of {8 * _FACTOR}, got {assumed.size}")
    if assumed.fixed_share >= 1:
        parser.error(f"--fixed-share: must be below 1, got {assumed.fixed_share:g}")
    sys.stdout.write(tables(assumed, measured()) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
