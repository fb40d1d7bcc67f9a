"""Pipelines of diffusers, and those that optimum makes of them, as open models."""

from collections.abc import Sequence
from typing import Any

from protocol import Clock, Job, Opened


def opened_pipeline(
    job: Job,
    pipeline: Any,  # noqa: ANN401  (of no common class)
    noise: Any,  # noqa: ANN401  (a tensor; torch is not needed to read this)
    packages: Sequence[str],
) -> Opened:
    """Return a pipeline as an open model, with the calls of its UNet timed.

    Args:
        job: The image to generate.
        pipeline: The pipeline.
        noise: The job's noise in the type that the pipeline computes in, (1, C, h, w).
        packages: Packages whose versions belong to the measurement.
    """
    pipeline.set_progress_bar_config(disable=True)
    clock = Clock()
    pipeline.unet.forward = clock.timed(pipeline.unet.forward)

    def generate() -> tuple[Any, Sequence[float]]:
        return pipeline(**job.request(), latents=noise.clone()).images[0], clock.take()

    return Opened(generate, packages)
