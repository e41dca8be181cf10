import itertools

import numpy as np
import pytest
from flwr.app import Error, Message, MetricRecord, RecordDict

from mops_fl.errors import RunError
from mops_fl.payload import Cohort, TrainResult, decode_request
from strategies.fedprompt import FedPrompt
from strategies.totals import sum_metrics

START = {"prompts": np.zeros((1, 2), np.float32), "bias": np.zeros(1, np.float32)}  # 12 bytes


def result(prompts, bias=0.0, num_examples=1, **changes):
    adapter = {"prompts": np.array([prompts], np.float32), "bias": np.array([bias], np.float32)}
    counts = {
        "num_examples": num_examples,
        "num_steps": 2,
        "num_tokens": 10,
        "loss_sum": 5.0,
        "seconds": 0.25,
        "gate_mass": (),
    }
    return TrainResult(adapter, **{**counts, **changes})


def values(arrays):
    return {name: array.numpy().tolist() for name, array in arrays.items()}


def test_each_sampled_client_is_asked_once_with_its_cohort_and_the_global_adapter(ask):
    asked = ask(FedPrompt, START, num_clients=3, rounds_done=4)
    assert sorted(m.metadata.dst_node_id for m in asked.messages) == [90, 91, 92]
    for client, cohort in ((0, Cohort((0, 2), 0, 2)), (2, Cohort((0, 2), 0, 2)), (1, Cohort((1,), 1, 2))):
        message = asked.message_to(client)
        request = decode_request(message.content)
        assert message.metadata.message_type == "train"
        assert (request.server_round, request.cohort) == (5, cohort)
        assert {name: array.tolist() for name, array in request.adapter.items()} == {
            "prompts": [[0.0, 0.0]],
            "bias": [0.0],
        }
        assert request.frozen["input-prompts"].shape == (2, 3)


def test_cohorts_are_asked_by_turns(ask):
    asked = ask(FedPrompt, START, num_clients=5, cohort_size=2)  # (0, 3), (1, 4) and (2,)
    assert [message.metadata.dst_node_id - 90 for message in asked.messages] == [0, 1, 2, 3, 4]
    cohorts = [decode_request(message.content).cohort.members for message in asked.messages]
    assert cohorts == [(0, 3), (1, 4), (2,), (0, 3), (1, 4)]


def test_uniform_weighting_is_the_plain_mean(ask):
    asked = ask(FedPrompt, START)
    replies = [
        asked.reply(0, result([1, 2], 3, 1)),
        asked.reply(1, result([4, 8], 3, 5)),
        asked.reply(2, result([1, -4], 0, 4)),
    ]
    arrays, _ = asked.strategy.aggregate_train(1, replies)
    assert values(arrays) == {"prompts": [[2.0, 2.0]], "bias": [2.0]}
    assert all(array.dtype == "float32" for array in arrays.values())


def test_num_examples_weighting_counts_each_row_alike(ask):
    asked = ask(FedPrompt, START, num_clients=2, weighting="num-examples")
    replies = [asked.reply(0, result([8, 0], 1, num_examples=1)), asked.reply(1, result([0, 4], 1, num_examples=3))]
    arrays, _ = asked.strategy.aggregate_train(1, replies)
    assert values(arrays) == {"prompts": [[2.0, 3.0]], "bias": [1.0]}  # 8/4 + 0, 0 + 4 * 3/4


@pytest.mark.parametrize("weighting", ["uniform", "num-examples"])
def test_mean_is_the_same_bits_in_whatever_order_replies_come(ask, weighting):
    asked = ask(FedPrompt, START, num_clients=4, weighting=weighting)
    # Summed in another order these give another float32: 1e8 swallows what small ones add up to.
    prompts = [[1e8, 1 / 3], [3.0, 1e-8], [-1e8, 1e8], [2.7, -1e8]]

    def mean(order):
        replies = [asked.reply(client, result(prompts[client], num_examples=client + 1)) for client in order]
        arrays, _ = asked.strategy.aggregate_train(1, replies)
        return arrays["prompts"].numpy().tobytes()

    assert len({mean(order) for order in itertools.permutations(range(4))}) == 1


def broken_replies(asked):
    """Client 1 fails in each way there is; what it is said to have done."""
    nan = result([np.nan, 0])
    gone = Message(Error(code=4, reason="node unavailable"), reply_to=asked.message_to(1))
    refused = RecordDict({"metrics": MetricRecord({"num-examples": 1})})
    return [
        ([Message(Error(code=2, reason="it broke"), reply_to=asked.message_to(1))], "it broke"),
        ([Message(Error(code=5), reply_to=asked.message_to(1))], "error 5"),
        ([asked.reply(1, nan)], "refused: Array prompts holds values that are not finite"),
        ([asked.reply(1, result([0, 0], num_tokens=0))], "refused: Metric num-tokens is 0"),
        ([asked.reply_with(1, refused)], "refused: The reply does not hold exactly"),
        ([gone], "node unavailable"),
        ([], "no answer in time"),
    ]


@pytest.mark.parametrize("kind", range(7))
def test_broken_reply_is_left_out_and_reported_with_its_client(ask, kind):
    asked = ask(FedPrompt, START)
    broken, reason = broken_replies(asked)[kind]
    replies = [asked.reply(2, result([4, 0])), *broken, asked.reply(0, result([2, 2]))]
    arrays, totals = asked.strategy.aggregate_train(1, replies)
    assert values(arrays) == {"prompts": [[3.0, 1.0]], "bias": [0.0]}
    assert totals["num-tokens"] == 20
    (report,) = asked.reports
    (failure,) = report.failures
    assert failure.who == "Client 1 (node 91)"
    assert failure.reason.startswith(reason)


@pytest.mark.parametrize("kind", range(7))
def test_round_without_a_usable_reply_is_an_error(ask, kind):
    asked = ask(FedPrompt, START, num_clients=2, rounds_done=6)
    broken, _ = broken_replies(asked)[kind]
    failed = Message(Error(code=2, reason="first"), reply_to=asked.message_to(0))
    with pytest.raises(RunError, match=r"Round 7 had no usable reply from 2 clients. Client 0 .node 90.: first"):
        asked.strategy.aggregate_train(1, [*broken, failed])
    assert asked.reports == []


def test_reply_of_a_node_that_was_not_asked_is_not_averaged(ask):
    asked, stranger = ask(FedPrompt, START, num_clients=2), ask(FedPrompt, START, num_clients=3)
    replies = [asked.reply(0, result([2, 2])), asked.reply(1, result([4, 4])), stranger.reply(2, result([99, 99]))]
    arrays, _ = asked.strategy.aggregate_train(1, replies)
    assert values(arrays)["prompts"] == [[3.0, 3.0]]


def test_report_sums_metrics_and_counts_bytes(ask):
    asked = ask(FedPrompt, START, rounds_done=2, weighting="num-examples")
    failed = Message(Error(code=2, reason="it broke"), reply_to=asked.message_to(1))
    first = result([0, 0], num_examples=7)
    third = result([0, 0], num_examples=2, num_steps=3, num_tokens=4, loss_sum=2.5, seconds=1.0)
    asked.strategy.aggregate_train(1, [asked.reply(2, third), failed, asked.reply(0, first)])
    (report,) = asked.reports
    assert report.server_round == 3
    assert dict(report.totals) == {
        "num-examples": 9, "num-steps": 5, "num-tokens": 14, "loss-sum": 7.5, "seconds": 1.25, "gate-mass": [],
    }  # fmt: skip
    # An array costs its name, numpy's header of 128 bytes and its values: adapter and P1 went to three clients,
    # two adapters came back.
    adapter, input_prompts = len("prompts") + len("bias") + 2 * 128 + 12, len("input-prompts") + 128 + 24
    assert report.bytes_down == 3 * (adapter + input_prompts)
    assert report.bytes_up == 2 * adapter


def test_metrics_are_summed_name_by_name_and_lists_place_by_place():
    contents = [
        RecordDict({"metrics": MetricRecord({"a": 1, "b": 0.5, "c": [1.0, 2.0], "weight": 9})}),
        RecordDict({"metrics": MetricRecord({"a": 2, "b": 0.25, "c": [0.5, -2.0], "weight": 9})}),
    ]
    totals = sum_metrics(contents)
    assert dict(totals) == {"a": 3, "b": 0.75, "c": [1.5, 0.0]}
    assert type(totals["a"]) is int


def test_server_takes_part_with_its_weight(ask):
    told = []

    def server(server_round, arrays):
        told.append((server_round, values(arrays)))
        return result((10.0, 20.0), 5.0, num_examples=8)

    # (-1 - 1 + 2 * 10) / 4 and so on; by rows the server counts 2 * 8, the clients 3 and 4.
    for weighting, expected in (("uniform", [4.5, 8.75]), ("num-examples", [153 / 23, 302 / 23])):
        asked = ask(FedPrompt, START, num_clients=2, weighting=weighting)
        asked.strategy._server, asked.strategy._server_weight = server, 2.0
        replies = [
            asked.reply(0, result((-1.0, -2.0), num_examples=3)),
            asked.reply(1, result((-1.0, -3.0), num_examples=4)),
        ]
        arrays, totals = asked.strategy.aggregate_train(1, replies)
        np.testing.assert_allclose(arrays["prompts"].numpy()[0], expected, rtol=1e-6)
        assert totals["num-examples"] == 3 + 4 + 8
    assert told == [(1, {"prompts": [[0.0, 0.0]], "bias": [0.0]})] * 2


def test_the_servers_own_training_must_be_finite_too(ask):
    asked = ask(FedPrompt, START, num_clients=1)
    asked.strategy._server = lambda *_: result((np.nan, 1.0), num_examples=8)
    with pytest.raises(RunError, match=r"Round 1: the server's own training cannot be used. .* not finite"):
        asked.strategy.aggregate_train(1, [asked.reply(0, result((1.0, 1.0), num_examples=3))])
