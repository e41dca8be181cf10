import itertools
import math

import numpy as np
import pytest
from flwr.app import Error, Message, MetricRecord, RecordDict

from clients.trainer import Trainer
from experiments import run as run_module
from experiments.app_folder import AppFolder
from experiments.central_run import run_centrally
from experiments.client_evaluation import evaluate_on_clients
from experiments.nodes import find_clients, with_own_rows
from experiments.run_folder import RunFolder
from experiments.runtimes import run_inline
from mops_fl.data import DOLLY_TASKS
from mops_fl.errors import InputError, RunError
from mops_fl.evaluation import Evaluation
from mops_fl.payload import (
    METRICS,
    ClientInfo,
    EvaluateRequest,
    EvaluateResult,
    decode_evaluate_request,
    encode_evaluate_request,
    encode_evaluate_result,
    encode_info,
)

REQUEST = EvaluateRequest(("qa", "chat"), {"prompts": np.ones((2, 3), np.float32)}, {})
# Two clients; the second has no row of the second task.
HERE = EvaluateResult((6.0, 2.0), (3, 4), (2, 1), (1.5, 0.5, 0.25, 0.75))
THERE = EvaluateResult((4.0, 0.0), (2, 0), (2, 0), (0.5, 1.5, 0.0, 0.0))


pytestmark = pytest.mark.usefixtures("task_identity")


class FakeGrid:
    """Nodes with ready-made answers."""

    def __init__(self, answers):
        self.answers = answers

    def get_node_ids(self):
        return list(self.answers)

    def send_and_receive(self, messages, *, timeout):
        for message in messages:
            message.metadata.__dict__["_message_id"] = f"message-{message.metadata.dst_node_id}"
            yield Message(self.answers[message.metadata.dst_node_id], reply_to=message)


def ask(answers, num_experts=2):
    return evaluate_on_clients(
        FakeGrid(answers), list(answers), REQUEST, num_experts=num_experts, tokens_per_row=4, timeout_seconds=1
    )


def test_sums_of_all_clients_are_one_measurement():
    measured, num_clients = ask({7: encode_evaluate_result(HERE), 5: encode_evaluate_result(THERE)})
    assert num_clients == 2
    assert measured == Evaluation(
        tasks=("qa", "chat"), loss_sum=(10.0, 2.0), num_tokens=(5, 4), gate=((0.5, 0.5), (0.25, 0.75))
    )
    assert measured.perplexity() == {"all": math.exp(12 / 9), "qa": math.exp(2), "chat": math.exp(0.5)}


def test_sum_is_the_same_to_the_bit_whatever_ids_the_nodes_have():
    results = [EvaluateResult((loss, 0.0), (1, 0), (1, 0), (1.0, 0.0, 0.0, 0.0)) for loss in (0.1, 0.2, 0.3)]
    sums = [
        ask(dict(zip(ids, map(encode_evaluate_result, results), strict=True)))[0].loss_sum
        for ids in itertools.permutations((5, 6, 7))
    ]
    assert len({*sums}) == 1


def test_client_without_a_usable_answer_is_left_out_with_a_warning(caplog):
    broken = RecordDict({METRICS: MetricRecord({"loss-sum": [1.0]})})
    measured, num_clients = ask({5: encode_evaluate_result(THERE), 6: Error(2, "no rows"), 7: broken})
    assert num_clients == 1
    assert measured.loss_sum == (4.0, 0.0)
    assert "Node 6 could not evaluate: no rows" in caplog.text
    assert "Node 7 could not evaluate: The reply does not hold exactly the sums" in caplog.text
    with pytest.raises(RunError, match="None of 1 clients could evaluate"):
        ask({6: Error(2, "no rows")})


def test_clients_that_keep_no_rows_back_add_nothing():
    nothing = encode_evaluate_result(EvaluateResult((0, 0), (0, 0), (0, 0), (0, 0, 0, 0)))
    assert ask({5: nothing, 7: encode_evaluate_result(HERE)})[0] == ask({7: encode_evaluate_result(HERE)})[0]
    with pytest.raises(RunError, match="No client keeps rows back"):
        ask({5: nothing})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("loss-sum", [1.0]),
        ("loss-sum", [float("nan"), 1.0]),
        ("num-tokens", [-1, 3]),
        ("num-rows", 2),
        ("gate-mass", []),
        ("num-tokens", [0.4, 3.0]),
        ("num-tokens", [9, 4]),  # of two rows with four at most
        ("num-rows", [2**63 - 1, 1]),  # with another's, more than an int64 holds
        ("loss-sum", [1e9, 2.0]),  # its exponential is no float
        ("gate-mass", [1.5, 0.5, 0.25, 0.77]),  # the scores of one row add up to one
        ("gate-mass", [1.7e308, 1.7e308, 0.25, 0.75]),
    ],
)
def test_sums_that_are_none_are_refused(name, value, caplog):
    content = encode_evaluate_result(HERE)
    content.metric_records[METRICS][name] = value
    with pytest.raises(RunError):
        ask({5: content})
    assert f"Metric {name} " in caplog.text


def test_request_arrives_as_it_was_sent():
    arrived = decode_evaluate_request(encode_evaluate_request(REQUEST))
    assert arrived.tasks == REQUEST.tasks
    assert (arrived.adapter["prompts"] == 1).all()
    assert decode_evaluate_request(encode_evaluate_request(EvaluateRequest(("qa",), {}, {}))).adapter == {}


def test_a_clients_sums_stand_at_the_tasks_that_were_asked_for():
    own = Evaluation(("chat", "qa"), (2.0, 6.0), (4, 3), ((0.25, 0.75), (0.75, 0.25)))
    assert own.sums(("qa", "other", "chat"), {"qa": 2, "chat": 1}) == EvaluateResult(
        (6.0, 0.0, 2.0), (3, 0, 4), (2, 0, 1), (1.5, 0.5, 0.0, 0.0, 0.25, 0.75)
    )


def test_nodes_with_rows_of_their_own_are_numbered_by_node_id():
    def own(**per_task):
        return encode_info(ClientInfo(-1, sum(per_task.values()), "mine", "weights", per_task))

    grid = FakeGrid({70: own(qa=3), 50: own(qa=1, chat=2)})
    clients = find_clients(grid, 2, "weights", "the server's rows", patience_seconds=0.1)
    assert [(node, info.partition_id, info.num_examples) for node, info in clients.items()] == [(50, 0, 3), (70, 1, 3)]
    assert clients[50].own_rows == {"qa": 1, "chat": 2}
    with pytest.raises(InputError, match="2 SuperNodes with rows of their own are connected, but num-clients is 1"):
        find_clients(grid, 1, "weights", "the server's rows", patience_seconds=0.1)


def test_task_that_the_server_does_not_know_is_refused(run_config):
    setting = Trainer(run_config({"partitioner": "own-rows", "num-clients": 2})).setting()
    here = {
        50: ClientInfo(0, 2, "a", "weights", {"open_qa": 2}),
        70: ClientInfo(1, 1, "b", "weights", {"brainstorming": 1}),
    }
    manifest = with_own_rows(setting, here).manifest
    assert manifest["partitioner"] == "own-rows"
    assert [client["per-task"]["open_qa"] for client in manifest["clients"]] == [2, 0]
    assert [client["rows"] for client in manifest["clients"]] == [[], []]
    with pytest.raises(InputError, match="Node 70 has rows of the task 'poetry', which is none of the server's"):
        with_own_rows(setting, {**here, 70: ClientInfo(1, 1, "b", "weights", {"poetry": 1})})


@pytest.fixture
def values(run_config, tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "write_report", lambda folder: folder.path / "report.html")

    def make(**changes):
        named = {name.replace("_", "-"): value for name, value in changes.items()}
        return run_config({"output-dir": str(tmp_path / "run"), **named})

    return make


@pytest.mark.parametrize("method", ["mops", "lora"])
def test_simulated_clients_measure_on_rows_that_they_keep_back(values, tmp_path, method):
    run_config = values(evaluate_on="clients", method=method)
    run_inline(AppFolder.find("experiments.dolly"), run_config, catch_signals=lambda: None)
    folder = RunFolder.open(tmp_path / "run")
    summary = folder.summary or {}
    assert summary["status"] == "complete"
    for stage in ("perplexity_bare", "perplexity_before", "perplexity"):
        assert set(summary[stage]) == {"all", *DOLLY_TASKS}
    assert len({summary[stage]["all"] for stage in ("perplexity_bare", "perplexity_before", "perplexity")}) >= 2
    gate = [line for line in folder.metrics() if line["metric"].startswith("gate-expert-")]
    assert bool(gate) == (method == "mops")
    assert summary["evaluations_missing"] == 0


def test_client_that_cannot_measure_is_counted(values, tmp_path, monkeypatch, caplog):
    whole, asked = Trainer.evaluate_client, itertools.count(1)

    def breaks_once(trainer, *args):
        if next(asked) == 18:  # ten clients measure the bare model, then round 0
            raise MemoryError("no memory left")
        return whole(trainer, *args)

    monkeypatch.setattr(Trainer, "evaluate_client", breaks_once)
    run_inline(AppFolder.find("experiments.dolly"), values(evaluate_on="clients"), catch_signals=lambda: None)
    folder = RunFolder.open(tmp_path / "run")
    assert (folder.summary or {})["evaluations_missing"] == 1
    missing = [line["value"] for line in folder.metrics() if line["metric"] == "missing-clients"]
    assert missing == [1, 0]
    assert "no memory left" in caplog.text
    assert "The perplexity is that of 9 of 10 clients." in caplog.text


def test_simulation_has_no_rows_of_its_clients_own(values):
    with pytest.raises(InputError, match="this SuperNode has none"):
        run_inline(AppFolder.find("experiments.dolly"), values(partitioner="own-rows"), catch_signals=lambda: None)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"evaluate_on": "clients"}, "central training has none"),
        ({"partitioner": "own-rows"}, "set central-rows to server"),
        ({"local_epochs": 1}, "`local-epochs` is 1, but central training has no clients; set it to 0"),
        ({"server_weight": 1.0}, "`server-weight` is 1.0, but central training has no clients; set it to 0"),
        ({"weighting": "num-examples"}, "set it to 'uniform'"),
        ({"aggregation": "median"}, "set it to 'mean'"),
    ],
)
def test_central_training_has_no_clients_to_ask(values, changes, complaint):
    with pytest.raises(InputError, match=complaint):
        run_centrally(AppFolder.find("experiments.dolly"), values(**changes), catch_signals=lambda: None)
