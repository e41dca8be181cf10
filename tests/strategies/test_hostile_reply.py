"""A reply may hold anything; whatever it is, it is refused by name and the round goes on without it."""

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord

from mops_fl.payload import TrainResult, encode_result
from strategies.fedprompt import FedPrompt

START = {"prompts": np.zeros((1, 2), np.float32)}
GOOD = TrainResult({"prompts": np.ones((1, 2), np.float32)}, 3, 2, 10, 5.0, 0.25, ())


def array(data, stype="numpy.ndarray", dtype="float32", shape=(1, 2)):
    return ArrayRecord({"prompts": Array(dtype, shape, stype, data)})


def of_numpy(values):
    return Array(values).data


def with_header(text):
    """An array in numpy's format 1.0 whose header is `text`, which numpy reads as a Python literal."""
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


@pytest.mark.parametrize(
    ("record", "content"),
    [
        pytest.param("arrays", ConfigRecord({"prompts": 1}), id="config instead of arrays"),
        pytest.param("arrays", array(b"junk"), id="bytes that are no array"),
        pytest.param("arrays", array(b""), id="no bytes"),
        pytest.param("arrays", array(with_header("{'descr': (")), id="header that is no Python"),
        pytest.param(
            "arrays",
            array(with_header(f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({2**70},)}}")),
            id="shape that is no size",
        ),
        pytest.param("arrays", array(of_numpy(np.zeros(2, np.float32))), id="shape is not the one declared"),
        pytest.param("arrays", array(of_numpy(np.zeros((1, 2)))), id="dtype is not the one declared"),
        pytest.param(
            "arrays", array(of_numpy(np.zeros((1, 2), np.float32)), stype="torch"), id="another serialisation"
        ),
        pytest.param("gate-mass", 1.0, id="gate mass is one number"),
        pytest.param("gate-mass", [0.5, 0.5], id="gate mass without a gate"),
        pytest.param("loss-sum", [1.0], id="loss is a list"),
        pytest.param("seconds", [1.0, 2.0], id="seconds is a list"),
    ],
)
def test_hostile_reply_is_refused_and_the_others_are_averaged(ask, record, content):
    asked = ask(FedPrompt, START, num_clients=2)
    hostile = encode_result(GOOD)
    if record == "arrays":
        del hostile["arrays"]
        hostile["arrays"] = content
    else:
        hostile["metrics"] = MetricRecord({**hostile["metrics"], record: content})
    arrays, _ = asked.strategy.aggregate_train(1, [asked.reply_with(0, hostile), asked.reply(1, GOOD)])
    assert arrays["prompts"].numpy().tolist() == [[1.0, 1.0]]
    (failure,) = asked.reports[0].failures
    assert (failure.client, failure.node_id) == (0, 90)
    assert failure.reason.startswith("refused: ")


TERMINAL = "\x1b]0;owned\x07\x1b[2J\x1b[H\x1b[32mround 20/20: all is well\x1b[0m\r\n"


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(array(b"", stype=TERMINAL), id="serialisation"),
        pytest.param(array(of_numpy(np.zeros((1, 2), np.float32)), dtype=TERMINAL), id="dtype"),
        pytest.param(array(of_numpy(np.zeros((1, 2), np.float32)), dtype="x" * 1_000_000), id="long dtype"),
        pytest.param(array(of_numpy(np.zeros((1, 2), np.float32)), shape=tuple(range(100_000))), id="long shape"),
        pytest.param(ArrayRecord({TERMINAL: Array(np.zeros(2, np.float32))}), id="name"),
    ],
)
def test_refusal_is_a_short_line_that_a_terminal_only_shows(ask, content):
    asked = ask(FedPrompt, START, num_clients=2)
    hostile = encode_result(GOOD)
    hostile["arrays"] = content
    asked.strategy.aggregate_train(1, [asked.reply_with(0, hostile), asked.reply(1, GOOD)])
    (failure,) = asked.reports[0].failures
    assert failure.reason.isprintable()
    assert len(failure.reason) < 400
