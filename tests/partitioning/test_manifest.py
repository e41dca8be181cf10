import json

import pytest

from partitioning.manifest import build_manifest, load_manifest
from partitioning.registry import PartitionConfig, partition_rows

CONFIG = PartitionConfig(
    partitioner="skewed-shards", num_clients=3, seed=4, skew=15.0, dirichlet_alpha=0.5, shards_per_client=2
)
LABELS = ["qa", "chat", "qa", "qa"]
ROWS = [[0, 1], [], [2, 3]]


def write(path, manifest):
    path.write_text(json.dumps(manifest), encoding="utf-8")
    return path


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


def test_manifest_survives_the_file(tmp_path):
    labels = [f"task{i % 7}" for i in range(200)]
    manifest = build_manifest(partition_rows(labels, config=CONFIG), labels, CONFIG)
    assert load_manifest(write(tmp_path / "partition.json", manifest)) == manifest


def test_build_refuses_a_lost_row_and_a_wrong_number_of_clients():
    with pytest.raises(ValueError, match="1 of 4 rows belong to no client, the first is row 3"):
        build_manifest([[0, 1], [], [2]], LABELS, CONFIG)
    with pytest.raises(ValueError, match="rows for 1 clients, but num-clients is 3"):
        build_manifest([[0, 1, 2, 3]], LABELS, CONFIG)


def set_rows(client, rows, per_task):
    def edit(manifest):
        manifest["clients"][client].update({"rows": rows, "num-rows": len(rows), "per-task": per_task})

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (set_rows(2, [2, 1], {"chat": 0, "qa": 2}), "Row 1 is dealt twice"),
        (set_rows(2, [2], {"chat": 0, "qa": 1}), "1 of 4 rows belong to no client"),
        (set_rows(2, [2, 9], {"chat": 0, "qa": 2}), "Client 2 has row 9"),
        (set_rows(2, [2, "3"], {"chat": 0, "qa": 2}), "client 2 has a row that is not an integer"),
        (set_rows(2, [2, 3], {"chat": 0, "qa": 1}), "row counts of client 2"),
        (set_rows(2, [2, 3], {"qa": 2}), "client 2 does not count every task"),
        (lambda manifest: manifest["clients"].pop(), "lists 2 clients and says 3"),
        (lambda manifest: manifest["clients"].reverse(), "client 0 has the partition-id 2"),
        (lambda manifest: manifest.pop("tasks"), "it has no 'tasks'"),
        (lambda manifest: manifest["clients"][0].pop("rows"), "it has no 'rows'"),
        (lambda manifest: manifest.update({"clients": None}), "not a valid partition manifest"),
        (lambda manifest: manifest.update({"clients": [1, 2, 3]}), "not a valid partition manifest"),
        (lambda manifest: manifest.update({"seed": "4"}), "seed is not an integer"),
        (lambda manifest: manifest.update({"num-rows": None}), "not a valid partition manifest"),
        (
            lambda manifest: manifest["clients"][0].update({"per-task": [1, 1]}),
            "not a valid partition manifest",
        ),
    ],
)
def test_load_refuses_a_corrupt_manifest(tmp_path, edit, message):
    manifest = build_manifest(ROWS, LABELS, CONFIG)
    edit(manifest)
    path = write(tmp_path / "partition.json", manifest)
    with pytest.raises(ValueError, match=message) as caught:
        load_manifest(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b'{"clients": [', b"[]", b"7", b"\xff\xfe"])
def test_load_refuses_what_is_no_manifest(tmp_path, content):
    path = tmp_path / "partition.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not a valid partition manifest"):
        load_manifest(path)
