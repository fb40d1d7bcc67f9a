"""A request as JSON: what metadata and golden requests hold, and what another process is sent."""

import base64
import io
from dataclasses import fields
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from ldm_runtime.inputs.depth_maps import DepthMap
from ldm_runtime.inputs.embeddings import Embeddings
from ldm_runtime.inputs.images import InputImage
from ldm_runtime.inputs.initial_latents import InitialLatents
from ldm_runtime.inputs.layouts import LayoutObject
from ldm_runtime.inputs.segmentation import SegmentationMap
from ldm_runtime.requests.request import GenerationRequest

#: Fields of a request that are more than numbers and text.
Input: TypeAlias = InputImage | SegmentationMap | DepthMap | Embeddings | InitialLatents


def request_to_json(request: GenerationRequest) -> dict[str, Any]:
    """Return the fields of a request as JSON values.

    Images, maps, embeddings and latents are given by their hash and size alone.
    """
    values = {field.name: getattr(request, field.name) for field in fields(request)}
    return {name: _description(value) for name, value in values.items()}


def request_to_fields(request: GenerationRequest) -> dict[str, Any]:
    """Return the fields of a request as JSON values from which `parse_request` makes it again.

    Fields at their defaults are left out. Images, maps, embeddings and latents are `data:` URLs.
    """
    values = ((each, getattr(request, each.name)) for each in fields(request))
    return {each.name: _sendable(value) for each, value in values if value != each.default}


def encode_input(value: Input) -> bytes:
    """Return the file of an image, a map, embeddings or latents, which `read` reads again.

    Images and segmentation maps are PNG, the others `.npy`.
    """
    if isinstance(value, InputImage):
        return value.to_png_bytes()
    file = io.BytesIO()
    if isinstance(value, SegmentationMap):
        Image.fromarray(value.ids).save(file, format="PNG")
    else:
        np.save(file, value.values, allow_pickle=False)
    return file.getvalue()


def _sendable(value: object) -> object:
    if isinstance(value, Input):
        is_png = isinstance(value, InputImage | SegmentationMap)
        kind = "image/png" if is_png else "application/octet-stream"
        return f"data:{kind};base64,{base64.b64encode(encode_input(value)).decode()}"
    if isinstance(value, tuple):
        return [_sendable(each) for each in value]
    return _description(value)


def _description(value: object) -> object:
    match value:
        case InputImage() | SegmentationMap() | DepthMap():
            width, height = value.size
            return {"sha256": value.sha256, "width": width, "height": height}
        case Embeddings():
            count, width = value.values.shape
            return {"sha256": value.sha256, "count": count, "width": width}
        case InitialLatents():
            return {"sha256": value.sha256, "shape": list(value.values.shape)}
        case LayoutObject():
            return {"label": value.label, "box": list(value.box)}
        case tuple():
            return [_description(each) for each in value]
    return value
