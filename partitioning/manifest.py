"""The record of a partition: which client owns which rows, as JSON, checked again when it is read."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from partitioning.registry import PartitionConfig, check_partition


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

    Raises:
        ValueError: If the rows are not disjoint and complete, or the number of clients is not the config's.
    """
    if len(rows_per_client) != config.num_clients:
        raise ValueError(f"There are rows for {len(rows_per_client)} clients, but num-clients is {config.num_clients}.")
    check_partition(rows_per_client, len(labels))
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


def load_manifest(path: Path) -> dict[str, Any]:
    """Read a manifest and check it again: its counts agree, and its rows are disjoint and complete.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not a manifest, or its content contradicts itself.
    """
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        _check_manifest(manifest)
    except KeyError as error:
        raise ValueError(f"{path} is not a valid partition manifest: it has no {error}; make it again.") from error
    except (AttributeError, TypeError) as error:
        raise ValueError(
            f"{path} is not a valid partition manifest: a value has the wrong type; make it again."
        ) from error
    except ValueError as error:
        reason = str(error).rstrip(".")
        raise ValueError(f"{path} is not a valid partition manifest: {reason}; make it again.") from error
    return manifest


def _check_manifest(manifest: dict[str, Any]) -> None:
    clients, num_clients, num_rows = manifest["clients"], manifest["num-clients"], manifest["num-rows"]
    if not isinstance(manifest["partitioner"], str) or type(manifest["seed"]) is not int:
        raise ValueError("the partitioner is not a name or the seed is not an integer")
    if type(num_rows) is not int or len(clients) != num_clients:
        raise ValueError(f"it lists {len(clients)} clients and says {num_clients}, with {num_rows} rows")
    for partition_id, client in enumerate(clients):
        if client["partition-id"] != partition_id:
            raise ValueError(f"client {partition_id} has the partition-id {client['partition-id']}")
        if any(type(row) is not int for row in client["rows"]):
            raise ValueError(f"client {partition_id} has a row that is not an integer")
        if not len(client["rows"]) == client["num-rows"] == sum(client["per-task"].values()):
            raise ValueError(f"the row counts of client {partition_id} differ from its list of rows")
        if sorted(client["per-task"]) != manifest["tasks"]:
            raise ValueError(f"client {partition_id} does not count every task")
    check_partition([client["rows"] for client in clients], num_rows)
