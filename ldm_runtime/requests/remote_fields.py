"""Requests from fields that came over a network, where a path would name a file of this machine."""

from collections.abc import Mapping
from typing import Any

from ldm_runtime.errors import RequestError
from ldm_runtime.inputs.depth_maps import DepthMap
from ldm_runtime.inputs.embeddings import Embeddings
from ldm_runtime.inputs.images import InputImage
from ldm_runtime.inputs.initial_latents import InitialLatents
from ldm_runtime.inputs.layouts import LayoutObject
from ldm_runtime.inputs.reading import is_data_url
from ldm_runtime.inputs.segmentation import SegmentationMap
from ldm_runtime.requests.request import FIELDS, GenerationRequest, parse_request

#: Types of fields whose text would name a file.
_FILES = (
    InputImage,
    SegmentationMap,
    DepthMap,
    Embeddings,
    InitialLatents,
    tuple[LayoutObject, ...],
)
_FILE_FIELDS = frozenset(name for name, record in FIELDS.items() if record.kind in _FILES)


def parse_remote_request(fields: Mapping[str, Any]) -> GenerationRequest:
    """Return the request of fields that came over a network; no file is read.

    Args:
        fields: Fields of a `GenerationRequest`; images and maps are `data:` URLs.

    Raises:
        RequestError: A field is unknown, of the wrong type or out of range, or names a file.
    """
    for name in _FILE_FIELDS.intersection(fields):
        if isinstance(fields[name], str) and not is_data_url(fields[name]):
            raise RequestError(name, "send a data: URL; this server opens no files or addresses")
    return parse_request(fields)
