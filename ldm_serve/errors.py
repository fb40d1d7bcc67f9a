"""Errors of the server: what each says, its HTTP status, and its names in OpenAI's API."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from ldm_runtime.errors import DeadlineError, LdmError, RequestError

#: OpenAI's client does not repeat a call whose `Retry-After` is longer.
MAX_RETRY_AFTER_SECONDS = 120


class BatchError(LdmError):
    """A batch cannot go on; the next run of the same command does, once the reason is gone."""


class ClusterError(LdmError):
    """No Ray cluster answers at an address, or none that takes this token."""


class ServeError(Exception):
    """An answer that is an error.

    Attributes:
        status: HTTP status.
        kind: `type` of the error in OpenAI's API.
        code: What it is, for programs.
        param: Name of the offending field, if one is to blame.
        retry_after: Seconds after which the call may succeed.
        should_retry: Whether OpenAI's client should repeat the call; None leaves it the choice.
    """

    def __init__(  # noqa: PLR0913  (the parts of an answer)
        self,
        status: int,
        code: str,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        retry_after: float | None = None,
        should_retry: bool | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.code, self.param = status, kind, code, param
        self.retry_after, self.should_retry = retry_after, should_retry

    def __reduce__(self) -> tuple[Callable[..., "ServeError"], tuple[int, str, str]]:
        """Return how to make it again: a pickle of an exception has its message alone."""
        made = partial(
            type(self),
            kind=self.kind,
            param=self.param,
            retry_after=self.retry_after,
            should_retry=self.should_retry,
        )
        return made, (self.status, self.code, str(self))

    def rename_field(self, names: Mapping[str, str]) -> None:
        """Give the offending field the name that it has in another interface.

        Args:
            names: The other interface's names by those of `GenerationRequest`.
        """
        if self.param is not None and (name := names.get(self.param)):
            message = str(self)
            if message.startswith(f"{self.param}:"):
                self.args = (name + message.removeprefix(self.param),)
            self.param = name

    @property
    def body(self) -> dict[str, Any]:
        """The answer, as OpenAI's API has it."""
        error = {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}

    @property
    def headers(self) -> dict[str, str]:
        """Headers that say whether and when to repeat the call."""
        headers = {}
        if self.retry_after is not None:
            seconds = min(max(1, round(self.retry_after)), MAX_RETRY_AFTER_SECONDS)
            headers["Retry-After"] = str(seconds)
        if self.should_retry is not None:
            headers["x-should-retry"] = str(self.should_retry).lower()
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return headers


def invalid(param: str | None, message: str, code: str = "invalid_value") -> ServeError:
    """Return the error of a request that can never succeed."""
    return ServeError(400, code, message, param=param)


def from_runtime(error: LdmError) -> ServeError:
    """Return the answer to a request that the runtime refuses or has given up."""
    if isinstance(error, RequestError):
        return invalid(error.field, str(error))
    if isinstance(error, DeadlineError):
        return deadline_passed(str(error))
    return failed(str(error))


def deadline_passed(message: str) -> ServeError:
    """Return the error of a request whose time is up; repeating it would take as long."""
    return ServeError(504, "deadline_exceeded", message, kind="server_error", should_retry=False)


def failed(message: str, code: str = "generation_failed") -> ServeError:
    """Return the error of a request that cannot be generated, though nothing is wrong with it."""
    return ServeError(500, code, message, kind="server_error", should_retry=False)


def cancelled() -> ServeError:
    """Return the error of a request that was cancelled while its client waited."""
    return ServeError(409, "cancelled", "the request was cancelled", should_retry=False)


def unavailable(message: str, retry_after: float = 5) -> ServeError:
    """Return the error of a server that is not ready yet, or no longer."""
    return ServeError(503, "not_ready", message, kind="server_error", retry_after=retry_after)
