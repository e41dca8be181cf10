"""The record of a partition: which client owns which rows, in JSON's types."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from partitioning.registry import PartitionConfig


def build_manifest(
    rows_per_client: Sequence[Sequence[int]], labels: Sequence[str], config: PartitionConfig
) -> dict[str, Any]:
    """Describe a partition in JSON's types.

    Args:
        rows_per_client: Row indices of every client, length [num_clients].
        labels: Task of every row, length [num_rows].
        config: How the rows were dealt.

    Returns:
        `partitioner`, `seed`, `num-clients`, `num-rows`, `tasks` (sorted names) and `clients`: for each
        one its `partition-id`, `num-rows`, `per-task` (rows of every task, zeros included) and `rows`.
    """
    tasks = sorted(set(labels))
    return {
        "partitioner": config.partitioner,
        "seed": config.seed,
        "num-clients": config.num_clients,
        "num-rows": len(labels),
        "tasks": tasks,
        "clients": [
            _client_entry(partition_id, rows, labels, tasks) for partition_id, rows in enumerate(rows_per_client)
        ],
    }


def _client_entry(
    partition_id: int, rows: Sequence[int], labels: Sequence[str], tasks: Sequence[str]
) -> dict[str, Any]:
    per_task = Counter(labels[row] for row in rows)
    return {
        "partition-id": partition_id,
        "num-rows": len(rows),
        "per-task": {task: per_task[task] for task in tasks},
        "rows": [int(row) for row in rows],
    }
