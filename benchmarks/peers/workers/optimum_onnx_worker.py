"""optimum-onnx as an entrant: a folder that it exported, in ONNX Runtime on the CPU."""

from pipelines import opened_pipeline
from protocol import Job, Opened, main


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
    noise = torch.from_numpy(np.load(job.noise))
    packages = ("optimum-onnx", "onnxruntime", "diffusers", "torch")
    return opened_pipeline(job, pipeline, noise, packages)


if __name__ == "__main__":
    main(open_model)
