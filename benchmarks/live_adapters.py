"""Measure what live adapters cost: a step of the UNet with and without them, and a new scale.

    python benchmarks/live_adapters.py
    python benchmarks/live_adapters.py --model sd15

A random LoRA of rank 16 of every matrix of attention and feed-forward is written for the bundle,
which is that of the shapes model unless told otherwise. The bundle as it is and the bundle with
the LoRA take turns in one process. Prints one line of JSON.
"""

import argparse
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from guidance import measure
from ldm_runtime import GenerationRequest, Generator, LdmError
from ldm_runtime.benchmark.subject import PROMPT
from ldm_runtime.bundle.graph_weights import stored_weights
from ldm_runtime.bundle.low_rank_branches import places
from ldm_runtime.bundle.manifest import load_manifest
from ldm_runtime.pipeline.results import Result
from measuring.opened import add_generator_arguments, generator_row
from measuring.rows import as_line
from measuring.shapes_bundle import shapes_bundle
from released.cached_models import SHORT_NAMES, random_bundle

_RANK, _NAME = 16, "lora"
#: What trainers change by default: matrices inside transformers, and the projections around them.
_CHANGED = re.compile(r"\.(to_[qkv]|to_out\.0|net\.0\.proj|net\.2|proj_in|proj_out)\.weight$")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command: 0 on success, 1 for an error the user can act on, 2 for bad usage."""
    args = build_parser().parse_args(argv)
    try:
        bundle = random_bundle(args.model) if args.model else args.bundle or shapes_bundle()
        print(as_line(record(bundle, args)))
    except LdmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_generator_arguments(parser)
    parser.add_argument(
        "--model", choices=tuple(SHORT_NAMES), help="a released model with random weights"
    )
    parser.add_argument("--steps", type=int, default=10, help="default: %(default)s")
    parser.add_argument("--repetitions", type=int, default=5, help="default: %(default)s")
    return parser


def record(bundle: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Measure and return the JSON line as a mapping."""
    options = {"backend": args.backend, "threads": args.threads}
    with tempfile.TemporaryDirectory(prefix="ldm-live-") as folder:
        path = Path(folder) / "lora.safetensors"
        changed = write_lora(path, bundle)
        with (
            Generator(bundle, **options) as plain,
            Generator(bundle, live_adapters={_NAME: path}, **options) as live,
        ):
            ways = {
                "without live adapters": lambda: _step_seconds(plain, {}, args.steps),
                "with a live adapter": lambda: _step_seconds(live, {_NAME: 0.5}, args.steps),
            }
            seconds = measure(ways, args.repetitions)
            scales = [_scale_seconds(live, 0.1 + index / 100) for index in range(10)]
            settings = {"num_inference_steps": args.steps, "rank": _RANK, "matrices": changed}
            rows = [
                generator_row(plain, f"a step of the UNet {name}", settings, each)
                for name, each in seconds.items()
            ]
            rows.append(generator_row(live, "a new scale", settings, scales))
    return {
        "benchmark": "live_adapters",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "precision": plain.precision,
        "step_against_without": rows[1].median_seconds / rows[0].median_seconds,
        "rows": [row.as_dict() for row in rows],
    }


def write_lora(path: Path, bundle: Path) -> int:
    """Write a random LoRA for the UNet of a bundle and return how many matrices it changes."""
    tensors = dict(_tensors(bundle))
    save_file(tensors, path)
    return len(tensors) // 2


def _tensors(bundle: Path) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    component = load_manifest(bundle).component("unet")
    graph = next(each.file for each in component.graphs if each.variant == "fp32")
    known, rng = places(bundle / graph), np.random.default_rng(0)
    for name in filter(_CHANGED.search, stored_weights(bundle / graph)):
        place, layer = known[name], "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        down = rng.standard_normal((_RANK, place.inputs), np.float32)
        up = rng.standard_normal((place.outputs, _RANK), np.float32)
        yield f"{layer}.lora_down.weight", down / place.inputs**0.5
        yield f"{layer}.lora_up.weight", 0.1 * up


def _step_seconds(generator: Generator, scales: dict[str, float], steps: int) -> float:
    """Generate an image in a batch, as a server does, and return the seconds of a step."""
    request = GenerationRequest(prompt=PROMPT, seed=0, num_inference_steps=steps)
    with generator.open_batch() as batch:
        batch.add(request, adapters=scales)
        while batch:
            for _, event in batch.advance():
                if isinstance(event, Exception):
                    raise event
                if isinstance(event, Result):
                    return event.timings["unet"] / steps
    raise AssertionError("a request ends with its result")


def _scale_seconds(generator: Generator, scale: float) -> float:
    """Return the seconds that a scale takes which no request had before."""
    live = generator.live_adapters
    assert live is not None, "it was opened with a live adapter"
    began = time.perf_counter()
    live.matrices({_NAME: scale})
    return time.perf_counter() - began


if __name__ == "__main__":
    sys.exit(main())
