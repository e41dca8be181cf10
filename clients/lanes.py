"""Work side by side on one machine, each piece on its share of the cores.

Two matrix products, each on a core of its own, are done sooner than one after the other on both cores: the threads of
one product wait for each other at its end, and again after every small operation between two products. A GPU is one
lane, which a single batch fills.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import psutil
import torch

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class Lanes:
    """A thread per lane; tasks wait in the order they came.

    Attributes:
        count: lanes.
    """

    def __init__(self, count: int, num_cores: int) -> None:
        """Start `count` lanes that share `num_cores` cores."""
        self.count = count
        self._num_cores = num_cores
        self._pool = ThreadPoolExecutor(count)

    @classmethod
    def of_this_machine(cls) -> "Lanes":
        """One lane for each physical core, or a single one where there is a GPU."""
        num_cores = min(psutil.cpu_count(logical=False) or 1, len(os.sched_getaffinity(0)))
        return cls(1 if torch.cuda.is_available() else num_cores, num_cores)

    def submit(self, task: Callable[[], Answer], *, beside: int) -> "Future[Answer]":
        """Run a task that is one of `beside` at once."""

        def run() -> Answer:
            self.take_share(beside)
            return task()

        return self._pool.submit(run)

    def map(self, task: Callable[[Item], Answer], items: Iterable[Item], /) -> Iterator[Answer]:
        """Like the built-in `map`, all lanes at once; not to be called from a lane.

        Each item is computed on as many cores whatever runs beside it, so that its answer is the same to the bit. Where
        one raises, or an interrupt does, those that still wait are not computed any more.
        """
        futures = [self.submit(lambda item=item: task(item), beside=self.count) for item in items]  # type: ignore[misc]

        def answers() -> Iterator[Answer]:
            try:
                for future in futures:
                    yield future.result()
            finally:
                for future in futures:
                    future.cancel()

        return answers()

    def take_share(self, beside: int) -> None:
        """Let the calling thread compute on one of `beside` equal shares of the cores, at least on one core."""
        torch.set_num_threads(max(1, self._num_cores // min(beside, self.count)))
