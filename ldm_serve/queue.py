"""The queue of the server: first come, first served within a key; keys take turns."""

from collections import OrderedDict, deque
from collections.abc import Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class FairQueue(Generic[Item]):
    """Items that wait, by the keys that brought them.

    Keys that have items take turns, so a key waits for at most one item of every other key,
    however many those have brought.
    """

    def __init__(self) -> None:
        self._items: OrderedDict[str, deque[Item]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._items.values()))

    def __iter__(self) -> Iterator[Item]:
        """Yield the items in the order in which `pop` would return them."""
        lines = [list(line) for line in self._items.values()]
        for turn in range(max(map(len, lines), default=0)):
            yield from (line[turn] for line in lines if turn < len(line))

    def count(self, key: str) -> int:
        """Return how many items of a key wait."""
        return len(self._items.get(key, ()))

    def put(self, key: str, item: Item) -> None:
        """Add an item behind those of its key; a key without any has its turn after all others."""
        self._items.setdefault(key, deque()).append(item)

    def pop(self) -> Item:
        """Remove and return the item whose turn it is.

        Raises:
            IndexError: The queue is empty.
        """
        if not self._items:
            raise IndexError("pop from an empty queue")
        key, line = self._items.popitem(last=False)
        item = line.popleft()
        if line:
            self._items[key] = line
        return item

    def remove(self, key: str, item: Item) -> bool:
        """Remove an item of a key.

        Returns:
            Whether it waited.
        """
        line = self._items.get(key, deque())
        if item not in line:
            return False
        line.remove(item)
        if not line:
            del self._items[key]
        return True
