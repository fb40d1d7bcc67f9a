"""The JSON schema of a generation request."""

from typing import Any

import msgspec

from ldm_runtime.inputs.depth_maps import DepthMap
from ldm_runtime.inputs.embeddings import Embeddings
from ldm_runtime.inputs.images import InputImage
from ldm_runtime.inputs.initial_latents import InitialLatents
from ldm_runtime.inputs.segmentation import SegmentationMap
from ldm_runtime.requests.request import FIELDS, GenerationRequest

_FILES = (InputImage, SegmentationMap, DepthMap, Embeddings, InitialLatents)


def request_schema() -> dict[str, Any]:
    """Return the schema (draft 2020-12) of the JSON that `request.parse_request` reads.

    Bounds that depend on a model are not in it; `resolution.resolve` checks those.
    """
    schema = msgspec.json.schema(GenerationRequest, schema_hook=_file_schema)
    (definition,) = (
        each for name, each in schema["$defs"].items() if name == GenerationRequest.__name__
    )
    definition["additionalProperties"] = False
    for name, record in FIELDS.items():
        definition["properties"][name].update(record.schema)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _file_schema(kind: type) -> dict[str, Any]:
    """Describe a field whose value in JSON names a file."""
    if kind in _FILES:
        return {"type": "string", "description": "path of a file, or a data: URL"}
    raise NotImplementedError(f"no request has a {kind.__name__}")
