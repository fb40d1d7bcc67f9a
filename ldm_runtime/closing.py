"""The base of every resource that a `with` block closes."""

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Never, Self


class Closing(ABC):
    """A resource that is ready once constructed, and closed by `with` or by `close`."""

    @abstractmethod
    def close(self) -> None:
        """Free everything. Closing twice is harmless."""

    def __reduce__(self) -> Never:
        """Refuse to be pickled or copied.

        Raises:
            TypeError: Always.
        """
        raise TypeError(
            f"a {type(self).__name__} cannot be pickled or copied; open one in every process, and "
            "share it between threads"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
