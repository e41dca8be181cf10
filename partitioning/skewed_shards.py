"""The paper's skew (arXiv 2310.02842, Appendix A): a shard of every task for every client, one larger."""

import math

import numpy as np
from datasets import Dataset
from flwr_datasets.partitioner import Partitioner
from numpy.typing import NDArray


def skewed_shards(
    labels: NDArray[np.generic], num_partitions: int, skew: float, rng: np.random.Generator
) -> list[NDArray[np.int64]]:
    """Split rows so that every partition holds one shard of every label (Appendix A).

    Each label's rows are shuffled and cut into `num_partitions` shards, one of them `skew` times the size of
    each other one; the shards are then dealt to the partitions at random, anew for every label.

    Args:
        labels: Label of every row, of any sortable dtype, shape [num_rows].
        num_partitions: Number of partitions, at least 1.
        skew: Size of the large shard over that of another one, at least 1 (an even split); 15 in the paper.
        rng: Source of the shuffles and of the deal.

    Returns:
        Row indices of each partition, ascending, disjoint and together complete. A label with fewer rows
        than partitions leaves some shards empty; a partition that is dealt none but those is empty.

    Raises:
        ValueError: If `num_partitions` or `skew` is below 1, `skew` is not finite, or `labels` is not flat.
    """
    if labels.ndim != 1:
        raise ValueError(f"labels must be one label per row, but their shape is {labels.shape}; flatten them.")
    _check_shape(num_partitions, skew)
    owner_of_row = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        # The random order of the owners deals the large shard and, with it, the rows left over from rounding.
        owners = rng.permutation(num_partitions)
        owner_of_row[rows] = np.repeat(owners, _shard_sizes(len(rows), num_partitions, skew))
    rows_by_owner = np.argsort(owner_of_row, kind="stable").astype(np.int64)
    ends = np.cumsum(np.bincount(owner_of_row, minlength=num_partitions))
    return np.split(rows_by_owner, ends[:-1])


def _shard_sizes(num_rows: int, num_shards: int, skew: float) -> NDArray[np.int64]:
    """Sizes of the shards of one label, the large one first: largest-remainder rounding, exact sum."""
    weights = np.ones(num_shards)
    weights[0] = skew
    exact = num_rows * (weights / weights.sum())
    sizes: NDArray[np.int64] = np.floor(exact).astype(np.int64)
    by_remainder = np.argsort(sizes - exact, kind="stable")
    sizes[by_remainder[: num_rows - sizes.sum()]] += 1
    return sizes


def _check_shape(num_partitions: int, skew: float) -> None:
    if num_partitions < 1:
        raise ValueError(f"num_partitions is {num_partitions}, but it must be at least 1.")
    if not (math.isfinite(skew) and skew >= 1):
        raise ValueError(f"skew is {skew}, but it must be a finite number of at least 1.")


class SkewedShardsPartitioner(Partitioner):  # type: ignore[misc]  # flwr_datasets ships no types
    """Partitioner of Flower Datasets that deals one shard of every label to every partition (Appendix A).

    Of each label one shard, dealt to a random partition, is `skew` times the size of each other one.
    For the row indices of many partitions call `skewed_shards` itself: `load_partition` takes most of a
    millisecond for a partition of any size, because it builds a `Dataset`.

    Args:
        num_partitions: Number of partitions, at least 1. It may exceed the number of rows.
        partition_by: Column of the labels.
        skew: Size of the large shard over the size of another one, at least 1 (15 in the paper).
        seed: Seed of the split: same dataset and seed, same partitions.

    Raises:
        ValueError: If `num_partitions` or `skew` is below 1, or `skew` is not finite.

    Example:
        >>> partitioner = SkewedShardsPartitioner(100, partition_by="category", skew=15, seed=1)
        >>> partitioner.dataset = dataset
        >>> partition = partitioner.load_partition(0)
    """

    def __init__(self, num_partitions: int, partition_by: str, skew: float, seed: int) -> None:
        super().__init__()
        _check_shape(num_partitions, skew)
        self._num_partitions = num_partitions
        self._partition_by = partition_by
        self._skew = skew
        self._seed = seed
        self._rows_per_partition: list[NDArray[np.int64]] | None = None

    @property
    def num_partitions(self) -> int:
        """Number of partitions, empty ones included."""
        return self._num_partitions

    def load_partition(self, partition_id: int) -> Dataset:
        """Return the rows of one partition in the dataset's order, or an empty dataset where it has none.

        Raises:
            ValueError: If there is no such partition, or the dataset has no column `partition_by`.
        """
        if not 0 <= partition_id < self._num_partitions:
            raise ValueError(f"There is no partition {partition_id}; choose one from 0 to {self._num_partitions - 1}.")
        if self._rows_per_partition is None:
            rng = np.random.default_rng(self._seed)
            self._rows_per_partition = skewed_shards(self._labels(), self._num_partitions, self._skew, rng)
        return self.dataset.select(self._rows_per_partition[partition_id])

    def _labels(self) -> NDArray[np.generic]:
        if self._partition_by not in self.dataset.column_names:
            columns = ", ".join(self.dataset.column_names)
            raise ValueError(f"The dataset has no column '{self._partition_by}'; partition by one of: {columns}.")
        # The slice reads the column as one list; converting the column object itself fetches row by row.
        return np.asarray(self.dataset[self._partition_by][:])
