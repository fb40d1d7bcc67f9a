"""Types of what may be given for the fields of a request, for type checkers and editors.

`GenerationRequest` says what a request holds; `RequestFields` says what it is made from. A test
holds the two equal, and the names of samplers, schedules, presets and noise equal to their tables.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias, TypedDict

import numpy.typing as npt
from PIL import Image

from ldm_runtime.inputs.depth_maps import DepthMap
from ldm_runtime.inputs.embeddings import Embeddings
from ldm_runtime.inputs.images import InputImage
from ldm_runtime.inputs.initial_latents import InitialLatents
from ldm_runtime.inputs.layouts import LayoutObject
from ldm_runtime.inputs.segmentation import SegmentationMap
from ldm_runtime.specs.model import Decoder

SamplerName = Literal[
    "ddpm",
    "ddim",
    "euler",
    "euler_ancestral",
    "lcm",
    "tcd",
    "heun",
    "dpm2",
    "dpm2_ancestral",
    "dpmpp_2s_ancestral",
    "plms",
    "lms",
    "ipndm",
    "deis",
    "dpmpp_2m",
    "dpm_solver",
    "dpmpp_sde",
    "dpmpp_2m_sde",
    "dpmpp_3m_sde",
    "unipc",
]
ScheduleName = Literal[
    "leading",
    "trailing",
    "linspace",
    "quadratic",
    "ldm",
    "ldm_quadratic",
    "karras",
    "exponential",
    "polyexponential",
    "sgm_uniform",
    "beta",
    "consistency",
    "turbo",
    "from_800",
    "from_399",
    "custom",
]
PresetName = Literal[
    "turbo",
    "lightning-1",
    "lightning-2",
    "lightning-4",
    "lightning-8",
    "hyper-1",
    "hyper-2",
    "hyper-4",
    "hyper-8",
    "lcm",
    "tcd",
    "dmd2",
    "dmd2-1",
]
NoiseName = Literal["torch-cpu", "torch-cuda", "numpy"]
DecoderName = Decoder

#: A path, a `data:` URL, or the bytes of a file.
FileInput: TypeAlias = str | os.PathLike[str] | bytes
ImageInput: TypeAlias = FileInput | Image.Image | npt.NDArray[Any] | InputImage
SegmentationInput: TypeAlias = FileInput | Image.Image | npt.NDArray[Any] | SegmentationMap
DepthInput: TypeAlias = FileInput | Image.Image | npt.NDArray[Any] | DepthMap
EmbeddingsInput: TypeAlias = FileInput | npt.NDArray[Any] | Embeddings
LatentsInput: TypeAlias = FileInput | npt.NDArray[Any] | InitialLatents
#: Objects, each a `LayoutObject` or such as `{"label": 3, "box": [0.1, 0.2, 0.5, 0.9]}`.
LayoutInput: TypeAlias = FileInput | Sequence[LayoutObject | Mapping[str, object]]
NumbersInput: TypeAlias = Sequence[float] | npt.NDArray[Any]


class RequestFields(TypedDict, total=False):
    """The fields of a request but its prompt, as keywords of a call."""

    class_label: int | str | None
    layout: LayoutInput | None
    segmentation: SegmentationInput | None
    embeddings: EmbeddingsInput | None
    depth_map: DepthInput | None
    negative_prompt: str | None
    literal_prompt: bool
    clip_skip: int
    original_size: Sequence[int] | None
    crop_top_left: Sequence[int] | None
    target_size: Sequence[int] | None
    aesthetic_score: float | None
    negative_aesthetic_score: float | None
    height: int | None
    width: int | None
    preset: PresetName | None
    num_inference_steps: int | None
    guidance_scale: float | None
    image_guidance_scale: float | None
    guidance_rescale: float
    guidance_interval: NumbersInput | None
    sampler: SamplerName | None
    schedule: ScheduleName | None
    sigmas: NumbersInput | None
    eta: float | None
    zero_terminal_snr: bool
    seed: int | None
    noise: NoiseName
    variation_seed: int | None
    variation_strength: float
    latents: LatentsInput | None
    denoising_end: float | None
    denoising_start: float | None
    refiner_start: float | None
    reuse: str | None
    num_images: int
    image: ImageInput | None
    noise_level: int | None
    strength: float | None
    mask_image: ImageInput | None
    mask_blur: Sequence[int] | None
    outpaint: Sequence[int] | None
    hires_scale: float | None
    hires_strength: float | None
    decoder: DecoderName
    tile_size: int | None


class PromptFields(RequestFields, total=False):
    """All fields of a request, as a dictionary."""

    prompt: str | None
