from collections import Counter

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features

from partitioning.skewed_shards import SkewedShardsPartitioner, skewed_shards


def split(labels, num_partitions, skew, seed=0):
    return skewed_shards(np.asarray(labels), num_partitions, skew, np.random.default_rng(seed))


def shard_sizes(labels, partitions, label):
    return np.array([np.sum(np.asarray(labels)[rows] == label) for rows in partitions])


@pytest.mark.parametrize(
    ("num_rows", "num_partitions", "skew", "large", "others"),
    [
        (114, 100, 15, 15, {1: 99}),  # 15 + 99 = 114
        (228, 100, 15, 30, {2: 99}),
        (12, 4, 1, 3, {3: 3}),  # an even split
        (57, 100, 15, 8, {1: 49, 0: 50}),  # exact shares 7.5 and 0.5: the large shard is rounded up first
        (50, 100, 15, 7, {1: 43, 0: 56}),  # exact shares 6.58 and 0.44
        (120, 100, 15, 16, {2: 5, 1: 94}),  # exact shares 15.79 and 1.05
        (10, 3, 2.0, 5, {3: 1, 2: 1}),  # exact shares 5, 2.5 and 2.5
        (7, 1, 15, 7, {}),
        (1, 5, 15, 1, {0: 4}),
    ],
)
def test_shards_of_one_label_have_the_hand_computed_sizes(num_rows, num_partitions, skew, large, others):
    sizes = Counter(len(rows) for rows in split(["a"] * num_rows, num_partitions, skew))
    assert sizes == Counter({large: 1}) + Counter(others)


@pytest.mark.parametrize("skew", [1.0, 15.0, 1e300])
@pytest.mark.parametrize("num_rows", [0, 7, 643])
@pytest.mark.parametrize("num_partitions", [1, 100])
def test_every_row_is_in_exactly_one_partition(num_rows, num_partitions, skew):
    labels = np.random.default_rng(5).integers(0, 7, size=num_rows)
    partitions = split(labels, num_partitions, skew)
    assert len(partitions) == num_partitions
    assert np.sort(np.concatenate(partitions)).tolist() == list(range(num_rows))


def test_every_partition_gets_one_shard_of_every_label():
    labels = ["a"] * 114 + ["b"] * 228 + ["c"] * 342
    partitions = split(labels, 100, 15)
    for label, unit in (("a", 1), ("b", 2), ("c", 3)):
        assert sorted(shard_sizes(labels, partitions, label)) == [unit] * 99 + [15 * unit]


def test_large_shard_goes_to_another_partition_for_every_label():
    labels = [f"task{i % 50}" for i in range(50 * 24)]  # 24 rows a label over 10 partitions: 15 and nine times 1
    partitions = split(labels, 10, 15)
    owners = [int(np.argmax(shard_sizes(labels, partitions, f"task{task}"))) for task in range(50)]
    assert set(owners) == set(range(10))


def test_leftover_rows_are_spread_over_random_partitions():
    labels = [f"task{i}" for i in range(200)]  # one row a label: all of it is leftover
    sizes = [len(rows) for rows in split(labels, 10, 15)]
    assert min(sizes) >= 5  # 20 expected each
    half = ["a"] * 10 + ["b"] * 10  # half a row a shard
    partitions = split(half, 20, 1)
    assert not np.array_equal(shard_sizes(half, partitions, "a"), shard_sizes(half, partitions, "b"))


def test_rows_within_a_label_are_shuffled():
    partitions = split(["a"] * 100, 2, 1)
    assert partitions[0].tolist() != list(range(50))
    assert partitions[0].tolist() != list(range(50, 100))


def test_rows_are_ascending_int64():
    partitions = split(["b", "a"] * 50, 4, 3)
    assert all(rows.dtype == np.int64 and np.all(np.diff(rows) > 0) for rows in partitions)


def test_same_seed_same_partition_and_another_seed_another():
    labels = [f"task{i % 7}" for i in range(500)]
    first, again, other = (split(labels, 20, 15, seed) for seed in (3, 3, 4))
    assert [rows.tolist() for rows in first] == [rows.tolist() for rows in again]
    assert [rows.tolist() for rows in first] != [rows.tolist() for rows in other]


@pytest.mark.parametrize("skew", [0.99, 0, -1, float("nan"), float("inf")])
def test_bad_skew_is_refused(skew):
    with pytest.raises(ValueError, match="skew is"):
        split(["a"], 2, skew)
    with pytest.raises(ValueError, match="skew is"):
        SkewedShardsPartitioner(num_partitions=2, partition_by="task", skew=skew, seed=0)


def test_bad_number_of_partitions_is_refused():
    with pytest.raises(ValueError, match="num_partitions is 0"):
        SkewedShardsPartitioner(num_partitions=0, partition_by="task", skew=15, seed=0)


def test_labels_must_be_flat():
    with pytest.raises(ValueError, match=r"\(2, 1\)"):
        split([["a"], ["b"]], 2, 1)


def partitioner_of(dataset, num_partitions=4, skew=15.0, seed=0, partition_by="task"):
    partitioner = SkewedShardsPartitioner(num_partitions, partition_by=partition_by, skew=skew, seed=seed)
    partitioner.dataset = dataset
    return partitioner


def test_partitioner_serves_a_flower_user():
    labels = ["a"] * 18 + ["b"] * 36  # 15 + 3 and 30 + 6 over 4 partitions
    dataset = Dataset.from_dict({"task": labels, "text": [f"row {i}" for i in range(54)]})
    partitioner = partitioner_of(dataset)
    assert partitioner.num_partitions == 4
    loaded = [partitioner.load_partition(partition_id) for partition_id in range(4)]
    assert all(partition.column_names == ["task", "text"] for partition in loaded)
    counts = [Counter(partition["task"][:]) for partition in loaded]
    assert sorted(count["a"] for count in counts) == [1, 1, 1, 15]
    assert sorted(count["b"] for count in counts) == [2, 2, 2, 30]
    texts = [text for partition in loaded for text in partition["text"][:]]
    assert sorted(texts) == sorted(dataset["text"][:])


def test_partitioner_takes_class_labels_and_any_order_of_calls():
    features = Features({"label": ClassLabel(names=["cat", "dog"])})
    dataset = Dataset.from_dict({"label": [0, 1] * 20}, features=features)
    forwards, backwards = (partitioner_of(dataset, partition_by="label") for _ in range(2))
    in_order = [forwards.load_partition(i)["label"][:] for i in range(4)]
    in_reverse = [backwards.load_partition(i)["label"][:] for i in reversed(range(4))]
    assert in_order == in_reverse[::-1]


def test_partitioner_loads_an_empty_partition():
    partitioner = partitioner_of(Dataset.from_dict({"task": ["a", "b"]}), num_partitions=10)
    sizes = [len(partitioner.load_partition(i)) for i in range(10)]
    assert sum(sizes) == 2
    empty = partitioner.load_partition(sizes.index(0))
    assert isinstance(empty, Dataset)
    assert empty["task"][:] == []


@pytest.mark.parametrize("partition_id", [-1, 4])
def test_partition_out_of_range_is_refused(partition_id):
    partitioner = partitioner_of(Dataset.from_dict({"task": ["a", "b"]}))
    with pytest.raises(ValueError, match=f"no partition {partition_id}; choose one from 0 to 3"):
        partitioner.load_partition(partition_id)


def test_missing_column_is_refused_by_name():
    partitioner = partitioner_of(Dataset.from_dict({"task": ["a"], "text": ["b"]}), partition_by="category")
    with pytest.raises(ValueError, match="no column 'category'; partition by one of: task, text"):
        partitioner.load_partition(0)
