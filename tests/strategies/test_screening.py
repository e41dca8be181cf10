import numpy as np
import pytest

from mops_fl.errors import RunError
from mops_fl.payload import TrainResult, to_record
from strategies.fedprompt import FedPrompt
from strategies.screening import overlong_updates

START = {"prompts": np.full((1, 2), 5.0, np.float32), "bias": np.zeros(1, np.float32)}


def adapter(length):
    """An update of START of this Euclidean length: 2/3, 1/3 and 2/3 of it along its three numbers."""
    prompts = START["prompts"].astype(np.float64) + np.array([[2, 1]]) * length / 3
    return {"prompts": prompts.astype(np.float32), "bias": np.array([2 * length / 3], np.float32)}


def refused(lengths, ratio):
    replies = {i: to_record(adapter(length)) for i, length in enumerate(lengths)}
    return overlong_updates(to_record(START), replies, ratio)


def test_update_a_thousand_times_as_long_as_the_others_is_named():
    assert refused([3, 3000, 3], 100) == {1: "refused: Its update is 3e+03 long, 1000 times the round's median of 3."}


@pytest.mark.parametrize("lengths", [[1, 2, 150, 3], [0, 0, 7], [1, 1000], [1000], []])
def test_updates_that_may_be_honest_are_left(lengths):
    assert refused(lengths, 100) == {}


def test_no_ratio_refuses_nothing_and_no_length_is_too_long_to_be_measured():
    assert refused([1, 1e30, 1], 0) == {}
    assert list(refused([1, 1e38, 1, 2], 100)) == [1]


def result(length, **changes):
    counts = {"num_examples": 3, "num_steps": 2, "num_tokens": 10, "loss_sum": 5.0, "seconds": 0.25, "gate_mass": ()}
    return TrainResult(adapter(length), **{**counts, **changes})


def test_overlong_update_is_not_averaged_in_and_reported_with_its_node(ask):
    asked = ask(FedPrompt, START, num_clients=4, max_norm_ratio=100.0)
    replies = [asked.reply(i, result(3000 if i == 2 else 3)) for i in range(4)]
    arrays, totals = asked.strategy.aggregate_train(1, replies)
    np.testing.assert_allclose(arrays["prompts"].numpy(), [[7.0, 6.0]], rtol=1e-6)
    assert totals["num-tokens"] == 30
    (failure,) = asked.reports[0].failures
    assert (failure.client, failure.node_id, failure.who) == (2, 92, "Client 2 (node 92)")
    assert failure.reason.startswith("refused: Its update is 3e+03 long, 1000 times")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"num_examples": 11}, "num-examples is 11; the client told of 10 at first"),
        ({"num_examples": 2**62}, "num-examples"),
        ({"num_examples": -1}, "num-examples"),
        ({"num_steps": 6}, "num-steps is 6, more than the 5"),
        ({"num_tokens": 201}, "num-tokens is 201, more than the 200"),
    ],
)
def test_count_that_cannot_be_is_refused(ask, changes, complaint):
    asked = ask(FedPrompt, START, num_clients=2)
    asked.strategy.aggregate_train(1, [asked.reply(0, result(1, **changes)), asked.reply(1, result(1))])
    (failure,) = asked.reports[0].failures
    assert complaint in failure.reason


def test_too_few_usable_replies_end_the_run(ask):
    asked = ask(FedPrompt, START, num_clients=3, min_replies=3)
    with pytest.raises(RunError, match=r"2 usable replies from 3 clients, 3 are needed\. Client 1 .*no answer"):
        asked.strategy.aggregate_train(1, [asked.reply(0, result(1)), asked.reply(2, result(1))])


def test_client_whose_node_is_gone_is_not_asked_and_counted(ask):
    asked = ask(FedPrompt, START, num_clients=3, absent=(1,))
    assert sorted(m.metadata.dst_node_id for m in asked.messages) == [90, 92]
    asked.strategy.aggregate_train(1, [asked.reply(0, result(1)), asked.reply(2, result(1))])
    (failure,) = asked.reports[0].failures
    assert (failure.client, failure.reason) == (1, "its node is not connected")
