"""optimum-onnx as an entrant: a folder that it exported, in ONNX Runtime on the CPU."""

from collections.abc import Sequence
from typing import Any

from protocol import Clock, Job, Opened, main


def open_model(job: Job) -> Opened:
    """Open the folder; there is no precision but fp32."""
    import numpy as np
    import onnxruntime
    import torch
    from optimum.onnxruntime import ORTStableDiffusionPipeline

    torch.set_num_threads(job.threads)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = job.threads
    pipeline = ORTStableDiffusionPipeline.from_pretrained(
        job.weights, provider="CPUExecutionProvider", session_options=options
    )
    pipeline.set_progress_bar_config(disable=True)
    clock = Clock()
    pipeline.unet.forward = clock.timed(pipeline.unet.forward)
    noise = torch.from_numpy(np.load(job.noise))

    def generate() -> tuple[Any, Sequence[float]]:
        result = pipeline(
            job.prompt,
            width=job.width,
            height=job.height,
            num_inference_steps=job.steps,
            guidance_scale=job.guidance_scale,
            latents=noise.clone(),
        )
        return result.images[0], clock.take()

    return Opened(generate, ("optimum-onnx", "onnxruntime", "diffusers", "torch"))


if __name__ == "__main__":
    main(open_model)
