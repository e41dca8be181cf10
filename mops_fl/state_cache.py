"""A cache of frozen hidden states, bounded in bytes, least recently used out first."""

from collections import OrderedDict
from typing import Generic, TypeVar

Value = TypeVar("Value")


class StateCache(Generic[Value]):
    """Keeps what the frozen layers computed for a row, up to `capacity_bytes`.

    Attributes:
        hits: look-ups that found their row.
        misses: look-ups that did not.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity_bytes = capacity_bytes
        self._entries: OrderedDict[int, tuple[Value, int]] = OrderedDict()
        self._size_bytes = 0
        self.hits = 0
        self.misses = 0

    def get(self, row_id: int) -> Value | None:
        """The value of a row, None if it is not there."""
        entry = self._entries.get(row_id)
        if entry is None:
            self.misses += 1
            return None
        self.hits += 1
        self._entries.move_to_end(row_id)
        return entry[0]

    def put(self, row_id: int, value: Value, num_bytes: int) -> None:
        """Keep a value; drops the rows unused for longest until the bound holds."""
        _, replaced_bytes = self._entries.pop(row_id, (None, 0))
        self._entries[row_id] = (value, num_bytes)
        self._size_bytes += num_bytes - replaced_bytes
        while self._size_bytes > self._capacity_bytes and self._entries:
            _, (_, dropped_bytes) = self._entries.popitem(last=False)
            self._size_bytes -= dropped_bytes

    def __len__(self) -> int:
        return len(self._entries)
