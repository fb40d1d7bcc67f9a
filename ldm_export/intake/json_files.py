"""JSON objects of a model's folder: small, untrusted, and without repeated keys."""

import json
from collections.abc import Mapping
from pathlib import Path

from ldm_export.checkpoint.not_a_file import why_not_opened
from ldm_export.errors import CheckpointError
from ldm_runtime.tensor_files.errors import FormatError

#: An index of a hundred thousand tensors has fewer bytes.
_MAX_BYTES = 16 << 20

#: The entries of a JSON object.
Entries = Mapping[str, object]


def read_json(path: Path) -> Entries:
    """Read a file that holds one JSON object.

    Raises:
        CheckpointError: It cannot be read, is too large, or does not hold one.
    """
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise CheckpointError(path, why_not_opened(path, error)) from error
    if len(text) > _MAX_BYTES:
        raise CheckpointError(path, f"has more than the {_MAX_BYTES} bytes allowed for JSON")
    try:
        entries = json.loads(
            text.decode("utf-8"), object_pairs_hook=_without_repeats, parse_constant=_no_constant
        )
    except (ValueError, RecursionError) as error:
        raise CheckpointError(path, f"is not the JSON it should be ({error}); get it again") from (
            error
        )
    if not isinstance(entries, dict):
        raise CheckpointError(path, "does not hold a JSON object; get it again")
    return entries


def _without_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise FormatError("a key appears twice")
    return entries


def _no_constant(name: str) -> object:
    raise FormatError(f"{name} is not valid JSON")
