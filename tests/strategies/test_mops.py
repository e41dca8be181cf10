import numpy as np
import pytest

from mops_fl.config import METHODS
from mops_fl.errors import RunError
from mops_fl.payload import TrainResult
from strategies.mops import MoPs
from strategies.registry import STRATEGIES

START = {"prompts": np.zeros((2, 1), np.float32), "gate.b2": np.zeros(2, np.float32)}


def result(gate_mass, gate=(0.0, 0.0)):
    adapter = {"prompts": np.ones((2, 1), np.float32), "gate.b2": np.array(gate, np.float32)}
    return TrainResult(adapter, 3, 2, 10, 5.0, 0.25, gate_mass)


def test_experts_and_gate_are_averaged_and_gate_mass_summed(ask):
    asked = ask(MoPs, START, num_clients=2, num_experts=2)
    replies = [asked.reply(0, result((0.5, 1.5), gate=(4, 1))), asked.reply(1, result((2.0, 0.0), gate=(0, 2)))]
    arrays, totals = asked.strategy.aggregate_train(1, replies)
    assert arrays["gate.b2"].numpy().tolist() == [2.0, 1.5]
    assert arrays["prompts"].numpy().tolist() == [[1.0], [1.0]]
    assert totals["gate-mass"] == [2.5, 1.5]


def reply_with_prompts(values, gate_mass, gate=(0.0, 0.0)):
    prompts = np.array(values, np.float32).reshape(4, 1)
    return TrainResult({"prompts": prompts, "gate.b2": np.array(gate, np.float32)}, 3, 2, 10, 5.0, 0.25, gate_mass)


def test_gate_mass_weighs_each_experts_prompts_by_its_use(ask):
    start = {"prompts": np.zeros((4, 1), np.float32), "gate.b2": np.zeros(2, np.float32)}  # two prompts an expert
    asked = ask(MoPs, start, num_clients=2, num_experts=2, weighting="gate-mass")
    replies = [
        asked.reply(0, reply_with_prompts([1, 2, 3, 4], (3.0, 0.0), gate=(4, 0))),
        asked.reply(1, reply_with_prompts([5, 6, 7, 8], (1.0, 2.0), gate=(0, 2))),
    ]
    arrays, _ = asked.strategy.aggregate_train(1, replies)
    # The first expert: 3/4 and 1/4; the second was used by client 1 alone. The gates: plainly.
    assert arrays["prompts"].numpy().ravel().tolist() == [2.0, 3.0, 7.0, 8.0]
    assert arrays["prompts"].numpy().dtype == np.float32
    assert arrays["gate.b2"].numpy().tolist() == [2.0, 1.0]


def test_expert_that_nobody_used_is_averaged_plainly(ask):
    start = {"prompts": np.zeros((4, 1), np.float32), "gate.b2": np.zeros(2, np.float32)}
    asked = ask(MoPs, start, num_clients=2, num_experts=2, weighting="gate-mass")
    replies = [asked.reply(i, reply_with_prompts([i, i, 2 * i, 4 * i], (1.0, 0.0))) for i in (0, 1)]
    arrays, _ = asked.strategy.aggregate_train(1, replies)
    assert arrays["prompts"].numpy().ravel().tolist() == [0.5, 0.5, 1.0, 2.0]


def test_drift_is_the_distance_of_the_clients_from_their_mean_by_expert(ask):
    start = {"prompts": np.zeros((4, 1), np.float32), "gate.b2": np.zeros(2, np.float32)}
    asked = ask(MoPs, start, num_clients=2, num_experts=2)
    replies = [
        asked.reply(0, reply_with_prompts([1, 2, 3, 3], (1.0, 1.0))),
        asked.reply(1, reply_with_prompts([1, 2, 5, 9], (1.0, 1.0))),
    ]
    asked.strategy.aggregate_train(1, replies)
    # The second expert's prompts are 1 and 3 from their mean; beside them and the first's are two numbers of the gate.
    expected = {"drift": np.sqrt((1 + 9) / 6), "drift-expert-0": 0.0, "drift-expert-1": np.sqrt((1 + 9) / 2)}
    assert asked.reports[0].drift == pytest.approx(expected)


def test_equal_use_is_the_plain_mean(ask):
    start = {"prompts": np.zeros((4, 1), np.float32), "gate.b2": np.zeros(2, np.float32)}
    results = [reply_with_prompts(np.arange(4) * (i + 1), (1.5, 0.5)) for i in range(3)]
    outcomes = []
    for weighting in ("uniform", "gate-mass"):
        asked = ask(MoPs, start, num_clients=3, num_experts=2, weighting=weighting)
        arrays, _ = asked.strategy.aggregate_train(1, [asked.reply(i, one) for i, one in enumerate(results)])
        outcomes.append({name: array.numpy() for name, array in arrays.items()})
    for name, plain in outcomes[0].items():
        np.testing.assert_allclose(outcomes[1][name], plain, rtol=1e-6)


@pytest.mark.parametrize("gate_mass", [(), (2.0,), (1.0, 0.5, 0.5), (2.1, -0.1), (float("nan"), 1.0)])
def test_reply_without_a_mass_for_each_expert_is_refused(ask, gate_mass):
    asked = ask(MoPs, START, num_clients=2, num_experts=2)
    _, totals = asked.strategy.aggregate_train(
        1, [asked.reply(0, result(gate_mass)), asked.reply(1, result((1.0, 1.0)))]
    )
    assert totals["gate-mass"] == [1.0, 1.0]
    (failure,) = asked.reports[0].failures
    assert (failure.client, failure.node_id) == (0, 90)
    assert failure.reason.startswith("refused: ")


def test_mops_refuses_what_fedprompt_refuses(ask):
    asked = ask(MoPs, START, num_clients=1, num_experts=2)
    with pytest.raises(RunError, match="not finite"):
        asked.strategy.aggregate_train(1, [asked.reply(0, result((1.0, 1.0), gate=(np.inf, 0)))])


def test_every_method_has_its_strategy():
    assert set(STRATEGIES) == set(METHODS)
    assert {name for name, strategy in STRATEGIES.items() if strategy is MoPs} == {"mops"}
