"""Measure a server against the rate at which requests arrive, with batching by step and without.

    python benchmarks/arrivals.py --rates 0.5,1,1.5,2 --results benchmarks/results/arrivals.jsonl

Two servers of one bundle stand side by side, one whose requests share calls of the UNet and one
that generates one image after the other; they take turns, so that a disturbance of the machine does
not hit one alone. Requests arrive as a Poisson process, differ in seed, steps and sampler, and are
the same for both. Prints a line of JSON per rate and way: images per second, and the 50th and 95th
percentile of the time from arrival to image.
"""

import argparse
import random
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from ldm_runtime.benchmark.subject import PROMPT
from measuring.rows import append_line, as_line, commit, machine
from measuring.shapes_bundle import shapes_bundle
from serving.running_server import RunningServer, serving

_SAMPLERS = ("ddim", "euler", "dpmpp_2m")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--bundle", type=Path, help="folder made by ldm-export (default: the shapes model)"
    )
    parser.add_argument(
        "--rates", type=_rates, default=(0.5, 1.0, 2.0), help="requests per second, as in 0.5,1,2"
    )
    parser.add_argument("--requests", type=int, default=40, help="per rate (default: %(default)s)")
    parser.add_argument("--max-batch", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=20, help="mean; default: %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--results", type=Path, metavar="FILE", help="file to append rows to")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    args = build_parser().parse_args(argv)
    bundle = args.bundle or shapes_bundle()
    with ExitStack() as stack:
        ways = {}
        for way, max_batch in (("one by one", 1), ("batched", args.max_batch)):
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="ldm-arrivals-"))
            flags = ("--max-batch", max_batch, "--threads", args.threads, "--max-queue", 10_000)
            more = ("--max-queue-per-key", 10_000, "--requests-per-minute", 1e6)
            server = stack.enter_context(serving(Path(folder), (bundle, *flags, *more)))
            server.post("/v1/images/generations", _request(0, args.steps))  # a first call is slower
            ways[way] = server
        for rate in args.rates:
            for way, server in ways.items():
                row = {**_about(args), "way": way, **measure(server, rate, args)}
                print(as_line(row), flush=True)
                if args.results is not None:
                    append_line(args.results, row)
    return 0


def measure(server: RunningServer, rate: float, args: argparse.Namespace) -> dict[str, Any]:
    """Let requests arrive at a rate, and return what came of them."""
    rng = random.Random(args.seed)
    seconds: list[float] = []
    threads = []
    begun = arrival = time.monotonic()
    for number in range(args.requests):
        arrival += rng.expovariate(rate)
        steps = rng.randint(args.steps // 2, args.steps * 3 // 2)
        body = {**_request(number, steps), "sampler": rng.choice(_SAMPLERS)}
        time.sleep(max(0.0, arrival - time.monotonic()))
        threads.append(threading.Thread(target=_ask, args=(server, body, arrival, seconds)))
        threads[-1].start()
    for thread in threads:
        thread.join()
    spent = time.monotonic() - begun
    if len(seconds) < args.requests:
        raise RuntimeError(f"{args.requests - len(seconds)} requests of {args.requests} failed")
    return {
        "rate": rate,
        "images_per_second": round(len(seconds) / spent, 3),
        "p50_seconds": round(float(np.percentile(seconds, 50)), 3),
        "p95_seconds": round(float(np.percentile(seconds, 95)), 3),
    }


def _ask(server: RunningServer, body: object, arrival: float, seconds: list[float]) -> None:
    if server.post("/v1/images/generations", body).status == 200:
        seconds.append(time.monotonic() - arrival)


def _request(seed: int, steps: int) -> dict[str, Any]:
    return {"prompt": PROMPT, "seed": seed, "num_inference_steps": steps}


def _about(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "benchmark": "arrivals",
        "commit": commit(),
        "machine": machine(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": {
            "model": "shapes" if args.bundle is None else args.bundle.name,
            "requests": args.requests,
            "max_batch": args.max_batch,
            "mean_steps": args.steps,
            "threads": args.threads,
            "seed": args.seed,
        },
    }


def _rates(text: str) -> tuple[float, ...]:
    """Read numbers above 0, as the type of an argument."""
    try:
        rates = tuple(map(float, text.split(",")))
    except ValueError:
        rates = ()
    if not rates or not all(0 < rate < 1e6 for rate in rates):
        raise argparse.ArgumentTypeError(f"must be numbers above 0, as in 0.5,1,2; got {text!r}")
    return rates


if __name__ == "__main__":
    sys.exit(main())
