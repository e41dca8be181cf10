import pytest
import torch

from mops_fl.adapter import PromptAdapter
from mops_fl.errors import InputError
from mops_fl.model import PromptedModel
from mops_fl.routing import EXPERTS, KEYS, Neighbours, check_num_experts
from mops_fl.state_cache import StateCache

# Four rows of the server in the plane: two of expert 0 along x, one of expert 1 along y, one of expert 2 along -x.
POOLED = torch.tensor([[2.0, 0.0], [1.0, 0.2], [0.0, 5.0], [-3.0, 0.0]])
OWN = torch.tensor([0, 0, 1, 2])


@pytest.fixture
def neighbours():
    return Neighbours.of(POOLED, OWN, num_experts=3)


def test_a_row_goes_to_the_expert_of_the_nearest_direction_however_long(neighbours):
    pooled = torch.tensor([[0.1, 0.01], [100.0, 400.0], [-0.5, 0.3]])
    assert neighbours.scores(pooled).tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]


def test_what_travels_makes_the_same_neighbours_again(neighbours):
    frozen = {"input-prompts": torch.zeros(1, 2), **neighbours.to_frozen()}
    again = Neighbours.from_frozen(frozen, torch.device("cpu"))
    assert torch.equal(again.keys, neighbours.keys)
    assert torch.equal(again.experts, neighbours.experts)
    assert Neighbours.from_frozen({"input-prompts": torch.zeros(1, 2)}, torch.device("cpu")) is None
    assert {KEYS, EXPERTS} == set(neighbours.to_frozen())


@pytest.mark.parametrize("gating", ["attention", "embedding"])
def test_routing_is_a_gate_that_is_sure_of_the_nearest_expert(
    gating, tiny_backbone, adapter_config, make_row, make_state
):
    config = adapter_config(gating=gating, routing="nearest")
    prompts = torch.randn(6, 32, generator=torch.Generator().manual_seed(5))
    by_gate, row = PromptedModel(tiny_backbone, config, prompts, StateCache(0)), make_row(1)
    gated = make_state(adapter_config(gating=gating))
    sure = {**gated, "gate.w2": torch.zeros(3, 8), "gate.b2": torch.tensor([0.0, 1000.0, 0.0])}
    pooled = by_gate.row_states([row])[0].pooled
    neighbours = Neighbours.of(torch.stack([-pooled, pooled]), torch.tensor([0, 1]), num_experts=3)
    by_neighbours = PromptedModel(tiny_backbone, config, prompts, StateCache(0), neighbours)
    expected = by_gate.losses(PromptAdapter([sure]), [row])
    found = by_neighbours.losses(PromptAdapter([{"prompts": gated["prompts"]}]), [row])
    assert found.scores.tolist() == expected.scores.tolist() == [[0, 1, 0]]
    assert torch.equal(found.loss_sum, expected.loss_sum)


def test_adapter_that_is_routed_by_neighbours_has_no_gate(make_state, adapter_config):
    assert list(make_state(adapter_config(routing="nearest"))) == ["prompts"]


def test_temperature_divides_the_logits(tiny_backbone, adapter_config, make_state):
    pooled, state = torch.randn(5, 32, generator=torch.Generator().manual_seed(1)), make_state(adapter_config())
    models = [
        PromptedModel(tiny_backbone, adapter_config(gate_temperature=t), torch.zeros(0, 32), StateCache(0))
        for t in (1.0, 4.0)
    ]
    plain, warm = (model.scores(PromptAdapter([state]), pooled) for model in models)
    torch.testing.assert_close(warm, plain.log().div(4.0).softmax(-1))
    assert (warm.max(1).values < plain.max(1).values).all()


def test_experts_that_no_row_would_reach_are_refused(adapter_config):
    check_num_experts(adapter_config(routing="nearest", num_experts=3), num_tasks=3)
    check_num_experts(adapter_config(num_experts=4), num_tasks=3)
    check_num_experts(adapter_config(method="fedprompt", routing="nearest", num_experts=4), num_tasks=3)
    with pytest.raises(InputError, match=r"`num-experts` is 4, .* never be used; set it to at most 3"):
        check_num_experts(adapter_config(routing="nearest", num_experts=4), num_tasks=3)
