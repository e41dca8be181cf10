"""Whole runs with clients that are broken, hostile, late or of another data set."""

import re
import threading

import numpy as np
import pytest

from clients import client_app, trainer
from experiments.measurements import series
from experiments.run_folder import RunFolder
from mops_fl.adapter_folder import load_adapter
from mops_fl.payload import ARRAYS, METRICS, from_record, to_record
from mops_fl.sources import sample_path

pytestmark = pytest.mark.usefixtures("command_in_process")


@pytest.fixture
def tamper(monkeypatch):
    """``tamper(change)``: ``change(reply, client)`` is done to every reply before it is sent."""

    def install(change):
        encode = client_app.encode_result
        train = trainer.Trainer.train
        client = threading.local()

        def remember(self, partition_id, request):
            client.partition_id, client.request = partition_id, request
            return train(self, partition_id, request)

        def encoded(result):
            content = encode(result)
            change(content, client.partition_id, client.request)
            return content

        monkeypatch.setattr(trainer.Trainer, "train", remember)
        monkeypatch.setattr(client_app, "encode_result", encoded)

    return install


def scaled(content, factor):
    arrays = from_record(content[ARRAYS])
    content[ARRAYS] = to_record({name: np.float32(factor) * array for name, array in arrays.items()})


BROKEN = {
    "not finite": lambda content: content[ARRAYS].update(to_record({"gate.b2": np.full(7, np.nan, np.float32)})),
    "shape": lambda content: content[ARRAYS].update(to_record({"gate.b2": np.zeros(8, np.float32)})),
    "dtype": lambda content: content[ARRAYS].update(to_record({"gate.b2": np.zeros(7)})),
    "missing array": lambda content: content[ARRAYS].pop("gate.b2"),
    "extra array": lambda content: content[ARRAYS].update(to_record({"more": np.zeros(7, np.float32)})),
    "no rows": lambda content: content[METRICS].update({"num-examples": 0}),
    "negative steps": lambda content: content[METRICS].update({"num-steps": -2}),
    "rows it does not have": lambda content: content[METRICS].update({"num-examples": 10**12}),
    "1000 times as long": lambda content: scaled(content, 1e5),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_update_is_refused_counted_and_named_and_the_others_are_averaged(simulate, tamper, tmp_path, fault):
    broken = []  # in each round one

    def change(content, client, request):
        if client == min(request.cohort.members):
            broken.append(client)
            BROKEN[fault](content)

    tamper(change)
    code, output, errors = simulate(cohort_size=10, clients_per_round=6)
    assert (code, errors) == (0, "")
    run = RunFolder.open(tmp_path / "run")
    assert run.summary["failures"] == 2
    assert set(run.summary["failures_by_client"]) == {str(client) for client in broken}
    assert [point.value for point in series(run.metrics(), "failures", split="train")] == [1, 1]
    named = re.findall(r"Client (\d+) \(node (\d+)\): (refused: |as above)", output)
    assert [(int(client), int(node)) for client, node, _ in named] == [(client, client + 1) for client in broken]
    assert named[0][2] == "refused: "  # a reason that came before is not written out again
    assert run.summary["client_steps"] == 2 * 5 * 2  # rounds, usable replies, local steps
    assert all(np.abs(array).max() < 10 for array in load_adapter(tmp_path / "run/adapter").arrays.values())


def test_two_hostile_clients_of_ten_do_harm_to_the_mean_and_little_to_krum(simulate, tamper, tmp_path):
    def change(content, client, request):
        if client < 2:
            adapter = {name: 2 * request.adapter[name] - array for name, array in from_record(content[ARRAYS]).items()}
            content[ARRAYS] = to_record(adapter)
            scaled(content, -30.0)

    def moved(**changes):
        folder = tmp_path / "-".join(str(value) for value in changes.values())
        assert simulate(clients_per_round=10, output_dir=str(folder), num_server_rounds=1, **changes)[0] == 0
        assert RunFolder.open(folder).summary["failures"] == 0
        assert RunFolder.open(folder).summary["aggregation"] == changes["aggregation"]
        return np.abs(load_adapter(folder / "adapter").arrays["prompts"]).max()

    honest = moved(aggregation="mean", max_norm_ratio=0.0)
    tamper(change)
    assert moved(aggregation="mean", max_norm_ratio=0.5 + 1e6) > 3 * honest
    for robust in ("median", "trimmed-mean", "krum"):
        assert moved(aggregation=robust, max_norm_ratio=1e6) < 1.5 * honest


def test_reply_that_never_comes_costs_the_round_its_time_limit_and_nothing_else(simulate, tamper, tmp_path):
    never = threading.Event()
    stuck = []

    def change(content, client, request):
        if request.server_round == 1 and not stuck:
            stuck.append(client)
            never.wait(60)

    tamper(change)
    code, output, _ = simulate(round_timeout=4.0, cohort_size=3)
    never.set()
    assert code == 0
    summary = RunFolder.open(tmp_path / "run").summary
    assert summary["failures_by_client"] == {str(stuck[0]): 1}
    assert "no answer in time" in output


def test_too_few_replies_end_the_run_with_code_1_and_it_can_be_resumed(simulate, monkeypatch, tmp_path):
    train = trainer.Trainer.train

    def failing(self, partition_id, request):
        if request.server_round == 2 and partition_id == min(request.cohort.members):
            raise MemoryError("no memory")
        return train(self, partition_id, request)

    assert simulate(output_dir=str(tmp_path / "straight"), cohort_size=3)[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "train", failing)
        code, _, errors = simulate(min_replies=3, cohort_size=3)
    assert code == 1
    assert errors.startswith("flower-simulation: Round 2 had 2 usable replies from 3 clients, 3 are needed.")
    assert RunFolder.open(tmp_path / "run").summary["status"] == "failed"
    assert simulate("--resume", str(tmp_path / "run"))[0] == 0
    resumed, straight = (load_adapter(tmp_path / name / "adapter").arrays for name in ("run", "straight"))
    assert all((resumed[name] == straight[name]).all() for name in straight)


def test_clients_that_have_other_rows_are_refused_before_the_first_round(simulate, run_config, tmp_path, monkeypatch):
    lines = sample_path().read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "real.jsonl").write_text("".join(lines[::-1]), encoding="utf-8")
    elsewhere = trainer.Trainer(run_config())  # that machine has the bundled sample
    monkeypatch.setattr(client_app, "connect", lambda run_config, own_data="": elsewhere)
    code, _, errors = simulate("--data", str(tmp_path / "real.jsonl"))
    assert code == 2
    assert errors.count("\n") == 1
    assert "cannot take part: it has other rows than the server" in errors
    assert not (tmp_path / "run/metrics.jsonl").exists()
