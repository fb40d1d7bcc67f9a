"""Results files: a measured configuration per line, read back as the record that it was."""

from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import msgspec

from ldm_runtime.errors import LdmError
from measuring.rows import Row

_Row = TypeVar("_Row", bound=Row)


def read_rows(path: Path, kind: type[_Row], what: str) -> Iterator[_Row]:
    """Yield the rows of a results file, oldest first; none if there is no file.

    Args:
        path: The file.
        kind: The record of a row.
        what: Its name in error messages.

    Raises:
        LdmError: A line is no such row.
    """
    lines = path.read_text().splitlines() if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            yield msgspec.json.decode(line, type=kind)
        except msgspec.MsgspecError as error:
            raise LdmError(f"{path}:{number} is no {what} ({error}); remove it") from error
