"""Golden requests as folders: a JSON file, next to the images and arrays that it names.

A bundle stores its golden requests so, to generate them again without the original inputs.
"""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from ldm_runtime.backends.contract import Runner
from ldm_runtime.errors import BundleError, RequestError
from ldm_runtime.pipeline.passes import ImagePasses
from ldm_runtime.pipeline.sampling import batches, sample_latents
from ldm_runtime.requests.request import GenerationRequest, parse_request
from ldm_runtime.requests.request_json import encode_input, request_to_json

REQUEST_FILE = "request.json"
#: All golden images of a bundle in one.
SHEET_FILE = "golden/sheet.png"
#: The fields of a request that are stored as separate files, with the names of those.
ATTACHMENTS: Mapping[str, str] = MappingProxyType(
    {
        "image": "image.png",
        "mask_image": "mask_image.png",
        "segmentation": "segmentation.png",
        "embeddings": "embeddings.npy",
        "depth_map": "depth_map.npy",
    }
)


def load_golden_request(folder: Path) -> GenerationRequest:
    """Read what `save_golden_request` wrote.

    Raises:
        BundleError: A file is missing or malformed.
    """
    path = folder / REQUEST_FILE
    try:
        fields = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
        for name, file in ATTACHMENTS.items():
            if fields.get(name) is not None:
                fields[name] = _located(folder, file, fields[name])
        return parse_request(fields)
    except (OSError, ValueError, RequestError) as error:
        raise BundleError(f"{path} is malformed: {error}; export the bundle again") from error


def save_golden_request(folder: Path, request: GenerationRequest) -> None:
    """Write a request into a folder, which is created if necessary.

    Raises:
        OSError: The folder cannot be written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    fields = request_to_json(request)
    for name, file in ATTACHMENTS.items():
        value = getattr(request, name)
        if value is not None:
            (folder / file).write_bytes(encode_input(value))
            fields[name] = file
    text = msgspec.json.format(msgspec.json.encode(fields), indent=1)
    (folder / REQUEST_FILE).write_bytes(text)


def golden_latents(unet: Runner, passes: ImagePasses) -> npt.NDArray[np.float32]:
    """Return the latents (N, C, h, w) of a request's images, each sampled alone.

    Torch's are made so at export, and those that are compared with them likewise.
    """
    latents = []
    for images in batches(passes.request.num_images, 1):
        *_, last = sample_latents(
            unet, passes.conditioning, passes.request, passes.spec, images, passes.start
        )
        latents.append(last.latents)
    return np.concatenate(latents)


def _located(folder: Path, file: str, named: object) -> Path:
    """Return the path of an attachment; a bundle must not name any other file."""
    if named != file:
        raise ValueError(f"it names {named!r} and not {file!r}")
    return folder / file
