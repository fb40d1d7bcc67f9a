"""The folder of a batch: images called after the hashes of their requests, each written whole."""

import hashlib
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import msgspec

from ldm_runtime.closing import Closing
from ldm_runtime.durable import lock_folder, remove_stale_parts, sync, write_file
from ldm_runtime.errors import RequestError
from ldm_serve.batch.results import Outcome, Place, ResultError, ResultLine, ResultLog
from ldm_serve.batch.units import Unit
from ldm_serve.errors import BatchError
from ldm_serve.executors.messages import Failed, Finished

BATCH_NAME, RESULTS_NAME = "batch.json", "results.jsonl"


class BatchRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What every run of a batch has to know of the first.

    Attributes:
        seed: Decides the seeds that requests leave open.
        requests: Name of the file of requests.
    """

    seed: int
    requests: str | None = None


class BatchFolder(Closing):
    """A folder, locked for one run.

    Images are in `ab/abcdef….png`, so that no folder has too many files. Each is on the disk before
    its line in the log is, and a file that is there is whole.

    Args:
        path: The folder, made if need be.
        requests: Name of the file of requests, whose results it has; None takes those of any.

    Attributes:
        seed: Decides the seeds that requests leave open; the first run has chosen it.

    Raises:
        RequestError: Another run has it, or it is a file.
        BatchError: It cannot be written to, or is damaged.
    """

    def __init__(self, path: Path, requests: str | None = None) -> None:
        if path.is_file():
            raise RequestError("out", f"{path} is a file; give a folder")
        self.path, self._requests = path, requests
        with self._writing():
            self._lock = _lock(path)
            try:
                self._remove_parts()
                self._record = self._first_record()
                self.seed = self._record.seed
                self.log = ResultLog(path / RESULTS_NAME)
            except BaseException:
                os.close(self._lock)
                raise

    def has(self, unit: Unit) -> bool:
        """Return whether an image is there."""
        return (self.path / _file_of(unit)).is_file()

    def add(self, unit: Unit, result: Finished) -> None:
        """Write an image, and its line into the log.

        Raises:
            BatchError: The disk is full, or the folder cannot be written to.
        """
        (data,) = result.images
        path = self.path / _file_of(unit)
        with self._writing():
            if not path.parent.is_dir():
                path.parent.mkdir()
                sync(self.path)
            write_file(path, data)
            self.log.append(_line(unit, data, seconds=round(result.timings["total"], 3)))

    def add_found(self, unit: Unit) -> None:
        """Write the line of an image that is there already.

        Raises:
            BatchError: See `add`.
        """
        with self._writing():
            self.log.append(_line(unit, (self.path / _file_of(unit)).read_bytes()))

    def add_failure(self, unit: Unit, failure: Failed) -> None:
        """Write the line of an image that cannot be generated.

        Raises:
            BatchError: See `add`.
        """
        error = ResultError(code=failure.code, message=failure.message)
        with self._writing():
            self.log.append(
                ResultLine(
                    line=unit.line,
                    image=unit.image,
                    seed=unit.request.seed,
                    request=unit.name,
                    error=error,
                )
            )

    def keep(self, outcomes: Mapping[Place, Outcome]) -> None:
        """Drop all lines of the log but those of these outcomes.

        Raises:
            RequestError: They would all be dropped, and are of a file of another name.
            BatchError: See `add`.
        """
        known = self._record.requests
        is_other = None not in (known, self._requests) and known != self._requests
        if is_other and self.log.has_lines and not outcomes:
            raise RequestError(
                "out",
                f"{self.path} has the results of {known}, which those of {self._requests} would "
                "replace; give another folder",
            )
        with self._writing():
            self.log.keep(outcomes)
            if is_other:
                self._write(msgspec.structs.replace(self._record, requests=self._requests))

    def close(self) -> None:
        """Unlock it. Closing twice is harmless."""
        self.log.close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _remove_parts(self) -> None:
        """Remove what a run that was killed has left."""
        for folder in (self.path, *(each for each in self.path.iterdir() if each.is_dir())):
            remove_stale_parts(folder, seconds=0)

    def _first_record(self) -> BatchRecord:
        """Return what the first run has written."""
        path = self.path / BATCH_NAME
        try:
            return msgspec.json.decode(path.read_bytes(), type=BatchRecord)
        except FileNotFoundError:
            record = BatchRecord(seed=secrets.randbits(64), requests=self._requests)
            self._write(record)
            return record
        except msgspec.DecodeError as error:
            raise BatchError(
                f"{path} is damaged: {error}; remove it for new seeds where requests have none"
            ) from error

    def _write(self, record: BatchRecord) -> None:
        write_file(self.path / BATCH_NAME, msgspec.json.encode(record) + b"\n")

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            where = error.filename or self.path
            raise BatchError(
                f"{where} cannot be written: {error.strerror or error}; mend that and run the same "
                "command again, which goes on from here"
            ) from error


def _lock(path: Path) -> int:
    try:
        return lock_folder(path)
    except BlockingIOError as error:
        raise RequestError(
            "out", f"another run is writing to {path}; wait for it, or give another folder"
        ) from error


def _file_of(unit: Unit) -> str:
    return f"{unit.name[:2]}/{unit.name}.png"


def _line(unit: Unit, data: bytes, seconds: float | None = None) -> ResultLine:
    return ResultLine(
        line=unit.line,
        image=unit.image,
        seed=unit.request.seed,
        request=unit.name,
        path=_file_of(unit),
        sha256=hashlib.sha256(data).hexdigest(),
        seconds=seconds,
    )
