"""What the frozen layers made of each row, kept in memory and then in a memory-mapped file.

Nothing is ever dropped to make room. Clients are sampled at random, so a row that is here is as likely to be wanted
again as one that is not; and the test rows, which come in the same order each time, would drive each other out.
"""

import logging
import os
import tempfile
import threading
from dataclasses import dataclass

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

SEGMENT_BYTES = 256 << 20


@dataclass(frozen=True)
class RowStates:
    """What the frozen lower layers make of one row.

    Attributes:
        tokens: `(n, D)` input of layer `m` at the row's tokens, in the backbone's dtype.
        pooled: `(D,)` float32 input of the gate.
    """

    tokens: Tensor
    pooled: Tensor

    @property
    def num_bytes(self) -> int:
        """Memory it takes."""
        return self.tokens.nbytes + self.pooled.nbytes


class StateCache:
    """Row id -> `RowStates`, safe to use from many threads."""

    def __init__(self, memory_bytes: int, file_bytes: int = 0) -> None:
        """An empty cache.

        Args:
            memory_bytes: most bytes kept where the rows were computed (on a GPU: in its memory).
            file_bytes: most bytes of tokens kept in a file beyond that; its blocks are claimed as they are needed.
        """
        self._lock = threading.Lock()
        self._memory: dict[int, RowStates] = {}
        self._in_file: dict[int, RowStates] = {}
        self._memory_left = memory_bytes
        self._file_left = file_bytes
        self._segment = torch.empty(0, dtype=torch.uint8)  # the part of the mapped file that is still free

    def get(self, row_id: int) -> RowStates | None:
        """The states of a row on the device they were computed on, None if they are not here."""
        with self._lock:
            mapped = self._in_file.get(row_id)
            if mapped is None:
                return self._memory.get(row_id)
        return RowStates(mapped.tokens.to(mapped.pooled.device), mapped.pooled)

    def put(self, row_id: int, states: RowStates) -> None:
        """Keep the states of a row if there is room for them."""
        with self._lock:
            if row_id in self._memory or row_id in self._in_file:
                return
            if states.num_bytes <= self._memory_left:
                self._memory_left -= states.num_bytes
                self._memory[row_id] = states
            elif (mapped := self._claim(states.tokens.nbytes)) is not None:
                tokens = mapped.view(states.tokens.dtype).view(states.tokens.shape)
                self._in_file[row_id] = RowStates(tokens.copy_(states.tokens), states.pooled)

    def _claim(self, num_bytes: int) -> Tensor | None:
        """Bytes of the mapped file, aligned for any dtype; None if there are no more."""
        padded = -num_bytes % 64 + num_bytes
        if padded > len(self._segment):
            size = min(self._file_left, SEGMENT_BYTES)
            if padded > size:
                return None
            try:
                self._segment = _map_unnamed_file(size)
            except OSError as error:
                logger.warning("no more frozen states are kept: %s", error)
                self._file_left = 0
                return None
            self._file_left -= size
        claimed, self._segment = self._segment[:num_bytes], self._segment[padded:]
        return claimed


def _map_unnamed_file(num_bytes: int) -> Tensor:
    """A new file's bytes as a tensor `(num_bytes,)`; the file is gone with it.

    Raises:
        OSError: the disk is full. Its blocks are claimed here, since a write into a mapping could not say so.
    """
    with tempfile.NamedTemporaryFile(prefix="mops-states-") as file:
        os.posix_fallocate(file.fileno(), 0, num_bytes)
        return torch.from_file(file.name, shared=True, size=num_bytes, dtype=torch.uint8)
