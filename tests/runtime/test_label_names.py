"""Labels by name, which a bundle knows."""

from dataclasses import replace

import pytest

from ldm_runtime.bundle.manifest import encode_manifest, load_manifest
from ldm_runtime.cli.commands import build_parser
from ldm_runtime.cli.request_lines import read_requests
from ldm_runtime.diagnostics.inspection import inspect
from ldm_runtime.diagnostics.summary import summary
from ldm_runtime.errors import RequestError
from ldm_runtime.inputs.layouts import LayoutObject
from ldm_runtime.requests.request import GenerationRequest
from ldm_runtime.requests.resolution import resolve
from ldm_runtime.requests.schema import request_schema
from ldm_runtime.testing import tiny_spec

NAMES = ("cat", "red cross", "dog", "dog")
CLASSES = replace(tiny_spec("class-to-image"), label_names=NAMES)
LAYOUTS = replace(tiny_spec("layout-to-image"), label_names=NAMES)
BOX = (0.0, 0.0, 0.5, 1.0)


def test_a_class_is_asked_for_by_its_name_in_the_bundle():
    request = GenerationRequest(class_label="red cross", seed=1)

    resolved = resolve(request, CLASSES)

    assert resolved == resolve(GenerationRequest(class_label=1, seed=1), CLASSES)
    assert resolved.as_request().class_label == 1  # which any bundle of the model understands


def test_a_layout_may_mix_names_and_numbers():
    objects = [{"label": "red cross", "box": BOX}, LayoutObject(label=0, box=BOX)]

    resolved = resolve(GenerationRequest(layout=objects), LAYOUTS)

    assert [each.label for each in resolved.condition.objects] == [1, 0]


def test_the_command_line_needs_no_file_of_names(tmp_path):
    args = build_parser().parse_args(["generate", "--class-label", "red cross"])

    (request,) = read_requests(args, CLASSES)

    assert request.condition.label == 1


def test_names_of_a_file_win_over_those_of_the_bundle(tmp_path):
    (tmp_path / "names.txt").write_text("bird\nfish\nred cross\n")
    flags = ["--class-label", "red cross", "--label-names", str(tmp_path / "names.txt")]

    (request,) = read_requests(build_parser().parse_args(["generate", *flags]), CLASSES)

    assert request.condition.label == 2


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("redcross", r"no label is called 'redcross' \(did you mean red cross\?\); `ldm inspect"),
        ("dog", "labels 2, 3 are all called 'dog'; give the number"),
    ],
)
def test_a_name_that_means_no_label_or_two_is_one_sentence(label, message):
    with pytest.raises(RequestError, match=f"^class_label: {message}"):
        resolve(GenerationRequest(class_label=label), CLASSES)
    with pytest.raises(RequestError, match=f"^layout: object 0: {message}"):
        resolve(GenerationRequest(layout=[{"label": label, "box": BOX}]), LAYOUTS)


def test_a_name_for_a_bundle_without_names_is_one_sentence():
    with pytest.raises(RequestError, match=r"is a name, and this bundle has no names of labels"):
        resolve(GenerationRequest(class_label="cat"), tiny_spec("class-to-image"))


@pytest.mark.parametrize("label", ["", " ", True, 1.5, None])
def test_what_is_neither_a_name_nor_a_number_is_refused(label):
    with pytest.raises(RequestError):
        GenerationRequest(layout=[{"label": label, "box": BOX}])
    if label is not None:
        with pytest.raises(RequestError, match="class_label: "):
            GenerationRequest(class_label=label)


def test_the_schema_permits_names_and_bounds_numbers():
    schema = request_schema()
    (request,) = [each for name, each in schema["$defs"].items() if name == "GenerationRequest"]
    label = request["properties"]["class_label"]

    assert {"type": "string"} in label["anyOf"]
    assert label["minimum"] == 0


def test_the_names_are_a_part_of_the_bundle_and_its_description(tiny_bundle, tmp_path):
    manifest = load_manifest(tiny_bundle)
    spec = replace(manifest.spec, label_names=NAMES)
    (tmp_path / "manifest.json").write_bytes(encode_manifest(replace(manifest, spec=spec)))

    assert load_manifest(tmp_path).spec.label_names == NAMES
    description = inspect(tmp_path, {})
    assert tuple(description["spec"]["label_names"]) == NAMES
    assert "4, cat, red cross, dog, ..." in summary(description)
