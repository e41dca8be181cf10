"""Which rows of a shared set are kept back to be measured on, whoever is dealt them."""

from collections import Counter

import pytest

from clients.config import ClientConfig
from clients.row_owners import RowOwners

CLIENTS = range(10)


@pytest.fixture
def owners(run_config):
    """``owners(seed=1)``: of a shared set whose clients keep rows back, with all of those measured."""

    def make(**changes):
        changes = {"evaluate-on": "clients", "eval-rows": 0, **{k.replace("_", "-"): v for k, v in changes.items()}}
        return RowOwners(ClientConfig.from_run_config(run_config(changes)), "")

    return make


def measured(owners, clients=CLIENTS):
    return Counter(row.row_id for client in clients for row in owners.rows_of(client)[1])


def dealt(owners):
    return [[owners.data.train[index].row_id for index in client["rows"]] for client in owners.manifest()["clients"]]


def test_runs_of_every_seed_are_measured_on_the_same_rows(owners):
    first, second, other_draw = owners(seed=1), owners(seed=2), owners(seed=1, data_seed=1)
    assert dealt(first) != dealt(second)
    assert measured(first) == measured(second) != measured(other_draw)
    assert set(measured(first).values()) == {1}


def test_client_trains_on_all_of_its_rows_but_those_that_it_keeps_back(owners):
    seen = owners()
    for client, own in enumerate(dealt(seen)):
        train, kept_back = seen.rows_of(client)
        assert train
        assert sorted(row.row_id for row in [*train, *kept_back]) == sorted(own)


def test_as_many_rows_are_measured_as_asked_for_and_no_other_row_is_trained_on(owners):
    every, few = owners(), owners(eval_rows=7)
    assert len(measured(few)) == 7
    assert measured(few) < measured(every)
    assert [few.rows_of(client)[0] for client in CLIENTS] == [every.rows_of(client)[0] for client in CLIENTS]


def test_client_that_is_dealt_no_others_trains_on_one_of_the_rows_kept_back(owners):
    few = {"test_fraction": 0.5, "partitioner": "iid"}
    kept_back, many = set(measured(owners(**few))), owners(**few, num_clients=50)  # two rows each
    trained = [{row.row_id for row in many.rows_of(client)[0]} for client in range(50)]
    alone = [rows for rows in trained if rows & kept_back]
    assert all(trained)
    assert alone
    assert {len(rows) for rows in alone} == {1}
    assert set(measured(many, range(50))) == kept_back.difference(*alone)
