"""The JSON schema of a request, judged by the `jsonschema` package: it accepts what we accept."""

import json
from itertools import product

import pytest
from jsonschema import Draft202012Validator

from ldm_runtime.errors import RequestError
from ldm_runtime.requests.request import FIELDS, parse_request
from ldm_runtime.requests.schema import request_schema

pytestmark = pytest.mark.reference

SCHEMA = Draft202012Validator(json.loads(json.dumps(request_schema())))
BOX = {"label": 3, "box": [0.25, 0, 1, 0.5]}


def is_accepted(fields):
    try:
        parse_request(fields)
    except RequestError:
        return False
    return True


def edges(record):
    """Values of a field on and beyond its bounds, and of other types."""
    low, high = record.schema.get("minimum"), record.schema.get("maximum")
    yield from (None, "3", True, [], {}, 0.5)
    for bound in (low, high):
        if bound is not None:
            yield from (bound - 1, bound, bound + 1)
    yield from (*record.choices, "no such name")


def values():
    texts = {"prompt", "negative_prompt"}
    pairs = ("original_size", "crop_top_left", "target_size")
    files = {"image", "mask_image", "segmentation", "depth_map", "embeddings", "latents", *texts}
    for name, record in FIELDS.items():
        if name not in {*files, *pairs, "layout", "outpaint", "sigmas", "guidance_interval"}:
            yield from ((name, value) for value in edges(record))
    for value in ([1.0, 2.0], [1.0], [1.0, 2.0, 3.0], [-1.0, 2.0], [1.0, 1e9], "1,2", None):
        yield "guidance_interval", value
    for value in ([3.0, 1.0], [3.0, -1.0], [1e9], ["3"], 3.0, None):
        yield "sigmas", value
    yield from product(pairs, ([8, 16], [8], [8, 16, 8], [-1, 8], [0.5, 8], "8", 8, None))
    for value in ([0, 0, 8, 0], [0, 0, 8], [0.5, 0, 8, 0], [-1, 0, 8, 0], None):
        yield "outpaint", value
    for value in ([BOX], [], [{"label": 3}], [{**BOX, "label": -1}], "boxes", None):
        yield "layout", value
    for name in ("prompt", "negative_prompt"):
        yield from ((name, value) for value in ("", "a red circle", 3, ["red"], None))
    yield "guidance", 3


def test_the_schema_is_a_schema():
    Draft202012Validator.check_schema(request_schema())


@pytest.mark.parametrize(("name", "value"), list(values()))
def test_the_schema_accepts_what_a_request_accepts(name, value):
    assert SCHEMA.is_valid({name: value}) == is_accepted({name: value})
