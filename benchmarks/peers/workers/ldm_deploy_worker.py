"""This package as an entrant: a bundle, with the backend and the generator's own options."""

from collections.abc import Sequence
from typing import Any

from protocol import Job, Opened, main


def open_model(job: Job) -> Opened:
    """Open the bundle."""
    from ldm_runtime import Generator
    from ldm_runtime.backends import get_backend
    from ldm_runtime.benchmark.process import Clock, time_engines

    name: Any = job.options["backend"]
    precision: Any = job.precision
    clock = Clock()
    time_engines(get_backend(name), clock)
    generator = Generator(
        job.weights,
        backend=name,
        precision=precision,
        threads=job.threads,
        **job.options["generator"],
    )

    def generate() -> tuple[Any, Sequence[float]]:
        result = generator.generate(
            **job.request(),
            sampler="euler",
            schedule=job.options["schedule"],
            seed=job.seed,
        )
        return result.images[0], clock.take()["unet"]

    return Opened(generate, ("ldm-deploy", "numpy", name))


if __name__ == "__main__":
    main(open_model)
