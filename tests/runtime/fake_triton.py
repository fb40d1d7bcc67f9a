"""`triton_python_backend_utils` without Triton: the part of its interface that models use.

Source: README.md and src/pb_stub.cc of github.com/triton-inference-server/python_backend.
"""

import numpy as np


class Tensor:
    """A tensor that is C-contiguous, of a type that Triton knows, as the real one requires."""

    def __init__(self, name, array):
        assert array.dtype in (np.uint8, np.int32, np.int64, np.uint64, np.float64, np.object_)
        self._name, self._array = name, np.ascontiguousarray(array)

    def name(self):
        return self._name

    def as_numpy(self):
        return self._array


class TritonError:
    UNKNOWN, INTERNAL, NOT_FOUND, INVALID_ARG, UNAVAILABLE, UNSUPPORTED, ALREADY_EXISTS = range(7)
    CANCELLED = 7

    def __init__(self, message, code=INTERNAL):
        self._message, self._code = message, code

    def message(self):
        return self._message

    def code(self):
        return self._code


class InferenceResponse:
    def __init__(self, output_tensors=(), error=None):
        self._tensors, self._error = list(output_tensors), error

    def output_tensors(self):
        return self._tensors

    def has_error(self):
        return self._error is not None

    def error(self):
        return self._error


class InferenceRequest:
    """A request as a client sends it: `values` are lists, a row per image."""

    def __init__(self, cancelled_after=None, **values):
        self._inputs = [Tensor(name, _array(name, rows)) for name, rows in values.items()]
        self._looks_left = cancelled_after

    def inputs(self):
        return self._inputs

    def is_cancelled(self):
        if self._looks_left is None:
            return False
        self._looks_left -= 1
        return self._looks_left < 0


_DTYPES = {
    "seed": np.uint64,
    "num_inference_steps": np.int32,
    "guidance_scale": np.float64,
    "class_label": np.int64,
}


def _array(name, rows):
    values = [each.encode() if isinstance(each, str) else each for each in rows]
    return np.array([[each] for each in values], _DTYPES.get(name, np.object_))
