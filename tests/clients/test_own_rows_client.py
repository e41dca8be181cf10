"""A client with rows of its own: what it answers, and that nothing of its rows is in there."""

import json

import numpy as np
import pytest
from flwr.app import Context, Message, MessageType, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

from clients import client_app
from clients.trainer import Trainer
from mops_fl.data import DOLLY_TASKS
from mops_fl.errors import InputError
from mops_fl.payload import (
    ARRAYS,
    CONFIG,
    METRICS,
    Cohort,
    EvaluateRequest,
    decode_info,
    encode_evaluate_request,
    encode_request,
    to_record,
)

OWN = {"partitioner": "own-rows", "evaluate-on": "clients"}
TASKS_HERE = ("open_qa", "brainstorming")

pytestmark = pytest.mark.usefixtures("task_identity")


def row(number, task):
    return {
        "instruction": f"secret-question-{number}",
        "context": f"secret-context-{number}" if number % 2 else "",
        "response": f"secret-answer-{number}",
        "category": task,
    }


@pytest.fixture
def rows():
    """Ten rows of one task and three of another; five tasks are not there."""
    return [row(number, TASKS_HERE[number >= 10]) for number in range(13)]


@pytest.fixture
def own_file(rows, tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    return path


@pytest.fixture
def answer(run_config, own_file):
    """``answer(message_type, content)``: what the ClientApp replies on a node with that file."""

    def ask(message_type, content=None, node_config=None, **changes):
        values = run_config({**OWN, **{name.replace("_", "-"): value for name, value in changes.items()}})
        node_config = {"data-path": str(own_file)} if node_config is None else node_config
        context = Context(run_id=1, node_id=2, node_config=node_config, state=RecordDict(), run_config=values)
        message = Message(content or RecordDict(), dst_node_id=2, message_type=message_type)
        message.metadata.__dict__["_message_id"] = "1"
        return client_app.app(message, context).content

    return ask


@pytest.fixture
def start(run_config):
    return Trainer(run_config(OWN)).prepare()


@pytest.fixture
def train_content(start):
    return encode_request(to_record(start.adapter), to_record(start.frozen), 1, Cohort((5,), 0, 1))


def evaluate_content(start):
    return encode_evaluate_request(EvaluateRequest(DOLLY_TASKS, start.adapter, start.frozen))


def bytes_of(content):
    """Every byte that Flower would send of a reply's content."""
    return b"".join(nested.deflate() for nested in get_all_nested_objects(content).values())


def test_replies_hold_the_adapter_counts_and_sums_and_not_a_byte_of_a_row(answer, start, train_content, rows, own_file):
    info = answer(MessageType.QUERY)
    trained = answer(MessageType.TRAIN, train_content)
    measured = answer(MessageType.EVALUATE, evaluate_content(start))

    assert set(info) == {CONFIG}
    assert {name: type(value) for name, value in info.config_records[CONFIG].items()} == {
        "partition-id": int, "num-examples": int, "trainer": str, "backbone-sha256": str,
        "data-sha256": str, "tasks": list, "rows-per-task": list,
    }  # fmt: skip
    assert info.config_records[CONFIG]["data-sha256"] == ""  # rows could be guessed by it
    assert set(trained) == {ARRAYS, METRICS}
    assert {name: array.shape for name, array in trained.array_records[ARRAYS].items()} == {
        name: array.shape for name, array in start.adapter.items()
    }
    numbers = [*trained.metric_records[METRICS].values(), *measured.metric_records[METRICS].values()]
    assert set(measured) == {METRICS}
    assert all(isinstance(one, int | float) for value in numbers for one in np.ravel(value).tolist())
    # Per task, expert or client, never per row or token.
    lengths = {name: np.size(value) for name, value in measured.metric_records[METRICS].items()}
    assert lengths == {"loss-sum": 7, "num-tokens": 7, "num-rows": 7, "gate-mass": 49}
    assert {name: np.size(value) for name, value in trained.metric_records[METRICS].items()} == {
        "num-examples": 1, "num-steps": 1, "num-tokens": 1, "loss-sum": 1, "seconds": 1, "gate-mass": 7
    }  # fmt: skip

    sent = bytes_of(info) + bytes_of(trained) + bytes_of(measured)
    texts = [one[name] for one in rows for name in ("instruction", "context", "response") if one[name]]
    assert len(texts) == 13 + 13 + 6
    assert not [text for text in [*texts, "secret", str(own_file)] if text.encode() in sent]
    # All bytes that are not the adapter's are few: no room for rows in any other encoding.
    adapter_bytes = sum(array.nbytes for array in start.adapter.values())
    assert len(sent) < adapter_bytes + 400 * (len(start.adapter) + 8)


def test_only_own_rows_are_trained_on_and_a_task_may_be_missing(answer, train_content):
    info = decode_info(answer(MessageType.QUERY))
    assert info.partition_id == -1
    # A tenth of each task, and at least one row, is kept back: 1 of 10 and 1 of 3.
    assert info.own_rows == {"open_qa": 9, "brainstorming": 2}
    assert info.num_examples == 11
    metrics = answer(MessageType.TRAIN, train_content).metric_records[METRICS]
    assert metrics["num-examples"] == 11
    assert decode_info(answer(MessageType.QUERY, evaluate_on="server")).num_examples == 13


def test_client_is_measured_on_the_rows_that_it_keeps_back(answer, start):
    measured = answer(MessageType.EVALUATE, evaluate_content(start), max_length=200).metric_records[METRICS]
    here = [DOLLY_TASKS.index(task) for task in TASKS_HERE]
    num_rows, num_tokens, loss_sum = (np.array(measured[name]) for name in ("num-rows", "num-tokens", "loss-sum"))
    assert num_rows[here].tolist() == [1, 1]
    assert num_rows.sum() == 2
    # secret-answer-N in bytes, and the end of the text
    assert num_tokens[here].tolist() == [len("secret-answer-1") + 1, len("secret-answer-12") + 1]
    assert (loss_sum[here] > 0).all()
    assert loss_sum.sum() == loss_sum[here].sum()
    gate = np.array(measured["gate-mass"]).reshape(7, 7).sum(1)
    np.testing.assert_allclose(gate, num_rows, atol=1e-5)  # scores of a row add up to one


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"category": "poetry"}, r"Line 14 of .*own\.jsonl has the unknown task 'poetry'"),
        ({"context": None}, r"Line 14 of .*own\.jsonl is not a JSON object with the texts"),
        ({"response": ""}, r"Line 14 of .*own\.jsonl has no response"),
    ],
)
def test_row_that_is_not_as_it_should_be_is_refused_with_one_sentence(answer, own_file, change, complaint):
    with own_file.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**row(99, "open_qa"), **change}) + "\n")
    with pytest.raises(InputError, match=complaint) as error:
        answer(MessageType.QUERY)
    assert "\n" not in str(error.value)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("node_config", "partitioner", "complaint"),
    [
        ({"partition-id": 0}, "own-rows", "this SuperNode has none"),
        ({}, "own-rows", "this SuperNode has none"),
        ({"data-path": "x.jsonl"}, "iid", "runs with partitioner='own-rows' only"),
        ({}, "iid", "has no partition-id"),
        ({"data-path": "missing.jsonl"}, "own-rows", "which does not exist"),
    ],
)
def test_node_config_that_does_not_fit_is_refused(answer, node_config, partitioner, complaint):
    with pytest.raises(InputError, match=complaint):
        answer(MessageType.QUERY, node_config=node_config, partitioner=partitioner)


def test_file_without_a_row_of_the_chosen_tasks_is_refused(answer):
    with pytest.raises(InputError, match="has no row of the tasks summarization"):
        answer(MessageType.QUERY, tasks="summarization")


def test_unexpected_error_says_only_its_kind_to_the_server(answer, monkeypatch, train_content):
    def broken(self, *arguments):
        raise ValueError("cannot digest secret-answer-3")

    monkeypatch.setattr(Trainer, "train", broken)
    with pytest.raises(RuntimeError, match="failed with ValueError") as error:
        answer(MessageType.TRAIN, train_content)
    assert "secret" not in str(error.value)
