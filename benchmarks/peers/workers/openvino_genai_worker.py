"""OpenVINO GenAI as an entrant: a folder that optimum-intel exported, with static shapes."""

import sys
from collections.abc import Sequence
from typing import Any

from protocol import Job, Opened, main

_MICROSECONDS = 1e6


def open_model(job: Job) -> Opened:
    """Open the folder; compiled models are kept in the job's cache, as this package keeps its own.

    The shapes are fixed before it is compiled, which is faster than the default of any shape.
    """
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # it would wait for a network
    import numpy as np
    import openvino
    import openvino_genai
    from PIL import Image

    class Noise(openvino_genai.Generator):  # type: ignore[misc]
        """The job's noise, number by number."""

        def __init__(self) -> None:
            super().__init__()
            self._numbers = np.load(job.noise)

        def next(self) -> float:
            raise NotImplementedError("noise is asked for as a tensor")

        def randn_tensor(self, shape: Any) -> Any:  # noqa: ANN401
            return openvino.Tensor(self._numbers.reshape(tuple(shape)).copy())

    pipeline = openvino_genai.Text2ImagePipeline(job.weights)
    pipeline.reshape(1, job.height, job.width, job.guidance_scale)
    pipeline.compile(
        "CPU",
        INFERENCE_PRECISION_HINT={"fp32": "f32", "bf16": "bf16"}[job.precision],
        INFERENCE_NUM_THREADS=job.threads,
        PERFORMANCE_HINT="LATENCY",
        CACHE_DIR=job.cache,
    )

    def generate() -> tuple[Any, Sequence[float]]:
        pixels = pipeline.generate(**job.request(), num_images_per_prompt=1, generator=Noise())
        durations = pipeline.get_performance_metrics().raw_metrics.unet_inference_durations
        image = Image.fromarray(pixels.data[0])
        return image, [each / _MICROSECONDS for each in durations]

    return Opened(generate, ("openvino-genai", "openvino"))


if __name__ == "__main__":
    main(open_model)
