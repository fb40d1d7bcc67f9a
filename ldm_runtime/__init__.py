"""Latent diffusion without torch: open a bundle of `ldm-export`, and generate images.

>>> with Generator("engines/") as generator:
...     result = generator(
...         "a large red circle left of a small blue square on a white background", seed=7
...     )
>>> result.save("circle.png")
"""

from ldm_runtime.errors import (
    BackendError,
    BundleError,
    DeadlineError,
    LdmError,
    ManifestError,
    RequestError,
    ShapeError,
)
from ldm_runtime.generator import Generator
from ldm_runtime.inputs.images import InputImage
from ldm_runtime.pipeline.results import Result
from ldm_runtime.pipeline.sampling import Step
from ldm_runtime.requests.input_types import ImageInput, RequestFields
from ldm_runtime.requests.request import GenerationRequest
from ldm_runtime.version import version

__all__ = [
    "BackendError",
    "BundleError",
    "DeadlineError",
    "GenerationRequest",
    "Generator",
    "ImageInput",
    "InputImage",
    "LdmError",
    "ManifestError",
    "RequestError",
    "RequestFields",
    "Result",
    "ShapeError",
    "Step",
    "__version__",
]

__version__: str


def __getattr__(name: str) -> str:
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return version()
