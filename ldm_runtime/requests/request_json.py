"""A request as JSON: what an image's metadata and a bundle's golden requests hold."""

from dataclasses import fields
from typing import Any

from ldm_runtime.inputs.depth_maps import DepthMap
from ldm_runtime.inputs.embeddings import Embeddings
from ldm_runtime.inputs.images import InputImage
from ldm_runtime.inputs.initial_latents import InitialLatents
from ldm_runtime.inputs.layouts import LayoutObject
from ldm_runtime.inputs.segmentation import SegmentationMap
from ldm_runtime.requests.request import GenerationRequest


def request_to_json(request: GenerationRequest) -> dict[str, Any]:
    """Return the fields of a request as JSON values.

    Images, maps, embeddings and latents are given by their hash and size alone.
    """
    values = {field.name: getattr(request, field.name) for field in fields(request)}
    return {name: _description(value) for name, value in values.items()}


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
