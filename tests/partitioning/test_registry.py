from collections import Counter
from dataclasses import replace

import pytest
from datasets import Dataset

from partitioning import registry
from partitioning.registry import PARTITIONERS, PartitionConfig, check_partition, partition_rows
from partitioning.skewed_shards import SkewedShardsPartitioner

TASKS = [f"task{i}" for i in range(7)]
CONFIG = PartitionConfig(
    partitioner="skewed-shards", num_clients=7, seed=0, skew=15.0, dirichlet_alpha=0.5, shards_per_client=2
)


def labels_of(num_rows):
    """Seven tasks of unequal size, sorted by task: what a partitioner that forgets to shuffle gets wrong."""
    return sorted(TASKS[min(i % 10, 6)] for i in range(num_rows))


@pytest.mark.parametrize("num_rows", [10, 643])
@pytest.mark.parametrize("name", PARTITIONERS)
def test_partition_is_disjoint_and_complete(name, num_rows):
    labels = labels_of(num_rows)
    rows_per_client = partition_rows(labels, config=replace(CONFIG, partitioner=name))
    assert len(rows_per_client) == 7
    assert sorted(row for rows in rows_per_client for row in rows) == list(range(num_rows))
    assert all(type(row) is int for rows in rows_per_client for row in rows)
    assert all(rows == sorted(rows) for rows in rows_per_client)


@pytest.mark.parametrize("num_clients", [1, 100])
@pytest.mark.parametrize("name", ["skewed-shards", "iid", "dirichlet", "shard"])
def test_any_number_of_clients_up_to_one_per_row(name, num_clients):
    config = replace(CONFIG, partitioner=name, num_clients=num_clients, shards_per_client=3)
    rows_per_client = partition_rows(labels_of(100), config=config)  # checks completeness itself
    assert len(rows_per_client) == num_clients


@pytest.mark.parametrize("name", ["skewed-shards", "iid", "dirichlet", "shard"])
def test_same_seed_same_partition_and_another_seed_another(name):
    labels = labels_of(300)
    config = replace(CONFIG, partitioner=name)
    first = partition_rows(labels, config=config)
    assert partition_rows(labels, config=config) == first
    assert partition_rows(labels, config=replace(config, seed=1)) != first


@pytest.mark.parametrize("name", ["skewed-shards", "dirichlet", "shard"])
def test_seed_changes_who_gets_how_many_of_which_task(name):
    labels = labels_of(300)
    config = replace(CONFIG, partitioner=name)
    counts = [
        [Counter(labels[row] for row in rows) for rows in partition_rows(labels, config=replace(config, seed=seed))]
        for seed in (0, 1)
    ]
    assert counts[0] != counts[1]


def test_skewed_shards_is_what_the_flower_partitioner_gives():
    labels = labels_of(300)
    partitioner = SkewedShardsPartitioner(num_partitions=7, partition_by="task", skew=15.0, seed=3)
    partitioner.dataset = Dataset.from_dict({"task": labels, "row": list(range(300))})
    loaded = [partitioner.load_partition(client)["row"][:] for client in range(7)]
    assert partition_rows(labels, config=replace(CONFIG, seed=3)) == loaded


def test_skewed_shards_allows_many_more_clients_than_rows():
    rows_per_client = partition_rows(labels_of(50), config=replace(CONFIG, num_clients=10_000))
    assert len(rows_per_client) == 10_000
    assert sum(not rows for rows in rows_per_client) >= 9_950


def test_dirichlet_allows_clients_without_rows():
    config = replace(CONFIG, partitioner="dirichlet", num_clients=50, dirichlet_alpha=0.01)
    assert [] in partition_rows(labels_of(100), config=config)


def test_iid_mixes_tasks_that_come_sorted():
    labels = labels_of(1000)
    rows_per_client = partition_rows(labels, config=replace(CONFIG, partitioner="iid", num_clients=5))
    assert [len(rows) for rows in rows_per_client] == [200] * 5
    for rows in rows_per_client:
        assert {labels[row] for row in rows} == set(TASKS)


def test_shard_gives_every_client_its_number_of_one_task_blocks():
    labels = [TASKS[i % 2] for i in range(80)]  # 40 rows a task, 20 shards of 4 rows, none across two tasks
    config = replace(CONFIG, partitioner="shard", num_clients=10, shards_per_client=2)
    for rows in partition_rows(labels, config=config):
        assert len(rows) == 8
        assert all(count % 4 == 0 for count in Counter(labels[row] for row in rows).values())


def test_natural_id_makes_each_task_one_client_in_sorted_order():
    labels = ["b", "a", "c", "a"]
    config = replace(CONFIG, partitioner="natural-id", num_clients=3)
    assert partition_rows(labels, config=config) == [[1, 3], [0], [2]]


def test_natural_id_needs_as_many_clients_as_tasks():
    with pytest.raises(ValueError, match="each of the 2 tasks one client, but num-clients is 7; set num-clients to 2"):
        partition_rows(["a", "b", "a"], config=replace(CONFIG, partitioner="natural-id"))


@pytest.mark.parametrize("name", ["iid", "dirichlet", "shard"])
def test_too_few_rows_are_refused_where_every_client_needs_one(name):
    with pytest.raises(ValueError, match=f"{name} needs a row per client, but there are 7 clients and 6 rows"):
        partition_rows(labels_of(6), config=replace(CONFIG, partitioner=name))


def test_no_rows_are_refused():
    with pytest.raises(ValueError, match="no rows"):
        partition_rows([], config=CONFIG)


@pytest.mark.parametrize(
    ("rows_per_client", "message"),
    [
        ([[0, 1], [2, 1], [3]], "Row 1 is dealt twice: to client 0 and to client 1"),
        ([[0, 0], [1, 2, 3]], "Row 0 is dealt twice: to client 0 and to client 0"),
        ([[0], [], [3]], "2 of 4 rows belong to no client, the first is row 1"),
        ([[0, 1, 2, 3, 4]], "Client 0 has row 4, but rows go from 0 to 3"),
        ([[0, 1], [2, -1]], "Client 1 has row -1"),
        ([], "4 of 4 rows belong to no client"),
    ],
)
def test_check_names_what_is_wrong(rows_per_client, message):
    with pytest.raises(ValueError, match=message):
        check_partition(rows_per_client, 4)


def test_check_accepts_a_partition_with_an_empty_client():
    check_partition([[3, 0], [], [1, 2]], 4)


def test_a_partitioner_that_loses_rows_is_caught(monkeypatch):
    monkeypatch.setitem(registry.PARTITIONERS, "iid", lambda labels, config: [list(range(1, len(labels)))])
    with pytest.raises(ValueError, match="1 of 9 rows belong to no client, the first is row 0"):
        partition_rows(labels_of(9), config=replace(CONFIG, partitioner="iid"))


def test_unknown_partitioner_lists_the_known_ones():
    known = "skewed-shards, iid, dirichlet, shard, natural-id"
    with pytest.raises(ValueError, match=f"Unknown partitioner 'idd'; choose one of: {known}"):
        replace(CONFIG, partitioner="idd")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_clients", 0, "num-clients is 0"),
        ("seed", -1, "seed is -1"),
        ("skew", 0.5, "skew is 0.5"),
        ("skew", float("nan"), "skew is nan"),
        ("dirichlet_alpha", 0.0, "dirichlet-alpha is 0.0"),
        ("dirichlet_alpha", float("inf"), "dirichlet-alpha is inf"),
        ("shards_per_client", 0, "shards-per-client is 0"),
    ],
)
def test_bad_values_are_refused_by_name(field, value, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **{field: value})
