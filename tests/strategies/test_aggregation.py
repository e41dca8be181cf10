"""Flower's robust strategies on our adapters, against numbers worked out by hand."""

import numpy as np
import pytest

from mops_fl.errors import InputError
from mops_fl.payload import TrainResult
from strategies.aggregation import AggregationConfig, build_aggregate, check_cohort_size, needed_replies
from strategies.fedprompt import FedPrompt

START = {"prompts": np.zeros((1, 2), np.float32), "bias": np.zeros(1, np.float32)}


def config(aggregation="mean", trimmed=0.2, malicious=1, selected=1, ratio=0.0, min_replies=1):
    return AggregationConfig(aggregation, trimmed, malicious, selected, ratio, min_replies)


def result(prompts, bias):
    adapter = {"prompts": np.array([prompts], np.float32), "bias": np.array([bias], np.float32)}
    return TrainResult(adapter, 3, 2, 10, 5.0, 0.25, ())


# Four honest clients near (1, 2) and 1, and one hostile.
UPDATES = [((1.0, 2.0), 1.0), ((1.5, 2.0), 0.75), ((0.5, 2.5), 1.25), ((1.0, 1.5), 1.0), ((-90.0, 400.0), -50.0)]
EXPECTED = {
    "mean": ([-17.2, 81.6], -9.2),
    "median": ([1.0, 2.0], 1.0),
    "trimmed-mean": ([2.5 / 3, 6.5 / 3], 2.75 / 3),  # less the smallest and the largest of each number
    "krum": ([1.0, 2.0], 1.0),
}


@pytest.mark.parametrize("aggregation", EXPECTED)
def test_aggregations_by_hand(ask, aggregation):
    asked = ask(FedPrompt, START, num_clients=5, aggregate=build_aggregate(config(aggregation)))
    replies = [asked.reply(i, result(*update)) for i, update in enumerate(UPDATES)]
    arrays, totals = asked.strategy.aggregate_train(1, replies)
    prompts, bias = EXPECTED[aggregation]
    np.testing.assert_allclose(arrays["prompts"].numpy(), [prompts], rtol=1e-6)
    np.testing.assert_allclose(arrays["bias"].numpy(), [bias], rtol=1e-6)
    assert list(arrays) == ["prompts", "bias"]
    assert all(array.dtype == "float32" for array in arrays.values())
    assert totals["num-tokens"] == 50  # every usable reply, whichever of them Krum selects
    assert asked.reports[0].drift["drift"] > 1


def test_multi_krum_is_the_mean_of_the_nearest(ask):
    asked = ask(FedPrompt, START, num_clients=5, aggregate=build_aggregate(config("krum", selected=4)))
    arrays, _ = asked.strategy.aggregate_train(1, [asked.reply(i, result(*u)) for i, u in enumerate(UPDATES)])
    assert arrays["prompts"].numpy().tolist() == [[1.0, 2.0]]  # of the four honest ones


@pytest.mark.parametrize("aggregation", EXPECTED)
def test_aggregation_is_the_same_bits_in_whatever_order_replies_come(ask, aggregation):
    def bits(order):
        asked = ask(FedPrompt, START, num_clients=5, aggregate=build_aggregate(config(aggregation)))
        arrays, _ = asked.strategy.aggregate_train(1, [asked.reply(i, result(*UPDATES[i])) for i in order])
        return {name: array.data for name, array in arrays.items()}

    assert bits([3, 1, 4, 0, 2]) == bits(range(5))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"aggregation": "mode"}, "`aggregation` is 'mode'; choose one of: mean, median, trimmed-mean, krum."),
        ({"trimmed": 0.5}, "`trimmed-fraction` is 0.5"),
        ({"malicious": -1}, "`krum-malicious` is -1"),
        ({"selected": 0}, "`krum-selected` is 0"),
        ({"ratio": 0.5}, "`max-norm-ratio` is 0.5"),
        ({"min_replies": 0}, "`min-replies` is 0"),
    ],
)
def test_bad_values_are_refused(changes, complaint):
    with pytest.raises(InputError, match=complaint):
        config(**changes)


def test_rules_that_too_few_clients_cannot_satisfy_are_refused():
    check_cohort_size(config("krum", malicious=2), 7)
    with pytest.raises(InputError, match="needs 7 clients in a round to stand 2 hostile ones"):
        check_cohort_size(config("krum", malicious=2), 6)
    check_cohort_size(config(min_replies=6), 6)
    with pytest.raises(InputError, match="`min-replies` is 7, but only 6 clients"):
        check_cohort_size(config(min_replies=7), 6)


def test_trimmed_mean_that_would_cut_nothing_off_is_refused():
    check_cohort_size(config("trimmed-mean", trimmed=0.2), 5)
    with pytest.raises(InputError, match="needs 5 clients in a round to cut off one at either end"):
        check_cohort_size(config("trimmed-mean", trimmed=0.2), 4)
    assert [needed_replies(config("trimmed-mean", trimmed=trimmed)) for trimmed in (0.0, 0.1, 0.34, 0.49, 1e-9)] == [
        1, 10, 3, 3, 10**9,
    ]  # fmt: skip
    assert needed_replies(config("krum", malicious=2)) == 7
    assert needed_replies(config("median")) == 1
