"""diffusers as an entrant: a folder of its own, eager or compiled by torch."""

from typing import Any

from pipelines import opened_pipeline
from protocol import Job, Opened, main


def open_model(job: Job) -> Opened:
    """Open the folder; with the option "compile" the UNet and the decoder are compiled.

    Compiled, weights are in `channels_last`, as diffusers' own guide to speed does it.
    """
    import numpy as np
    import torch
    from diffusers import StableDiffusionPipeline

    torch.set_num_threads(job.threads)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[job.precision]
    kind: Any = StableDiffusionPipeline  # which is not typed
    pipeline = kind.from_pretrained(job.weights, torch_dtype=dtype, local_files_only=True)
    if job.options.get("compile"):
        pipeline.unet.to(memory_format=torch.channels_last)
        pipeline.vae.to(memory_format=torch.channels_last)
        pipeline.unet.forward = torch.compile(pipeline.unet.forward, dynamic=False)
        pipeline.vae.decode = torch.compile(pipeline.vae.decode, dynamic=False)
    noise = torch.from_numpy(np.load(job.noise)).to(dtype)
    return opened_pipeline(job, pipeline, noise, ("diffusers", "torch", "transformers"))


if __name__ == "__main__":
    main(open_model)
