"""One run: every entrant in turn, each time in its own process, and a row of each process.

Before the first round every entrant runs once with a single step where it has not done so before:
what it compiles and keeps is then there, and its files have been read.
"""

import hashlib
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ldm_runtime.benchmark.subject import PROMPT
from ldm_runtime.bundle.files import sha256_of
from ldm_runtime.bundle.manifest import MANIFEST_NAME, load_manifest
from ldm_runtime.diagnostics.measures import psnr
from ldm_runtime.errors import LdmError
from ldm_runtime.noise.torch_cpu import TorchCpuGenerator
from ldm_runtime.schedules import sampling_sigmas, training_sigmas
from measuring.rows import commit, machine
from peers.entrants import PINS, Entrant, Start
from peers.environment import ask
from peers.weights import MODEL, SCHEDULE, Weights

_SEED = 0
GUIDANCE_SCALE = 7.5
#: A process that ran longer is not repeated.
LONG_SECONDS = 600

Row = dict[str, Any]
Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Task:
    """The image that everyone generates.

    Attributes:
        steps: Of Euler's method.
        width: In pixels.
        height: In pixels.
        threads: Threads that compute.
    """

    steps: int
    width: int
    height: int
    threads: int


class Race:
    """A run over one set of weights; its rows share a `run`.

    Args:
        weights: The weights that everyone has.
        task: The image to generate.

    Raises:
        LdmError: The bundle of these weights cannot be made.
    """

    def __init__(self, weights: Weights, task: Task) -> None:
        self._weights, self._task = weights, task
        self._reference: tuple[str, Pixels] | None = None
        bundle = weights.form("bundle")
        self._spec = load_manifest(bundle).spec
        code, now = commit(), datetime.now(UTC)
        self._header: Row = {
            "benchmark": "peers",
            "run": f"{now:%Y%m%dT%H%M%SZ}-{code[:7]}",
            "commit": code,
            "machine": machine(),
            "bundle_sha256": sha256_of(bundle / MANIFEST_NAME),
            "settings": {
                "model": f"{MODEL} (narrow)" if weights.narrow else MODEL,
                **asdict(task),
                "guidance_scale": GUIDANCE_SCALE,
                "sampler": "euler",
                "schedule": SCHEDULE,
            },
        }

    def rows(self, starts: Sequence[Start], rounds: int) -> Iterator[Row]:
        """Measure and yield the rows, each as soon as it is there.

        Images are compared with those of the first entrant in fp32, by `psnr_db`. What cannot be
        measured is a row with a sentence, `failure`, and is left out of the later rounds; so is
        what took more than `LONG_SECONDS`.

        Args:
            starts: What to measure in every round.
            rounds: How often.
        """
        ready = []
        for start in starts:
            if (failure := self._prepare(start)) is None:
                ready.append(start)
            else:
                yield self._row(start, 0, {"failure": failure})
        with tempfile.TemporaryDirectory(prefix="ldm-peers-") as place:
            image = Path(place) / "image.png"
            for repetition in range(1, rounds + 1):
                for start in list(ready):
                    began = time.monotonic()
                    row = self._row(start, repetition, self._found(start, image))
                    if row["failure"] is not None or time.monotonic() - began > LONG_SECONDS:
                        ready.remove(start)
                    yield row

    def _found(self, start: Start, image: Path) -> Row:
        """Return what one process measured, or why it failed."""
        try:
            found = self._ask(start, self._task, image)
        except LdmError as error:
            return {"failure": str(error)}
        pixels = np.asarray(Image.open(image).convert("RGB"))
        if self._reference is None and start.precision == "fp32":
            self._reference = str(start), pixels
        return {**found, "failure": None, **_likeness(self._reference, pixels)}

    def _row(self, start: Start, repetition: int, found: Row) -> Row:
        return {
            **self._header,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "entrant": start.entrant.name,
            "precision": start.precision,
            "repetition": repetition,
            **found,
        }

    def _prepare(self, start: Start) -> str | None:
        """Make the form of the weights and what is compiled; return why that failed."""
        cache, key = self._cache(start), _key(start.entrant, str(self._header["bundle_sha256"]))
        marker = cache / f"{self._task.threads} threads"
        try:
            if marker.is_file() and marker.read_text() == key:
                return None
            print(f"preparing {start}", file=sys.stderr, flush=True)
            cache.mkdir(parents=True, exist_ok=True)
            self._ask(start, replace(self._task, steps=1), cache / "first.png")
        except LdmError as error:
            return str(error)
        marker.write_text(key)
        return None

    def _cache(self, start: Start) -> Path:
        size = f"{self._task.width}x{self._task.height}"
        name = f"{start} {size}".replace(" ", "-")  # torch compiles in it without quoting its path
        return self._weights.folder / "compiled" / name

    def _ask(self, start: Start, task: Task, image: Path) -> Row:
        entrant, cache = start.entrant, self._cache(start)
        job = {
            "weights": str(self._weights.form(entrant.form)),
            "precision": start.precision,
            **asdict(task),
            "sigmas": sampling_sigmas(
                training_sigmas(self._spec.alphas_cumprod), task.steps, SCHEDULE, "zero"
            ),
            "guidance_scale": GUIDANCE_SCALE,
            "prompt": PROMPT,
            "seed": _SEED,
            "noise": str(self._noise(task)),
            "image": str(image),
            "cache": str(cache),
            "options": {**entrant.options, "schedule": SCHEDULE},
        }
        print(f"measuring {start}, {task.steps} steps", file=sys.stderr, flush=True)
        return ask(entrant.environment, entrant.worker, job, threads=task.threads, cache=cache)

    def _noise(self, task: Task) -> Path:
        """Return the file of the first noise, torch's for the seed."""
        autoencoder = self._spec.autoencoder
        height, width = task.height // autoencoder.factor, task.width // autoencoder.factor
        path = self._weights.folder / f"noise-{width}x{height}.npy"
        if not path.is_file():
            shape = (1, autoencoder.embed_dim, height, width)
            np.save(path, TorchCpuGenerator(_SEED).randn(shape))
        return path


def _key(entrant: Entrant, bundle_sha256: str) -> str:
    """Return the hash of what decides whether that which was compiled is still good."""
    pins = PINS / f"{entrant.environment}.txt"
    versions = pins.read_bytes() if pins.is_file() else b""
    return hashlib.sha256(versions + bundle_sha256.encode()).hexdigest()


def _likeness(reference: tuple[str, Pixels] | None, pixels: Pixels) -> Row:
    """Return the PSNR to the reference; equal images have none that JSON could hold."""
    if reference is None:
        return {"psnr_db": None, "psnr_to": None}
    name, expected = reference
    value = psnr(pixels, expected)
    return {"psnr_db": None if math.isinf(value) else value, "psnr_to": name}
