"""This package as an entrant: a bundle, the backend of the job's options."""

from collections.abc import Sequence
from typing import Any

from protocol import Job, Opened, main


def open_model(job: Job) -> Opened:
    """Open the bundle."""
    from ldm_runtime import Generator
    from ldm_runtime.backends import get_backend
    from ldm_runtime.benchmark.process import Clock, time_engines

    backend, clock = get_backend(job.options["backend"]), Clock()
    time_engines(backend, clock)
    precision: Any = job.precision
    generator = Generator(
        job.weights, backend=job.options["backend"], precision=precision, threads=job.threads
    )

    def generate() -> tuple[Any, Sequence[float]]:
        result = generator.generate(
            job.prompt,
            width=job.width,
            height=job.height,
            num_inference_steps=job.steps,
            guidance_scale=job.guidance_scale,
            sampler="euler",
            schedule=job.options["schedule"],
            seed=job.seed,
        )
        return result.images[0], clock.take()["unet"]

    return Opened(generate, ("ldm-deploy", "numpy", job.options["backend"]))


if __name__ == "__main__":
    main(open_model)
