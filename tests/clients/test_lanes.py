import threading

import pytest
import torch

from clients.lanes import Lanes


@pytest.fixture
def shares(monkeypatch):
    """Thread -> cores it was told to compute on, last."""
    told = {}
    monkeypatch.setattr(torch, "set_num_threads", lambda count: told.update({threading.get_ident(): count}))
    return told


def test_map_answers_in_order_and_runs_on_all_lanes_at_once():
    barrier = threading.Barrier(3, timeout=10)  # breaks unless three tasks wait at the same time

    def task(item):
        barrier.wait()
        return item * item

    assert list(Lanes(3, 3).map(task, range(6))) == [0, 1, 4, 9, 16, 25]


def test_map_raises_what_a_task_raised():
    with pytest.raises(ZeroDivisionError):
        list(Lanes(2, 2).map(lambda item: 1 // item, [1, 0]))


@pytest.mark.parametrize(
    ("count", "num_cores", "beside", "share"),
    [(2, 2, 1, 2), (2, 2, 2, 1), (2, 2, 5, 1), (8, 8, 3, 2), (8, 8, 1, 8), (8, 8, 100, 1), (1, 16, 4, 16)],
)
def test_task_gets_its_share_of_the_cores(shares, count, num_cores, beside, share):
    lanes = Lanes(count, num_cores)
    mine = lanes.submit(lambda: shares[threading.get_ident()], beside=beside)
    assert mine.result() == share


def test_share_is_the_same_for_every_item_of_a_map(shares):
    assert set(Lanes(4, 8).map(lambda _: shares[threading.get_ident()], range(9))) == {2}


@pytest.mark.parametrize(("gpu", "count"), [(True, 1), (False, 3)])
def test_machine_has_a_lane_per_core_and_a_gpu_is_one(monkeypatch, gpu, count):
    monkeypatch.setattr("psutil.cpu_count", lambda logical: 3)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(6)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert Lanes.of_this_machine().count == count


def test_items_that_wait_are_not_computed_once_one_has_raised():
    begun, gate = [], threading.Event()

    def task(item):
        begun.append(item)
        if item == 0:
            raise ZeroDivisionError
        gate.wait(10)

    with pytest.raises(ZeroDivisionError):
        list(Lanes(2, 2).map(task, range(100)))
    gate.set()
    assert len(begun) <= 3  # the one that raised, and what the two lanes were at
