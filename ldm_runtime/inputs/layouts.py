"""Layouts: labelled boxes that say which object to generate where, and their tokens."""

import numbers
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Annotated

import msgspec
import numpy as np
import numpy.typing as npt

from ldm_runtime.inputs.reading import FORMS, read_bytes, shown, text_of
from ldm_runtime.specs.networks import TextEncoderSpec
from ldm_runtime.suggestions import did_you_mean

#: Most bytes of a layout file, and of a file of label names.
MAX_BYTES = 2**20

_KEYS = frozenset({"label", "box"})
_OBJECT_TOKENS, _CROP_TOKENS = 3, 2
_WHOLE = (0.0, 0.0, 1.0, 1.0)

Box = tuple[float, float, float, float]


@dataclass(frozen=True, kw_only=True)
class LayoutObject:
    """An object to generate, and where.

    Attributes:
        label: Number of its class, at least 0, or the name that a bundle has for it.
        box: Left, top, right and bottom edge, as shares of the image's width and height from its
            left and top edge.

    Raises:
        ValueError: A value has the wrong type or lies out of range, or the box has no area.
    """

    label: Annotated[int, msgspec.Meta(ge=0)] | str
    box: Box

    def __post_init__(self) -> None:
        object.__setattr__(self, "label", _checked_label(self.label))
        object.__setattr__(self, "box", _checked_box(self.box))

    def numbered(self, names: Sequence[str]) -> "LayoutObject":
        """Return the object with the number of its label, which `names` gives for a name.

        Raises:
            ValueError: No label is called so, or more than one.
        """
        return LayoutObject(label=label_number(self.label, names), box=self.box)

    @property
    def number(self) -> int:
        """The number of its label.

        Raises:
            ValueError: The label is a name.
        """
        return label_number(self.label, ())


def read_layout(value: object, names: Sequence[str] | None = None) -> tuple[LayoutObject, ...]:
    """Return the objects of a layout.

    Args:
        value: A list whose entries are `LayoutObject` or mappings such as
            `{"label": 3, "box": [0.1, 0.2, 0.5, 0.9]}`; or such a list in JSON: a path, a `data:`
            URL in base64 or the bytes of the file. A path lets the author of the text read
            any such file that this process can; a server should only pass on text that starts
            with "data:".
        names: Names of the labels, in the order of their numbers, so that an entry may say
            `"label": "dog"`; from `read_label_names`. None keeps names for `numbered`.

    Raises:
        ValueError: In one sentence, why it is not a layout; the sentence counts objects from 0.
    """
    if isinstance(value, bytes | bytearray | memoryview | str | os.PathLike):
        value = _json(value)
    if isinstance(value, Mapping) or not isinstance(value, Sequence):
        raise ValueError(
            f"{_quoted(value)} is not a layout; give {FORMS}, or a list of "
            '{"label": 3, "box": [left, top, right, bottom]}'
        )
    return tuple(_object(index, entry, names) for index, entry in enumerate(value))


def read_label_names(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Read the names of labels from a text file: the name of label 0 in line 1, and so on.

    White space around names does not matter. A name may occur twice, as some do in OpenImages; then
    it cannot be asked for by name.

    Raises:
        ValueError: The file cannot be read, is not UTF-8 text or is too large, or a line is empty.
    """
    named = read_bytes(path, MAX_BYTES)
    text = text_of(named)
    names = tuple(line.strip() for line in text.rstrip().split("\n"))
    if "" in names:
        raise ValueError(
            f"{named.name}, line {names.index('') + 1}: expected the name of label "
            f"{names.index('')}, found an empty line"
        )
    return names


def label_number(label: int | str, names: Sequence[str]) -> int:
    """Return the number of a label: that of a name is its place in `names`, from 0.

    Raises:
        ValueError: No label is called so, or more than one.
    """
    if not isinstance(label, str):
        return label
    if not names:
        raise ValueError(
            f"{_quoted(label)} is a name, and this bundle has no names of labels; give "
            "--label-names FILE, or a number"
        )
    found = [number for number, each in enumerate(names) if each == label]
    if not found:
        raise ValueError(
            f"no label is called {_quoted(label)}{did_you_mean(label, names)}; "
            "`ldm inspect --full` shows the names in a bundle"
        )
    if len(found) > 1:
        raise ValueError(
            f"labels {', '.join(map(str, found))} are all called {_quoted(label)}; give the number"
        )
    return found[0]


def max_objects(encoder: TextEncoderSpec) -> int:
    """Return how many objects a layout can have.

    Raises:
        ValueError: The number of tokens of the encoder is not that of any layout.
    """
    most, rest = divmod(encoder.max_tokens - _CROP_TOKENS, _OBJECT_TOKENS)
    if most < 1 or rest:
        raise ValueError(
            f"an encoder of {encoder.max_tokens} tokens does not fit layouts, which have "
            f"{_OBJECT_TOKENS} per object and {_CROP_TOKENS} for the crop"
        )
    return most


def num_labels(encoder: TextEncoderSpec) -> int:
    """Return how many labels there can be: every token but the last, which says "no object".

    How many the model has learned is not known: labels share token embeddings with points.
    """
    return encoder.vocab_size - 1


def layout_tokens(
    objects: Sequence[LayoutObject], encoder: TextEncoderSpec
) -> npt.NDArray[np.int64]:
    """Return the tokens of a layout, (max_tokens,).

    Three tokens per object: its label, its top left and its bottom right corner. Then three times
    the last token of the vocabulary for every object that is missing, and the corners of the crop,
    which is the whole image. A point is a place in a square grid, row by row, as fine as the
    vocabulary allows: 90 x 90 of 8192 tokens. Halves are rounded to even.

    Source: `ObjectsBoundingBoxConditionalBuilder` in
    `taming/data/conditional_builder/objects_bbox.py` of CompVis/taming-transformers, commit
    3ba01b2, with `encode_crop` and no flags.

    Raises:
        ValueError: There are too many objects, or a label that is not below `num_labels`.
    """
    most, known, none = max_objects(encoder), num_labels(encoder), encoder.vocab_size - 1
    if len(objects) > most:
        raise ValueError(f"a layout of {len(objects)} objects is too long; give at most {most}")
    for index, each in enumerate(objects):
        if each.number >= known:
            raise ValueError(
                f"object {index} has label {each.number}; labels lie between 0 and {known - 1}"
            )
    side = isqrt(encoder.vocab_size)
    tokens = [token for each in objects for token in (each.number, *_corners(each.box, side))]
    tokens += [none] * _OBJECT_TOKENS * (most - len(objects))
    tokens += _corners(_WHOLE, side)
    return np.array(tokens, dtype=np.int64)


def _corners(box: Box, side: int) -> tuple[int, int]:
    left, top, right, bottom = box
    return _point(left, top, side), _point(right, bottom, side)


def _point(x: float, y: float, side: int) -> int:
    return round(y * (side - 1)) * side + round(x * (side - 1))


def _json(value: bytes | bytearray | memoryview | str | os.PathLike[str]) -> object:
    named = read_bytes(value, MAX_BYTES)
    text = text_of(named)
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ValueError(f"{named.name} is not JSON: {error}") from error


def _object(index: int, entry: object, names: Sequence[str] | None) -> LayoutObject:
    if isinstance(entry, LayoutObject):
        return entry
    if not isinstance(entry, Mapping) or entry.keys() != _KEYS:
        found = f"keys {', '.join(map(str, entry))}" if isinstance(entry, Mapping) else entry
        raise ValueError(f"object {index} must have a label and a box, got {shown(found)}")
    try:
        found = LayoutObject(label=entry["label"], box=entry["box"])
        return found if names is None else found.numbered(names)
    except ValueError as error:
        raise ValueError(f"object {index}: {error}") from error


def _checked_label(label: object) -> int | str:
    if isinstance(label, str) and label.strip():
        return str.__str__(label)  # NumPy's text becomes Python's, as its numbers do
    if isinstance(label, bool) or not isinstance(label, numbers.Integral):
        raise ValueError(f"label must be a whole number, got {_quoted(label)}")
    if label < 0:
        raise ValueError(f"label must be at least 0, got {_quoted(label)}")
    return int(label)


def _checked_box(box: object) -> Box:
    edges = box.tolist() if isinstance(box, np.ndarray) else box
    if not isinstance(edges, list | tuple) or len(edges) != len(_WHOLE):
        raise ValueError(f"box must be left, top, right and bottom, got {_quoted(box)}")
    for edge in edges:
        is_number = isinstance(edge, numbers.Real) and not isinstance(edge, bool)
        if not is_number or not 0 <= edge <= 1:  # NaN is not
            raise ValueError(f"box must have edges between 0 and 1, got {_quoted(edge)}")
    left, top, right, bottom = map(float, edges)
    if left >= right or top >= bottom:
        raise ValueError(f"box must have left < right and top < bottom, got {_quoted(list(edges))}")
    return left, top, right, bottom


def _quoted(value: object) -> str:
    return shown(repr(value))
