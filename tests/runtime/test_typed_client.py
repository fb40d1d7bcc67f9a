"""Types of the public API, as mypy and `inspect` see them."""

import inspect
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest

from ldm_runtime import GenerationRequest, Generator
from ldm_runtime.backends import BACKENDS, BackendName
from ldm_runtime.inputs.depth_maps import DepthMap
from ldm_runtime.inputs.embeddings import Embeddings
from ldm_runtime.inputs.images import InputImage
from ldm_runtime.inputs.initial_latents import InitialLatents
from ldm_runtime.inputs.layouts import LayoutObject
from ldm_runtime.inputs.segmentation import SegmentationMap
from ldm_runtime.noise import NOISES
from ldm_runtime.requests.input_types import (
    DepthInput,
    EmbeddingsInput,
    ImageInput,
    LatentsInput,
    LayoutInput,
    NoiseName,
    NumbersInput,
    PromptFields,
    RequestFields,
    SamplerName,
    ScheduleName,
    SegmentationInput,
)
from ldm_runtime.requests.request import CUSTOM, FIELDS
from ldm_runtime.samplers import SAMPLERS
from ldm_runtime.schedules import SCHEDULES

CLIENT = Path(__file__).parent / "typed_client.py"
#: What may be given for a field of a type; for other types, values of that type.
INPUTS = {
    InputImage: ImageInput,
    SegmentationMap: SegmentationInput,
    Embeddings: EmbeddingsInput,
    DepthMap: DepthInput,
    InitialLatents: LatentsInput,
    tuple[LayoutObject, ...]: LayoutInput,
    tuple[float, ...]: NumbersInput,
    tuple[float, float]: NumbersInput,
    tuple[int, int]: Sequence[int],
    tuple[int, int, int, int]: Sequence[int],
}


@pytest.mark.slow
def test_mypy_finds_every_slip_in_the_client_and_nothing_else(tmp_path):
    api = pytest.importorskip("mypy.api", reason="only needed to develop")
    lines = CLIENT.read_text().splitlines()
    expected = [number for number, line in enumerate(lines, 1) if line.endswith("# slip")]

    report, error, _ = api.run(
        ["--strict", "--config-file=", f"--cache-dir={tmp_path}", "--no-pretty", str(CLIENT)]
    )

    found = {int(number) for number in re.findall(r"typed_client\.py:(\d+): error", report)}
    assert not error
    assert sorted(found) == expected, report
    assert len(expected) > 10
    assert 'did you mean "num_inference_steps"?' in report


def test_the_typed_fields_are_those_of_a_request_with_everything_that_each_takes():
    expected = {}
    for name, record in FIELDS.items():
        kind = INPUTS.get(record.kind, record.kind)
        expected[name] = kind if record.default is not None else kind | None
    expected["negative_prompt"] = str | None
    expected["class_label"] = int | str | None

    assert get_type_hints(PromptFields) == expected
    assert get_type_hints(RequestFields).keys() == expected.keys() - {"prompt"}


@pytest.mark.parametrize(
    ("names", "table"),
    [
        (SamplerName, SAMPLERS),
        (ScheduleName, (*SCHEDULES, CUSTOM)),
        (NoiseName, NOISES),
        (BackendName, ("auto", "cpu", *BACKENDS)),
    ],
)
def test_typed_names_are_those_of_the_tables(names, table):
    assert get_origin(names) is Literal
    assert sorted(get_args(names)) == sorted(table)


@pytest.mark.parametrize("method", ["__init__", "__call__", "generate", "stream", "run_many"])
def test_live_signatures_list_every_field_for_completion_in_notebooks(method):
    owner = GenerationRequest if method == "__init__" else Generator

    parameters = inspect.signature(getattr(owner, method)).parameters

    assert {*FIELDS} - {"prompt"} <= parameters.keys()
    assert parameters["seed"].default is None
    assert parameters["num_images"].default == 1
    assert inspect.Parameter.VAR_KEYWORD not in {each.kind for each in parameters.values()}


def test_the_signature_of_the_record_has_its_prompt_first():
    (first, second, *_) = inspect.signature(GenerationRequest).parameters.values()

    assert (first.name, first.kind) == ("prompt", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    assert second.kind is inspect.Parameter.KEYWORD_ONLY
