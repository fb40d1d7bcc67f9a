"""The last compiled models of a network, made when they are first needed."""

from collections import OrderedDict
from collections.abc import Callable
from threading import Lock
from typing import Generic, TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")


class Latest(Generic[Key, Value]):
    """The values that were used last, made when they are first needed.

    Args:
        make: Makes the value of a key.
        count: How many are kept.
    """

    def __init__(self, make: Callable[[Key], Value], count: int) -> None:
        self._make, self._count = make, count
        self._values: OrderedDict[Key, Value] = OrderedDict()
        self._lock = Lock()

    def __getitem__(self, key: Key) -> Value:
        with self._lock:
            if key not in self._values:
                while len(self._values) >= self._count:  # before, so that both never coexist
                    self._values.popitem(last=False)
                self._values[key] = self._make(key)
            self._values.move_to_end(key)
            return self._values[key]
