import json

from partitioning.manifest import build_manifest
from partitioning.registry import PartitionConfig, partition_rows

CONFIG = PartitionConfig(
    partitioner="skewed-shards", num_clients=3, seed=4, skew=15.0, dirichlet_alpha=0.5, shards_per_client=2
)
LABELS = ["qa", "chat", "qa", "qa"]
ROWS = [[0, 1], [], [2, 3]]


def test_manifest_has_the_hand_written_content():
    assert build_manifest(ROWS, LABELS, CONFIG) == {
        "partitioner": "skewed-shards",
        "seed": 4,
        "num-clients": 3,
        "num-rows": 4,
        "tasks": ["chat", "qa"],
        "clients": [
            {"partition-id": 0, "num-rows": 2, "per-task": {"chat": 1, "qa": 1}, "rows": [0, 1]},
            {"partition-id": 1, "num-rows": 0, "per-task": {"chat": 0, "qa": 0}, "rows": []},
            {"partition-id": 2, "num-rows": 2, "per-task": {"chat": 0, "qa": 2}, "rows": [2, 3]},
        ],
    }


def test_manifest_of_a_partition_survives_json():
    labels = [f"task{i % 7}" for i in range(200)]
    manifest = build_manifest(partition_rows(labels, config=CONFIG), labels, CONFIG)
    assert json.loads(json.dumps(manifest)) == manifest
