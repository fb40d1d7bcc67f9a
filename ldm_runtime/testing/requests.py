"""Golden requests of the tiny bundles, for every task, with their images."""

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from ldm_runtime.requests.request import GenerationRequest, parse_request
from ldm_runtime.specs.model import Task

_ROWS, _COLUMNS = np.mgrid[:16, :24]
_IMAGE: npt.NDArray[np.uint8] = np.stack(
    [_ROWS * 16, _COLUMNS * 10, (_ROWS * _COLUMNS) % 256], axis=2
).astype(np.uint8)
_MASK = np.where((_ROWS > 4) & (_COLUMNS < 9), 255, 0).astype(np.uint8)

_GUIDED, _ANCESTRAL = {"seed": 7, "num_images": 2}, {"sampler": "euler_ancestral", "seed": 0}
_UNGUIDED = {**_ANCESTRAL, "guidance_scale": 1.0}

_GOLDEN: Mapping[Task, tuple[Mapping[str, object], ...]] = MappingProxyType(
    {
        "unconditional": (_GUIDED, {**_ANCESTRAL, "height": 24}),
        "class-to-image": ({"class_label": 1, **_GUIDED}, {"class_label": 3, **_UNGUIDED}),
        "text-to-image": (
            {"prompt": "a red circle", **_GUIDED},
            {"prompt": "a blue square", "negative_prompt": "red", "height": 24, **_UNGUIDED},
        ),
        "layout-to-image": (
            {"layout": [{"label": 2, "box": [0.1, 0.2, 0.5, 0.9]}], **_GUIDED},
            {"layout": [{"label": 0, "box": [0.0, 0.0, 1.0, 1.0]}], **_UNGUIDED},
        ),
        "semantic-synthesis": (
            {"segmentation": (_ROWS // 3).astype(np.uint8), **_GUIDED},
            {"segmentation": (_COLUMNS // 5).astype(np.uint8), **_ANCESTRAL},
        ),
        "super-resolution": (
            {"image": _IMAGE[:9, :14], **_GUIDED},
            {"image": _IMAGE[4:12, 8:], **_ANCESTRAL},
        ),
        "text-super-resolution": (
            {"prompt": "red", "image": _IMAGE[:8, :12], **_GUIDED},
            {"image": _IMAGE[4:12, 8:], "noise_level": 100, **_UNGUIDED},
        ),
        "inpainting": (
            {"image": _IMAGE, "mask_image": _MASK, **_GUIDED},
            {"image": _IMAGE, "outpaint": (8, 0, 0, 4), **_ANCESTRAL},
        ),
        "text-inpainting": (
            {"prompt": "red", "image": _IMAGE, "mask_image": _MASK, **_GUIDED},
            {"prompt": "a circle", "image": _IMAGE, "outpaint": (8, 0, 0, 4), **_UNGUIDED},
        ),
        "image-editing": (
            {"prompt": "make it red", "image": _IMAGE, **_GUIDED},
            {"prompt": "a circle", "image": _IMAGE, "image_guidance_scale": 1.0, **_UNGUIDED},
        ),
        "image-variation": (
            {"image": _IMAGE, **_GUIDED},
            {"prompt": "red", "image": _IMAGE[:8], "noise_level": 500, **_UNGUIDED},
        ),
        "depth-to-image": (
            {"prompt": "red", "image": _IMAGE, "strength": 1.0, **_GUIDED},
            {"prompt": "a circle", "depth_map": _ROWS * _COLUMNS, **_UNGUIDED},
        ),
        "retrieval": (
            {"embeddings": np.eye(2, 8, dtype=np.float32) + 0.5, **_GUIDED},
            {"embeddings": np.ones((1, 8), dtype=np.float32), **_UNGUIDED},
        ),
        "autoencoder": ({"image": _IMAGE}, {"image": _IMAGE[:8]}),
    }
)


def tiny_requests(task: Task) -> tuple[GenerationRequest, ...]:
    """Return the golden requests of the tiny bundle of a task."""
    return tuple(parse_request(fields) for fields in _GOLDEN[task])
