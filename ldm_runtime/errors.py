"""Errors raised by ldm_runtime.

LdmError
├── RequestError      a field of a generation request is unknown, of the wrong type or out of range
├── BundleError       the folder is not a bundle, or a file of it is missing or altered
│   └── ManifestError   the bundle's manifest.json is absent, malformed or too new
├── DeadlineError     a request took longer than it was given
├── BackendError      the requested backend cannot run on this machine
├── EngineBuildError  a TensorRT engine cannot be built from a graph, or not on this machine
└── ShapeError        an engine was fed a tensor it does not accept

Every message says what was found, with the value, and what to do about it.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar


class LdmError(Exception):
    """Anything a user of this package can act on; can be pickled, to cross processes."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Rebuild it without its constructor, whose arguments its message no longer holds."""
        return _rebuilt, (type(self), self.args, self.__dict__.copy())


class RequestError(LdmError):
    """A generation request asks for something impossible.

    Attributes:
        field: Name of the offending field of `GenerationRequest`.
    """

    def __init__(self, field: str, message: str) -> None:
        self.field = field
        super().__init__(f"{field}: {message}")

    @property
    def reason(self) -> str:
        """The message without the field, for the same error of another one."""
        return str(self).removeprefix(f"{self.field}: ")


class DeadlineError(LdmError):
    """A request took longer than it was given."""


class BundleError(LdmError):
    """A bundle lacks a file, or a file is not the one the manifest describes."""


class ManifestError(BundleError):
    """A bundle's manifest is absent, malformed or written by a newer exporter."""


class BackendError(LdmError):
    """A backend is unknown, not installed, or cannot run here."""


class EngineBuildError(LdmError):
    """A TensorRT engine cannot be built: the message quotes the builder and names the node."""


class ShapeError(LdmError):
    """A tensor does not fit the engine it was given to.

    Attributes:
        name: Name of the engine input.
        shape: The shape that was passed.
    """

    def __init__(
        self, name: str, shape: Sequence[int], expected: Sequence[int | str], *, fix: str = ""
    ) -> None:
        self.name = name
        self.shape = tuple(shape)
        wanted = "x".join(map(str, expected))
        message = f"input {name!r} has shape {'x'.join(map(str, shape))}, "
        message += f"but this engine takes {wanted}"
        super().__init__(f"{message}; {fix}" if fix else message)


_Error = TypeVar("_Error", bound=LdmError)


def _rebuilt(kind: type[_Error], args: tuple[Any, ...], attributes: Mapping[str, Any]) -> _Error:
    error = kind.__new__(kind, *args)
    error.__dict__.update(attributes)
    return error
