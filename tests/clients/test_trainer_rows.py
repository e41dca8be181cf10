"""Which rows a trainer trains, pretrains and measures on, and what makes a request another one."""

import json

import numpy as np
import pytest

from clients import trainer as module
from clients.config import ClientConfig
from clients.row_owners import RowOwners
from clients.trainer import Trainer
from mops_fl.config import DataConfig, read_section
from mops_fl.data import load_task_data
from mops_fl.payload import Cohort, TrainRequest
from mops_fl.sources import sample_path


def test_each_client_trains_on_its_own_rows_in_an_order_of_its_own(run_config, monkeypatch):
    values, seen, train_cohort = run_config({"seed": 4}), [], module.train_cohort
    trainer, train = Trainer(values), train_cohort
    monkeypatch.setattr(module, "train_cohort", lambda *given: seen.extend(given[2]) or train(*given))
    start = trainer.prepare()
    trainer.train(3, TrainRequest(5, Cohort((0, 3), 0, 1), start.adapter, start.frozen))
    trainer.train_server(5, start.adapter, start.frozen)
    data = load_task_data(read_section(DataConfig, values))
    dealt = trainer.setting().manifest["clients"]
    expected = [[data.train[index].row_id for index in dealt[client]["rows"]] for client in (0, 3)]
    expected.append([row.row_id for row in data.server])
    assert [[row.row_id for row in client.rows] for client in seen] == expected
    assert [client.seed for client in seen] == [(4, 5, 0), (4, 5, 3), (4, 5, 10)]


@pytest.mark.parametrize("part", ["adapter", "frozen"])
def test_other_arrays_make_another_request(run_config, part):
    trainer = Trainer(run_config())
    start = trainer.prepare()
    parts = {"adapter": start.adapter, "frozen": start.frozen}
    other = {**parts, part: {name: array + np.float32(0.5) for name, array in parts[part].items()}}
    answers = [trainer.train(0, TrainRequest(1, Cohort((0,), 0, 1), **arrays)).adapter for arrays in (parts, other)]
    assert any((answers[0][name] != answers[1][name]).any() for name in start.adapter)


@pytest.mark.parametrize("part", ["train", "test", "server"])
def test_pretraining_sees_the_servers_rows_and_no_others(run_config, tmp_path, part):
    lines = [json.loads(line) for line in sample_path().read_text(encoding="utf-8").splitlines()]
    data = load_task_data(read_section(DataConfig, run_config()))

    def start(changed):
        path = tmp_path / f"{len(changed)}.jsonl"
        edited = [{**line, "instruction": "Changed."} if i in changed else line for i, line in enumerate(lines)]
        path.write_text("".join(json.dumps(line) + "\n" for line in edited), encoding="utf-8")
        found = Trainer(run_config({"data-path": str(path)})).prepare()
        return {name: array.tobytes() for name, array in {**found.adapter, **found.frozen}.items()}

    rows = {row.row_id for row in getattr(data, part)}
    assert (start(rows) == start(set())) == (part != "server")


def test_row_of_exactly_the_window_is_taken(run_config):
    Trainer(run_config({"max-length": 498})).setting()


def test_rows_that_clients_measure_on_are_among_those_measured_on(run_config):
    owners = RowOwners(ClientConfig.from_run_config(run_config({"evaluate-on": "clients", "eval-rows": 0})), "")
    assert {row for client in range(10) for row in owners.rows_of(client)[1]} <= set(owners.measured_rows)
