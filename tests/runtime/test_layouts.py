import base64
import codecs
import json
import re
from dataclasses import FrozenInstanceError, asdict, replace
from math import inf, nan, sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldm_runtime.inputs.layouts import (
    MAX_BYTES,
    LayoutObject,
    label_number,
    layout_tokens,
    max_objects,
    num_labels,
    read_label_names,
    read_layout,
)
from ldm_runtime.testing import text_encoder_spec

#: The encoder of layout2img-openimages256: a grid of 90 x 90 points.
ENCODER = text_encoder_spec(
    kind="bert",
    width=512,
    num_layers=16,
    num_heads=8,
    feed_forward_dim=2048,
    vocab_size=8192,
    max_tokens=92,
    activation="gelu",
    pad_token_id=0,
)
#: A grid of 4 x 4 points, "no object" behind them, and room for two objects.
SMALL = replace(ENCODER, vocab_size=17, max_tokens=8)
JSON = b'[{"label": 3, "box": [0.25, 0, 1, 0.5]}, {"label": 0, "box": [0, 0, 1, 1]}]'
OBJECTS = (
    LayoutObject(label=3, box=(0.25, 0.0, 1.0, 0.5)),
    LayoutObject(label=0, box=(0.0, 0.0, 1.0, 1.0)),
)

edges = st.floats(0, 1).flatmap(
    lambda low: st.tuples(st.just(low), st.floats(low, 1, exclude_min=low < 1))
)
boxes = (
    st.tuples(edges, edges)
    .map(lambda pair: (pair[0][0], pair[1][0], pair[0][1], pair[1][1]))
    .filter(lambda box: box[0] < box[2] and box[1] < box[3])
)
objects = st.builds(LayoutObject, label=st.integers(0, 8190), box=boxes)


def refusal(read, *arguments, **keywords):
    """Return the one sentence that refuses something."""
    with pytest.raises(ValueError, match=r"^[^\n]{1,500}$") as caught:
        read(*arguments, **keywords)
    return str(caught.value)


# --- objects --------------------------------------------------------------------------------------


def test_an_object_has_python_numbers_whatever_it_was_made_from():
    made = LayoutObject(label=np.int64(3), box=np.array([0.25, 0, 1, 0.5], dtype=np.float32))

    assert made == OBJECTS[0] == LayoutObject(label=3, box=[0.25, 0, 1, 0.5])
    assert hash(made) == hash(OBJECTS[0])
    assert type(made.label) is int
    assert type(LayoutObject(label=np.str_("cat"), box=made.box).label) is str
    assert [type(edge) for edge in made.box] == [float] * 4
    assert json.loads(json.dumps([asdict(each) for each in OBJECTS])) == json.loads(JSON)


def test_an_object_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        OBJECTS[0].label = 4


@pytest.mark.parametrize(
    ("label", "box", "reason"),
    [
        (-1, (0, 0, 1, 1), "label must be at least 0, got -1"),
        (True, (0, 0, 1, 1), "label must be a whole number, got True"),
        (3.0, (0, 0, 1, 1), "label must be a whole number, got 3.0"),
        (" ", (0, 0, 1, 1), "label must be a whole number, got ' '"),
        (None, (0, 0, 1, 1), "label must be a whole number, got None"),
        (3, (0, 0, 1), r"box must be left, top, right and bottom, got \(0, 0, 1\)"),
        (3, (0, 0, 1, 1, 1), "box must be left, top, right and bottom"),
        (3, np.eye(4), "box must have edges between 0 and 1"),
        (3, "0011", "box must be left, top, right and bottom, got '0011'"),
        (3, {"left": 0}, "box must be left, top, right and bottom"),
        (3, None, "box must be left, top, right and bottom, got None"),
        (3, (0, 0, 1, 1.001), "box must have edges between 0 and 1, got 1.001"),
        (3, (-0.1, 0, 1, 1), "box must have edges between 0 and 1, got -0.1"),
        (3, (0, nan, 1, 1), "box must have edges between 0 and 1, got nan"),
        (3, (0, 0, inf, 1), "box must have edges between 0 and 1, got inf"),
        (3, (0, 0, True, 1), "box must have edges between 0 and 1, got True"),
        (3, (0, 0, "1", 1), "box must have edges between 0 and 1, got '1'"),
        (3, (0.5, 0, 0.5, 1), r"box must have left < right and top < bottom, got \[0.5, 0, 0.5"),
        (3, (0, 0.6, 1, 0.5), "box must have left < right and top < bottom"),
    ],
)
def test_an_object_that_makes_no_sense_is_refused_with_what_was_found(label, box, reason):
    assert re.search(reason, refusal(LayoutObject, label=label, box=box))


# --- reading --------------------------------------------------------------------------------------


def test_a_layout_is_the_same_from_a_list_json_a_path_and_a_url(tmp_path):
    path = tmp_path / "boxes.json"
    path.write_bytes(JSON)
    url = f"data:application/json;base64,{base64.b64encode(JSON).decode()}"

    marked = codecs.BOM_UTF8 + JSON  # as Notepad and PowerShell save it
    values = (OBJECTS, list(OBJECTS), json.loads(JSON), JSON, bytearray(JSON), path, str(path), url)
    values = (*values, marked)

    assert [read_layout(value) for value in values] == [OBJECTS] * len(values)


def test_an_empty_layout_is_a_layout():
    assert read_layout([]) == read_layout(b"[]") == ()


def test_labels_may_be_called_by_their_names():
    names = ("cat", "red circle", "dog", "bird")
    called = json.loads(JSON)
    called[0]["label"] = "bird"
    called[1]["label"] = "cat"

    assert read_layout(called, names) == read_layout(JSON, names) == OBJECTS


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (3, "3 is not a layout; give a path, a data: URL, the bytes of a file, or a list of"),
        (None, "None is not a layout"),
        ({"label": 3, "box": [0, 0, 1, 1]}, "is not a layout"),
        (b"{", "the data is not JSON: "),
        (b"3", "3 is not a layout"),
        (b"\xff", "the data is not UTF-8 text: "),
        ('[{"label": 3}]'.encode("utf-16"), "the data is text in UTF-16; save it as UTF-8"),
        (b"[" * 100_000, "the data is not JSON: "),
        (b'[{"label": 3, "box": [0, 0, NaN, 1]}]', "the data is not JSON: "),
        (b" " * (MAX_BYTES + 1), f"the data has more than {MAX_BYTES} bytes; make it smaller"),
        ("missing.json", "missing.json cannot be read: No such file or directory"),
        ("data:application/json,[]", "is not a data: URL in base64"),
        ([3], "object 0 must have a label and a box, got 3"),
        ([{"label": 3}], "object 0 must have a label and a box, got keys label"),
        ([OBJECTS[0], {"label": 3, "box": [0, 0, 1, 1], "score": 1}], "object 1 must have a label"),
        ([{"label": 3.5, "box": [0, 0, 1, 1]}], "object 0: label must be a whole number, got 3.5"),
        ([{"label": 3, "box": [0, 0, 1, 2]}], "object 0: box must have edges between 0 and 1"),
        ([{"label": "", "box": [0, 0, 1, 1]}], "object 0: label must be a whole number, got ''"),
    ],
)
def test_what_is_no_layout_is_one_sentence(value, reason):
    assert reason in refusal(read_layout, value)


def test_a_name_that_no_label_or_more_than_one_has_is_refused():
    names = ("cat", "dog", "cat")

    assert label_number("dog", names) == 1
    assert "no label is called 'cow'" in refusal(label_number, "cow", names)
    assert "labels 0, 2 are all called 'cat'; give the number" in refusal(
        label_number, "cat", names
    )
    entry = {"label": "cow", "box": [0, 0, 1, 1]}
    assert refusal(read_layout, [entry], names).startswith("object 0: no label is called 'cow'")


@pytest.mark.parametrize("text", ["cat\nred circle\ndog\n", "\ufeffcat\r\n red circle \r\ndog"])
def test_label_names_are_the_lines_of_a_file(tmp_path, text):
    path = tmp_path / "names.txt"
    path.write_bytes(text.encode())

    assert read_label_names(path) == read_label_names(str(path)) == ("cat", "red circle", "dog")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"cat\n\ndog\n", "names.txt, line 2: expected the name of label 1, found an empty line"),
        (b"", "names.txt, line 1: expected the name of label 0"),
        (b"cat\n\xff\n", "names.txt is not UTF-8 text"),
        (b"cat\n" * MAX_BYTES, f"names.txt has more than {MAX_BYTES} bytes"),
    ],
)
def test_a_malformed_file_of_label_names_is_one_sentence(tmp_path, content, reason):
    path = tmp_path / "names.txt"
    path.write_bytes(content)

    assert reason in refusal(read_label_names, path)


# --- tokens ---------------------------------------------------------------------------------------


def test_the_tokens_of_a_layout_worked_out_by_hand():
    # 89 steps a side: 0.25 is 22.25, so column 22; 0.5 is 44.5, so row 44, the even one.
    expected = [3, 22, 44 * 90 + 89, 0, 0, 8099, *[8191] * 28 * 3, 0, 8099]

    tokens = layout_tokens(OBJECTS, ENCODER)

    assert tokens.tolist() == expected
    assert tokens.dtype == np.int64
    assert tokens.shape == (92,)


def test_the_layout_without_objects_is_empty_places_and_the_whole_picture():
    assert layout_tokens((), ENCODER).tolist() == [8191] * 90 + [0, 8099]
    assert layout_tokens((), SMALL).tolist() == [16] * 6 + [0, 15]


@pytest.mark.parametrize(
    ("vocab_size", "box", "corners"),
    [
        (17, (0.0, 0.0, 1.0, 1.0), (0, 15)),
        (17, (1 / 3, 0.0, 1.0, 2 / 3), (1, 11)),  # rows go first: 2 * 4 + 3
        (17, (0.0, 1 / 3, 2 / 3, 1.0), (4, 14)),
        (17, (0.16, 0.0, 0.17, 1.0), (0, 13)),  # 0.48 and 0.51 of a step
        (37, (0.5, 0.0, 1.0, 0.5), (2, 17)),  # 2.5 is 2: halves go to the even number
        (37, (0.3, 0.1, 0.7, 0.5), (2, 16)),  # 1.5 is 2, 0.5 is 0, 3.5 is 4, 2.5 is 2
        (16, (0.0, 0.0, 1.0, 1.0), (0, 15)),  # whose last point is also "no object"
    ],
)
def test_corners_are_points_of_a_square_grid_row_by_row(vocab_size, box, corners):
    encoder = replace(SMALL, vocab_size=vocab_size)

    tokens = layout_tokens([LayoutObject(label=5, box=box)], encoder)

    assert tuple(tokens[:3]) == (5, *corners)


@given(st.lists(objects, max_size=30))
def test_tokens_follow_the_arithmetic_of_taming_transformers(layout):
    sections = int(sqrt(8192))
    expected = []
    for each in layout:
        x0, y0, x1, y1 = each.box
        top_left = np.rint(y0 * (sections - 1)) * sections + np.rint(x0 * (sections - 1))
        bottom_right = np.rint(y1 * (sections - 1)) * sections + np.rint(x1 * (sections - 1))
        expected += [each.label, top_left, bottom_right]
    while len(expected) < 90:
        expected.append(8191)
    expected += [0, sections**2 - 1]

    np.testing.assert_array_equal(layout_tokens(layout, ENCODER), expected)


def test_a_full_layout_has_no_empty_places_and_one_more_object_is_refused():
    assert (max_objects(ENCODER), max_objects(SMALL)) == (30, 2)
    assert layout_tokens(OBJECTS * 15, ENCODER).tolist()[-3:] == [8099, 0, 8099]

    reason = refusal(layout_tokens, OBJECTS * 16, ENCODER)

    assert reason == "a layout of 32 objects is too long; give at most 30"


def test_no_label_can_be_taken_for_no_object():
    last = LayoutObject(label=num_labels(SMALL) - 1, box=(0, 0, 1, 1))

    assert layout_tokens([last], SMALL).tolist()[:3] == [15, 0, 15]

    for label in (16, 17, 10**30):
        reason = refusal(layout_tokens, [last, replace(last, label=label)], SMALL)
        assert reason == f"object 1 has label {label}; labels lie between 0 and 15"


@pytest.mark.parametrize("max_tokens", [2, 4, 78, 91])
def test_an_encoder_of_another_length_is_none_of_layouts(max_tokens):
    reason = refusal(layout_tokens, (), replace(ENCODER, max_tokens=max_tokens))

    assert reason.startswith(f"an encoder of {max_tokens} tokens does not fit layouts, which")
