"""Where the trainer is found."""

import json
import threading
from types import SimpleNamespace

import pytest

from clients import resident
from mops_fl.errors import InputError
from mops_fl.payload import Cohort, TrainRequest


def test_callers_at_once_share_one_trainer(run_config):
    settings, found, barrier = json.dumps([run_config(), ""]), [], threading.Barrier(8)

    def ask():
        barrier.wait()
        found.append(resident._local_trainer(settings))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert len(found) == 8
    assert len({id(trainer) for trainer in found}) == 1


class FakeActor:
    """Calls come back at once, with what is said to be on that machine."""

    def __init__(self, **facts):
        self.call = SimpleNamespace(remote=lambda method, *args: SimpleNamespace(**facts))


@pytest.mark.parametrize(
    ("there", "complaint"),
    [
        ({"data_sha256": "rows", "backbone_sha256": "weights"}, None),
        ({"data_sha256": "sample", "backbone_sha256": "weights"}, "have other rows under"),
        ({"data_sha256": "sample", "backbone_sha256": "pruned"}, "have other rows and other weights under"),
    ],
)
def test_machines_of_a_cluster_must_have_the_same_rows_and_weights(monkeypatch, there, complaint):
    monkeypatch.setattr("ray.get", lambda call: call)
    trainers = object.__new__(resident._RayTrainers)
    here = {"data_sha256": "rows", "backbone_sha256": "weights"}
    trainers._actors = [FakeActor(**here), FakeActor(**here), FakeActor(**there)]
    trainers._addresses = ["10.0.0.1", "10.0.0.2", "10.0.0.3"]
    if complaint is None:
        assert vars(trainers.setting()) == here
        return
    with pytest.raises(InputError, match=f"The machines 10.0.0.1 and 10.0.0.3 of the Ray cluster {complaint}"):
        trainers.setting()


def test_cohorts_are_dealt_to_the_actors_in_turn_and_each_knows_how_many_are_beside_it(monkeypatch):
    monkeypatch.setattr("ray.get", lambda call: call)
    trainers = object.__new__(resident._RayTrainers)
    trainers._actors = [
        SimpleNamespace(call=SimpleNamespace(remote=lambda method, _, asked, name=name: (name, asked.cohort.count)))
        for name in ("first", "second")
    ]
    requests = [TrainRequest(1, Cohort((number,), number, 5), {}, {}) for number in range(5)]
    dealt = [trainers.train(0, request) for request in requests]
    assert dealt == [("first", 3), ("second", 2), ("first", 3), ("second", 2), ("first", 3)]
