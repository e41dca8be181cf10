import numpy as np
import pytest

from mops_fl.methods import METHODS
from mops_fl.payload import TrainResult
from strategies.fedprompt import RoundError
from strategies.mops import MoPs
from strategies.registry import STRATEGIES

START = {"prompts": np.zeros((2, 1), np.float32), "gate.b2": np.zeros(2, np.float32)}


def result(gate_mass, gate=(0.0, 0.0)):
    adapter = {"prompts": np.ones((2, 1), np.float32), "gate.b2": np.array(gate, np.float32)}
    return TrainResult(adapter, 3, 2, 10, 5.0, 0.25, gate_mass)


def test_experts_and_gate_are_averaged_and_gate_mass_summed(ask):
    asked = ask(MoPs, START, num_clients=2)
    replies = [asked.reply(0, result((0.5, 1.5), gate=(4, 1))), asked.reply(1, result((2.0, 0.0), gate=(0, 2)))]
    arrays, totals = asked.strategy.aggregate_train(1, replies)
    assert arrays["gate.b2"].numpy().tolist() == [2.0, 1.5]
    assert arrays["prompts"].numpy().tolist() == [[1.0], [1.0]]
    assert totals["gate-mass"] == [2.5, 1.5]


@pytest.mark.parametrize("gate_mass", [(), (2.0,), (1.0, 0.5, 0.5), (2.1, -0.1), (float("nan"), 1.0)])
def test_reply_without_a_mass_for_each_expert_is_refused(ask, gate_mass):
    asked = ask(MoPs, START, num_clients=2)
    _, totals = asked.strategy.aggregate_train(
        1, [asked.reply(0, result(gate_mass)), asked.reply(1, result((1.0, 1.0)))]
    )
    assert totals["gate-mass"] == [1.0, 1.0]
    (failure,) = asked.reports[0].failures
    assert failure.startswith("Client 0: refused: ")


def test_mops_refuses_what_fedprompt_refuses(ask):
    asked = ask(MoPs, START, num_clients=1)
    with pytest.raises(RoundError, match="not finite"):
        asked.strategy.aggregate_train(1, [asked.reply(0, result((1.0, 1.0), gate=(np.inf, 0)))])


def test_every_method_has_its_strategy():
    assert set(STRATEGIES) == set(METHODS)
    assert {name for name, strategy in STRATEGIES.items() if strategy is MoPs} == {"mops"}
