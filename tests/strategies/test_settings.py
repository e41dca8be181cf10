"""The settings of robust rules and of the server's own training count in the average."""

import numpy as np
import pytest

from mops_fl.payload import TrainResult
from strategies.aggregation import AggregationConfig, build_aggregate
from strategies.fedprompt import FedPrompt
from strategies.mops import MoPs

START = {"prompts": np.zeros((1, 1), np.float32)}


def result(value):
    return TrainResult({"prompts": np.array([[value]], np.float32)}, 3, 2, 10, 5.0, 0.25, ())


@pytest.mark.parametrize(
    ("changes", "values", "expected"),
    [
        ({"aggregation": "trimmed-mean", "trimmed_fraction": 0.4}, [0, 1, 3, 7, 9], 3.0),
        ({"aggregation": "trimmed-mean", "trimmed_fraction": 0.2}, [0, 1, 3, 7, 9], 11 / 3),
        ({"aggregation": "krum", "krum_malicious": 0}, [0, 1, 2, 4, 5], 2.0),
        ({"aggregation": "krum", "krum_malicious": 1}, [0, 1, 2, 4, 5], 1.0),
    ],
)
def test_settings_of_a_robust_rule_reach_it(ask, changes, values, expected):
    given = {
        "aggregation": "mean",
        "trimmed_fraction": 0.2,
        "krum_malicious": 1,
        "krum_selected": 1,
        "max_norm_ratio": 0.0,
        "min_replies": 1,
    }
    asked = ask(FedPrompt, START, num_clients=5, aggregate=build_aggregate(AggregationConfig(**{**given, **changes})))
    arrays, _ = asked.strategy.aggregate_train(1, [asked.reply(i, result(value)) for i, value in enumerate(values)])
    assert arrays["prompts"].numpy().item() == pytest.approx(expected)


def test_gate_mass_of_the_server_counts_with_its_weight(ask):
    def masses(value, mass):
        return TrainResult({"prompts": np.full((4, 1), value, np.float32)}, 3, 2, 10, 5.0, 0.25, mass)

    asked = ask(MoPs, {"prompts": np.zeros((4, 1), np.float32)}, num_clients=1, num_experts=2, weighting="gate-mass")
    asked.strategy._server, asked.strategy._server_weight = lambda *_: masses(8.0, (1.0, 1.0)), 3.0
    arrays, _ = asked.strategy.aggregate_train(1, [asked.reply(0, masses(0.0, (1.0, 0.0)))])
    assert arrays["prompts"].numpy().ravel().tolist() == [6.0, 6.0, 8.0, 8.0]  # 3 * 8 / (1 + 3); the server alone
