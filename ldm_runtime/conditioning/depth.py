"""Depth concatenated to the latents: that of a map, or what a depth estimator sees in an image."""

import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt
from PIL import Image

from ldm_runtime.conditioning.contract import Conditioning, Float32Array, OpenNetwork
from ldm_runtime.conditioning.text import encode_text
from ldm_runtime.errors import RequestError
from ldm_runtime.inputs.images import InputImage
from ldm_runtime.latents.codec import to_float
from ldm_runtime.requests.resolved import GivenDepth, NoImage, ResolvedRequest
from ldm_runtime.requests.sizes import latent_size
from ldm_runtime.specs.model import ModelSpec
from ldm_runtime.specs.networks import DepthEstimatorSpec
from ldm_runtime.text import Tokenizer

#: The free parameter of torch's bicubic interpolation.
_SHARPNESS = -0.75
_FLAT = 1e-6  # share of a depth below which differences are rounding
_TAPS = np.arange(-1, 3)  # neighbours of a position, from the one before its left one


def encode_text_and_depth(
    network: OpenNetwork,
    tokenizer: Tokenizer | None,
    request: ResolvedRequest,
    spec: ModelSpec,
) -> Conditioning:
    """Return context of the prompts, and concat (1, 1, h, w): the depth, from -1 to 1, nearest 1.

    Inverse depth is resized to one number per latent pixel before its range is brought to -1 to 1,
    and padded to the size of the latents by repeating its right and lower edge. Sources:
    `scripts/gradio/depth2img.py` of Stability-AI/stablediffusion (cf1d67a) and
    `StableDiffusionDepth2ImgPipeline` of diffusers 0.42.1.

    See `ldm_runtime.conditioning.encode_conditioning`.
    """
    match request.depth:
        case GivenDepth(depth_map=given):
            depth, found = given.values, "is"
        case _:
            depth, found = estimated_depth(network, request, spec), "estimated from the image is"
    factor = spec.autoencoder.factor
    covered = math.ceil(request.height / factor), math.ceil(request.width / factor)
    small = resized(depth, covered)
    lowest, highest = small.min(), small.max()
    if highest - lowest <= _FLAT * max(abs(lowest), abs(highest)):
        raise RequestError(
            "depth_map", f"{found} {lowest:g} everywhere; give one whose nearest parts differ"
        )
    scaled = 2 * (small - lowest) / (highest - lowest) - 1
    height, width = latent_size(request, spec)
    missing = (0, height - covered[0]), (0, width - covered[1])
    concat = np.pad(scaled, missing, mode="edge")[None, None].astype(np.float32)
    text = encode_text(network, tokenizer, request, spec)
    return text.changed(lambda each: replace(each, concat=concat))


def estimated_depth(
    network: OpenNetwork, request: ResolvedRequest, spec: ModelSpec
) -> Float32Array:
    """Return the inverse depth (H, W) that the depth estimator sees in the image of a request.

    It sees the image in the size that it was trained on, whatever proportions that has, as in
    diffusers; MiDaS' own script keeps the proportions.
    """
    assert not isinstance(request.source_image, NoImage), "a request without a map has an image"
    side = spec.network(DepthEstimatorSpec).side
    image = _square(request.source_image.image, side)
    depth: Float32Array = network("depth_estimator").run({"image": image})["depth"][0]
    return depth


def resized(values: Float32Array, size: tuple[int, int]) -> npt.NDArray[np.float64]:
    """Return a map (H, W) in another size, height and width, by bicubic interpolation.

    As `torch.nn.functional.interpolate` computes it with `mode="bicubic"`: centres of pixels keep
    their places, beyond the edge its pixels go on, and nothing is averaged where a map shrinks.
    Source: Keys 1981 (10.1109/TASSP.1981.1163711), equation 4, with -0.75 for its -0.5.
    """
    rows, columns = (_interpolation(old, new) for old, new in zip(values.shape, size, strict=True))
    result: npt.NDArray[np.float64] = rows @ values.astype(np.float64) @ columns.T
    return result


def _interpolation(old: int, new: int) -> npt.NDArray[np.float64]:
    """Return the matrix (new, old) that resizes a row of pixels."""
    positions = (np.arange(new, dtype=np.float64) + 0.5) * old / new - 0.5
    left = np.floor(positions).astype(np.int64)
    neighbours = left[:, None] + _TAPS
    weights = _cubic(np.abs(positions[:, None] - neighbours))
    matrix = np.zeros((new, old))
    places = np.broadcast_to(np.arange(new)[:, None], neighbours.shape)
    np.add.at(matrix, (places, neighbours.clip(0, old - 1)), weights)
    return matrix


def _cubic(distance: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the weight of pixels at a distance of 0 to 2."""
    a, d = _SHARPNESS, distance
    near = (a + 2) * d**3 - (a + 3) * d**2 + 1
    far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
    return np.where(d <= 1, near, far)


def _square(image: InputImage, side: int) -> Float32Array:
    """Return an image (1, 3, side, side) from -1 to 1, stretched to a square."""
    resized_image = image.to_image().resize((side, side), Image.Resampling.BICUBIC)
    return to_float(np.asarray(resized_image)[None])
