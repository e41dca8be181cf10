"""Partitioners by name: the paper's skew and those of Flower Datasets, checked for lost and repeated rows."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from datasets import Dataset
from flwr_datasets.partitioner import (
    DirichletPartitioner,
    IidPartitioner,
    NaturalIdPartitioner,
    Partitioner,
    ShardPartitioner,
)

from partitioning import OWN_ROWS
from partitioning.skewed_shards import skewed_shards


@dataclass(frozen=True)
class PartitionConfig:
    """How rows are dealt to clients; each partitioner reads the values it needs, and all values are checked.

    Attributes:
        partitioner: `skewed-shards`, `iid`, `dirichlet`, `shard` or `natural-id` (each task one client); `own-rows`
            if nothing is dealt, because each client has its own.
        num_clients: Number of clients, at least 1.
        seed: Seed of the split, at least 0.
        skew: `skewed-shards`: size of a task's large shard over that of another one, at least 1 (paper: 15).
        dirichlet_alpha: `dirichlet`: concentration, above 0; small values leave a client with few tasks.
        shards_per_client: `shard`: least number of one-task blocks of each client, at least 1.

    Raises:
        ValueError: If a value is out of its range or the partitioner is unknown.
    """

    partitioner: str
    num_clients: int
    seed: int
    skew: float
    dirichlet_alpha: float
    shards_per_client: int

    def __post_init__(self) -> None:
        if self.partitioner not in (*PARTITIONERS, OWN_ROWS):
            known = ", ".join((*PARTITIONERS, OWN_ROWS))
            raise ValueError(f"Unknown partitioner '{self.partitioner}'; choose one of: {known}.")
        if self.num_clients < 1:
            raise ValueError(f"num-clients is {self.num_clients}, but it must be at least 1.")
        if not 0 <= self.seed < 2**63:  # PyTorch's generators take no more
            raise ValueError(f"seed is {self.seed}, but it must be at least 0 and below 2**63.")
        if not (math.isfinite(self.skew) and self.skew >= 1):
            raise ValueError(f"skew is {self.skew}, but it must be a finite number of at least 1.")
        if not (math.isfinite(self.dirichlet_alpha) and self.dirichlet_alpha > 0):
            raise ValueError(f"dirichlet-alpha is {self.dirichlet_alpha}, but it must be a finite number above 0.")
        if self.shards_per_client < 1:
            raise ValueError(f"shards-per-client is {self.shards_per_client}, but it must be at least 1.")


def partition_rows(labels: Sequence[str], *, config: PartitionConfig) -> list[list[int]]:
    """Deal every row to exactly one client.

    Args:
        labels: Task of every row, length [num_rows].
        config: Partitioner and its parameters.

    Returns:
        Row indices of every client, ascending; length [num_clients]. With `skewed-shards` and `dirichlet` a
        client may have none.

    Raises:
        ValueError: If there are no rows, the number of clients does not fit the rows or tasks, or the
            partitioner lost or repeated a row.
    """
    if not labels:
        raise ValueError("There are no rows to partition; check the data.")
    rows_per_client = PARTITIONERS[config.partitioner](labels, config)
    check_partition(rows_per_client, len(labels))
    return rows_per_client


def check_partition(rows_per_client: Sequence[Sequence[int]], num_rows: int) -> None:
    """Check that the rows 0 .. num_rows - 1 each belong to exactly one client.

    Raises:
        ValueError: If a row is out of range, belongs to two clients or twice to one, or belongs to none.
    """
    owners: dict[int, int] = {}
    for client, rows in enumerate(rows_per_client):
        for row in rows:
            if not 0 <= row < num_rows:
                raise ValueError(f"Client {client} has row {row}, but rows go from 0 to {num_rows - 1}.")
            if row in owners:
                raise ValueError(f"Row {row} is dealt twice: to client {owners[row]} and to client {client}.")
            owners[row] = client
    if len(owners) < num_rows:
        first = next(row for row in range(num_rows) if row not in owners)
        raise ValueError(f"{num_rows - len(owners)} of {num_rows} rows belong to no client, the first is row {first}.")


def _deal_skewed_shards(labels: Sequence[str], config: PartitionConfig) -> list[list[int]]:
    # Not through load_partition: its Dataset per client costs 8 s for 10,000 clients, this takes 0.02 s.
    rng = np.random.default_rng(config.seed)
    rows_per_client = skewed_shards(np.asarray(labels), config.num_clients, config.skew, rng)
    return [rows.tolist() for rows in rows_per_client]


def _deal_iid(labels: Sequence[str], config: PartitionConfig) -> list[list[int]]:
    _check_enough_rows(labels, config)
    return _load_rows(IidPartitioner(config.num_clients), labels, config)


def _deal_dirichlet(labels: Sequence[str], config: PartitionConfig) -> list[list[int]]:
    _check_enough_rows(labels, config)
    partitioner = DirichletPartitioner(
        config.num_clients,
        partition_by="task",
        alpha=config.dirichlet_alpha,
        min_partition_size=0,  # a client may be empty; the default redraws until each has 10 rows, or raises
        seed=config.seed,
    )
    return _load_rows(partitioner, labels, config)


def _deal_shard(labels: Sequence[str], config: PartitionConfig) -> list[list[int]]:
    _check_enough_rows(labels, config)
    # Given the number of shards it drops rows beyond the last full one; given their size it keeps all rows.
    shard_size = max(1, len(labels) // (config.num_clients * config.shards_per_client))
    partitioner = ShardPartitioner(
        config.num_clients,
        partition_by="task",
        shard_size=shard_size,
        keep_incomplete_shard=True,
        seed=config.seed,
    )
    return _load_rows(partitioner, labels, config)


def _deal_natural_id(labels: Sequence[str], config: PartitionConfig) -> list[list[int]]:
    num_tasks = len(set(labels))
    if config.num_clients != num_tasks:
        raise ValueError(
            f"natural-id makes each of the {num_tasks} tasks one client, but num-clients is "
            f"{config.num_clients}; set num-clients to {num_tasks}."
        )
    return _load_rows(NaturalIdPartitioner(partition_by="task"), labels, config)


def _check_enough_rows(labels: Sequence[str], config: PartitionConfig) -> None:
    if config.num_clients > len(labels):
        raise ValueError(
            f"{config.partitioner} needs a row per client, but there are {config.num_clients} clients and "
            f"{len(labels)} rows; lower num-clients or use skewed-shards."
        )


def _load_rows(partitioner: Partitioner, labels: Sequence[str], config: PartitionConfig) -> list[list[int]]:
    """Rows of every client of a Flower Datasets partitioner, ascending."""
    # They cut consecutive rows, IidPartitioner too, so the rows are shuffled here. The second number keeps
    # this shuffle independent of the partitioner's own draws, which start from the same seed.
    order = np.random.default_rng([config.seed, 1]).permutation(len(labels)).tolist()
    partitioner.dataset = Dataset.from_dict({"task": [labels[row] for row in order], "row": order})
    return [sorted(partitioner.load_partition(client)["row"][:]) for client in range(config.num_clients)]


PARTITIONERS: dict[str, Callable[[Sequence[str], PartitionConfig], list[list[int]]]] = {
    "skewed-shards": _deal_skewed_shards,
    "iid": _deal_iid,
    "dirichlet": _deal_dirichlet,
    "shard": _deal_shard,
    "natural-id": _deal_natural_id,
}
