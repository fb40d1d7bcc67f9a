"""Requests of Triton's Python backend, each of a batch of images, in one continuous batch."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ldm_runtime.errors import LdmError, RequestError
from ldm_runtime.pipeline.continuous import BatchEvent, ContinuousBatch
from ldm_runtime.pipeline.results import Result
from ldm_runtime.requests.remote_fields import parse_remote_request

#: Input that holds fields without an input of their own, as a JSON object.
FIELDS_INPUT = "request"


class Call:
    """A request of Triton: inputs of shape (B, 1), of which each row is one image.

    It holds nothing of Triton's memory. Its errors are its own, and leave other calls alone.

    Args:
        request: A `pb_utils.InferenceRequest`.
        batch: The batch that its images join.
        inputs: Names of the inputs of the model; each but "request" is a field of a request.
    """

    def __init__(self, request: Any, batch: ContinuousBatch, inputs: Sequence[str]) -> None:  # noqa: ANN401
        self._request, self._batch = request, batch
        self._results: dict[int, Result] = {}
        self._error: tuple[str, str] | None = None
        self.numbers: list[int] = []
        try:
            for fields in _rows(_arrays(request, inputs)):
                self.numbers.append(batch.add(parse_remote_request(fields)))
        except LdmError as error:
            self._end(str(error), "INVALID_ARG")

    def check_cancellation(self) -> None:
        """Stop the images if the client has cancelled the request."""
        if self._error is None and self._request.is_cancelled():
            self._end("the client has cancelled the request", "CANCELLED")

    def take(self, number: int, event: BatchEvent) -> None:
        """Note an event of one of the images, by its number in the batch."""
        if isinstance(event, Result):
            self._results[number] = event
        elif isinstance(event, Exception):
            self._end(str(event), "INVALID_ARG" if isinstance(event, RequestError) else "INTERNAL")

    def response(self, triton: Any) -> Any:  # noqa: ANN401  (a module without types)
        """Return the response: `image` (B, H, W, 3) uint8 and `image_seed` (B, 1) uint64.

        Args:
            triton: The module `triton_python_backend_utils`.
        """
        results = [self._results[number] for number in self.numbers if number in self._results]
        if self._error is None and len({result.image.size for result in results}) > 1:
            self._end("the images of a batch have one size; send others apart", "INVALID_ARG")
        if self._error is not None:
            message, code = self._error
            error = triton.TritonError(message, getattr(triton.TritonError, code))
            return triton.InferenceResponse(error=error)
        images = np.stack([np.asarray(result.image) for result in results])
        seeds = np.array([[result.seed] for result in results], np.uint64)
        outputs = [triton.Tensor("image", images), triton.Tensor("image_seed", seeds)]
        return triton.InferenceResponse(output_tensors=outputs)

    def _end(self, message: str, code: str) -> None:
        self._error = message, code
        for number in self.numbers:
            self._batch.cancel(number)

    def __contains__(self, number: int) -> bool:
        return number in self.numbers


def run(calls: Sequence[Call], batch: ContinuousBatch) -> None:
    """Generate the images of all calls, which share calls of the UNet."""
    while batch:
        for call in calls:
            call.check_cancellation()
        for number, event in batch.advance():
            for call in calls:
                if number in call:
                    call.take(number, event)


def _arrays(request: Any, inputs: Sequence[str]) -> dict[str, npt.NDArray[Any]]:  # noqa: ANN401
    tensors = {tensor.name(): tensor for tensor in request.inputs()}
    return {name: tensors[name].as_numpy() for name in inputs if name in tensors}


def _rows(arrays: Mapping[str, npt.NDArray[Any]]) -> Iterator[dict[str, Any]]:
    """Yield the fields of each image; inputs of their own replace those in `request`."""
    for row in range(max((len(array) for array in arrays.values()), default=0)):
        values = {name: _value(name, array[row].item()) for name, array in arrays.items()}
        fields = _object(values.pop(FIELDS_INPUT, "{}")) | values
        if fields.get("num_images", 1) != 1:
            raise RequestError("num_images", "leave it out; send a batch for several images")
        yield fields


def _value(name: str, value: Any) -> Any:  # noqa: ANN401
    """Return a value as the fields of a request have it; Triton's strings are bytes."""
    if not isinstance(value, bytes):
        return value
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise RequestError(name, "is not text in UTF-8") from None


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(FIELDS_INPUT, f"is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise RequestError(FIELDS_INPUT, f"must be a JSON object, got {type(found).__name__}")
    return found
