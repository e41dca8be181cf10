"""A Ray cluster of several machines, here several nodes on one: a trainer on each, with the answers of a single one."""

import json

import numpy as np
import pytest
import ray
from ray.cluster_utils import Cluster

from clients.resident import _ray_trainers, connect
from clients.trainer import Trainer
from mops_fl.adapter_folder import load_adapter
from mops_fl.payload import Cohort, TrainRequest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


@pytest.fixture
def cluster(monkeypatch):
    """A node of one core, to which others can be added."""
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "0")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    yield cluster
    _ray_trainers.cache_clear()
    ray.shutdown()
    cluster.shutdown()


def node_of(actor):
    return ray.get(actor.__ray_call__.remote(lambda _: ray.get_runtime_context().get_node_id()))


def test_cohorts_are_spread_over_the_machines_and_one_that_is_lost_is_replaced(cluster, run_config):
    second = cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    trainers, alone = connect(run_config()), Trainer(run_config())
    start = trainers.prepare()
    members = [(0, 3), (1, 4), (2,)]
    requests = [
        TrainRequest(1, Cohort(clients, number, len(members)), start.adapter, start.frozen)
        for number, clients in enumerate(members)
    ]

    def answers(trainer):
        return [trainer.train(client, request) for request in requests for client in request.cohort.members]

    spread, expected = answers(trainers), answers(alone)
    for found, single in zip(spread, expected, strict=True):
        for name, array in single.adapter.items():  # computed on another number of cores
            np.testing.assert_allclose(found.adapter[name], array, rtol=0, atol=1e-5, err_msg=name)
    assert [node_of(actor) for actor in trainers._actors].count(second.node_id) == 1
    assert len({node_of(actor) for actor in trainers._actors}) == len(trainers._actors) == 2
    cluster.remove_node(second)
    for again, found in zip(answers(trainers), spread, strict=True):
        assert all((again.adapter[name] == found.adapter[name]).all() for name in found.adapter)
    assert second.node_id not in {node_of(actor) for actor in trainers._actors}


def test_simulation_joins_a_cluster_that_is_running(cluster, simulate, environment, tmp_path):
    cluster.add_node(num_cpus=1)
    environment["RAY_ADDRESS"] = cluster.address
    adapters = []
    for backend in ("ray", "inline"):
        process = simulate("--backend", backend, output_dir=str(tmp_path / backend))
        output, errors = process.communicate()
        assert process.returncode == 0, output + errors
        assert json.loads((tmp_path / backend / "summary.json").read_text(encoding="utf-8"))["status"] == "complete"
        adapters.append(load_adapter(tmp_path / backend / "adapter").arrays)
    on_cluster, inline = adapters
    for name, array in inline.items():
        np.testing.assert_allclose(on_cluster[name], array, rtol=0, atol=1e-4, err_msg=name)
    ray.init(address=cluster.address, log_to_driver=False)
    assert ray.cluster_resources()["CPU"] == 2  # the cluster outlives the run
