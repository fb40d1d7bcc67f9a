"""stable-diffusion.cpp as an entrant: the checkpoint itself, through its Python binding."""

import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from protocol import Job, Opened, main


def open_model(job: Job) -> Opened:
    """Open the checkpoint; convolutions have fp16 weights, whatever the file has.

    A step's seconds are those between its calls of the progress function, sampler included.
    """
    from stable_diffusion_cpp import StableDiffusion

    model = StableDiffusion(
        model_path=job.weights,
        n_threads=job.threads,
        vae_decode_only=True,
        rng_type="cpu",  # torch's noise
        sampler_rng_type="cpu",
        verbose=False,
    )

    def generate() -> tuple[Any, Sequence[float]]:
        moments: list[float] = []

        def on_progress(_step: int, steps: int, _seconds: float) -> None:
            if steps == job.steps:  # reading the file tells its progress, too
                moments.append(time.perf_counter())

        images = model.generate_image(
            prompt=job.prompt,
            width=job.width,
            height=job.height,
            sample_steps=job.steps,
            sigmas=",".join(map(repr, job.sigmas)),
            cfg_scale=job.guidance_scale,
            sample_method="euler",
            seed=job.seed,
            progress_callback=on_progress,
        )
        moments = moments[-job.steps - 1 :]
        return images[0], [after - before for before, after in pairwise(moments)]

    return Opened(generate, ("stable-diffusion-cpp-python",))


if __name__ == "__main__":
    main(open_model)
