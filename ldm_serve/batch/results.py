"""`results.jsonl`: what became of every image of a batch, a line of JSON each."""

import errno
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, TypeAlias

import msgspec

from ldm_runtime.closing import Closing
from ldm_runtime.durable import whole_file
from ldm_serve.batch.units import Unit

#: The number of a line of requests, and the index of an image of its request.
Place: TypeAlias = tuple[int, int]


class Outcome(NamedTuple):
    """What became of a request, in short.

    Attributes:
        request: Hash of the request.
        is_failure: Whether there is no file.
    """

    request: str
    is_failure: bool


class ResultError(msgspec.Struct, frozen=True, kw_only=True):
    """Why an image could not be generated.

    Attributes:
        code: What happened, for programs.
        message: What happened, in a sentence.
    """

    code: str
    message: str


class ResultLine(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What became of one image.

    Attributes:
        line: Number of the line that asks for it, from 1.
        image: Its index in the request of that line.
        seed: Its seed.
        request: Hash of its request.
        path: Its file, in the folder of the batch.
        sha256: Hash of that file.
        seconds: How long its worker took, other images in the same calls included; absent if the
            file was there, from a run that was killed or for another line.
        error: Why there is no file.
    """

    line: int
    image: int
    seed: int
    request: str
    path: str | None = None
    sha256: str | None = None
    seconds: float | None = None
    error: ResultError | None = None

    @property
    def place(self) -> Place:
        """What tells it from other lines."""
        return self.line, self.image

    @property
    def outcome(self) -> Outcome:
        """What it says, in short."""
        return Outcome(self.request, self.error is not None)


_decoder = msgspec.json.Decoder(ResultLine)


class ResultLog(Closing):
    """The result lines of a batch: appended whole or not at all, one per image.

    What a killed process left of a line is removed.

    Args:
        path: The file.

    Raises:
        OSError: It cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = _opened(path)
        self._outcomes: dict[Place, Outcome] = {}
        end = 0
        for data, line in self._lines():
            end += len(data) if data.endswith(b"\n") else 0
            if line is not None:
                self._outcomes[line.place] = line.outcome
        os.ftruncate(self._descriptor, end)  # so that no line is appended to a part of one

    @property
    def has_lines(self) -> bool:
        """Whether it says anything of any image."""
        return bool(self._outcomes)

    def outcome(self, unit: Unit) -> Outcome | None:
        """Return what became of this very request, if the log says so."""
        found = self._outcomes.get((unit.line, unit.image))
        return None if found is None or found.request != unit.name else found

    def append(self, line: ResultLine) -> None:
        """Add a line.

        Raises:
            OSError: It cannot be written, and nothing of it is.
        """
        data = msgspec.json.encode(line) + b"\n"
        end = os.lseek(self._descriptor, 0, os.SEEK_END)
        try:
            if os.write(self._descriptor, data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            os.ftruncate(self._descriptor, end)
            raise
        self._outcomes[line.place] = line.outcome

    def keep(self, outcomes: Mapping[Place, Outcome]) -> None:
        """Drop all lines but one of each of these outcomes.

        Raises:
            OSError: The file cannot be written, and is as it was.
        """
        missing = dict(outcomes)
        with whole_file(self._path) as file:
            for data, line in self._lines():
                if line is not None and missing.get(line.place) == line.outcome:
                    del missing[line.place]
                    file.write(data)
        self.close()
        self._descriptor = _opened(self._path)
        self._outcomes = dict(outcomes)

    def close(self) -> None:
        """Close the file. Closing twice is harmless."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _lines(self) -> Iterator[tuple[bytes, ResultLine | None]]:
        """Yield the lines as they are, with what they say; None for one that says nothing."""
        with self._path.open("rb") as file:
            for data in file:
                try:
                    yield data, _decoder.decode(data) if data.endswith(b"\n") else None
                except msgspec.DecodeError:
                    yield data, None


def _opened(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
