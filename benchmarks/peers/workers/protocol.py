"""The measuring process of a peer: it gets a job as JSON and answers with one line of JSON.

It runs in the peer's own environment, so that it needs the standard library alone. A worker gives
`main` a function that opens its model and returns one that generates an image.
"""

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")


@dataclass(frozen=True)
class Job:
    """The image to generate, and what with.

    Attributes:
        weights: File or folder of the weights, in the form that the worker reads.
        precision: Precision to compute in: "fp32", "bf16" or "fp16".
        threads: Threads that compute.
        steps: Steps of Euler's method.
        sigmas: The noise levels that they visit, the last of them 0.
        width: Of the image in pixels.
        height: Of the image in pixels.
        guidance_scale: Of classifier-free guidance.
        prompt: The text; the negative prompt is empty.
        seed: Of the first noise.
        noise: File of that noise as NumPy writes it, (1, C, h, w) float32: that of torch.
        image: Where to write the image.
        cache: Folder for what a peer compiles and can keep.
        options: Options of the worker.
    """

    weights: str
    precision: str
    threads: int
    steps: int
    sigmas: list[float]
    width: int
    height: int
    guidance_scale: float
    prompt: str
    seed: int
    noise: str
    image: str
    cache: str
    options: dict[str, Any] = field(default_factory=dict)

    def request(self) -> dict[str, Any]:
        """Return the arguments by which diffusers and all that follow its names are called."""
        return {
            "prompt": self.prompt,
            "width": self.width,
            "height": self.height,
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance_scale,
        }


@dataclass(frozen=True)
class Opened:
    """A model that is open.

    Attributes:
        generate: Generates the image and returns it (a PIL image) with the seconds that the UNet
            took in each step, both halves of guidance together.
        packages: Packages whose versions belong to the measurement.
    """

    generate: Callable[[], tuple[Any, Sequence[float]]]
    packages: Sequence[str]


class Clock:
    """The seconds of every call."""

    def __init__(self) -> None:
        self._seconds: list[float] = []

    def timed(self, call: Callable[..., Result]) -> Callable[..., Result]:
        """Return a function that does the same and takes the time."""

        def timed_call(*arguments: Any, **options: Any) -> Result:  # noqa: ANN401
            started = time.perf_counter()
            result = call(*arguments, **options)
            self._seconds.append(time.perf_counter() - started)
            return result

        return timed_call

    def take(self) -> list[float]:
        """Return the measurements and forget them."""
        seconds, self._seconds = self._seconds, []
        return seconds


def main(open_model: Callable[[Job], Opened]) -> None:
    """Open the model, generate the image twice, write it, and print what was measured.

    "open" is everything from the start of the interpreter's work: importing the peer and loading.
    """
    job = Job(**json.loads(sys.argv[1]))
    opened, open_seconds = _timed(lambda: open_model(job))
    (_, first_unet), first = _timed(opened.generate)
    (image, unet), following = _timed(opened.generate)
    peak = _peak_bytes()
    image.save(job.image)
    answer: Mapping[str, object] = {
        "open_seconds": open_seconds,
        "first_image_seconds": first,
        "next_image_seconds": following,
        "first_unet_seconds": list(first_unet),
        "unet_seconds": list(unet),
        "peak_bytes": peak,
        "versions": {package: version(package) for package in opened.packages},
    }
    print(json.dumps(answer))


def _timed(call: Callable[[], Result]) -> tuple[Result, float]:
    started = time.perf_counter()
    result = call()
    return result, time.perf_counter() - started


def _peak_bytes() -> int:
    """Return the highest resident memory of this process, which Linux tells."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
