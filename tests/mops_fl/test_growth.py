import pytest
import torch

from mops_fl.adapter import Gate, PromptAdapter
from mops_fl.growth import add_expert, fit_gate_row, train_last_expert
from mops_fl.model import PromptedModel
from mops_fl.state_cache import StateCache


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def state(adapter_config, make_state):
    return make_state(adapter_config())


@pytest.fixture
def pooled():
    """Twenty rows of old tasks, eight of a new one that stands apart from them."""
    old = torch.randn(20, 32, generator=seeded(1))
    new = 3 * torch.randn(32, generator=seeded(2)) + torch.randn(8, 32, generator=seeded(3))
    return old, new


def test_new_expert_starts_as_the_one_its_rows_went_to(state, pooled):
    _, new = pooled
    favourite = int(Gate([state])(new).softmax(-1).mean(0).argmax())
    grown = add_expert(state, new, prompts_per_expert=2, temperature=1)
    assert grown["prompts"].shape == (8, 32)
    assert torch.equal(grown["prompts"][6:], state["prompts"][2 * favourite : 2 * favourite + 2])
    assert torch.equal(grown["prompts"][:6], state["prompts"])
    assert grown["gate.w2"].shape == (4, 8)
    assert torch.equal(grown["gate.w2"][:3], state["gate.w2"])
    assert torch.equal(grown["gate.b2"], torch.cat([state["gate.b2"], torch.zeros(1)]))


def test_gate_gives_the_new_expert_its_own_rows_and_no_others(state, pooled):
    old, new = pooled
    is_new = torch.arange(28) >= 20
    grown = add_expert(state, new, prompts_per_expert=2, temperature=1)
    fitted = fit_gate_row(grown, torch.cat(pooled), is_new, 1, num_old_tasks=3)
    scores = Gate([fitted])(torch.cat(pooled)).softmax(-1)
    assert (scores[20:, 3] > 0.5).all()
    assert (scores[:20, 3] < 0.5).all()
    # Among themselves the old experts share what is left as before.
    before = Gate([state])(old).softmax(-1)
    torch.testing.assert_close(scores[:20, :3] / scores[:20, :3].sum(1, keepdim=True), before, rtol=1e-4, atol=1e-5)
    for name, tensor in state.items():
        assert torch.equal(fitted[name][: len(tensor)], grown[name][: len(tensor)])
        assert name == "prompts" or torch.equal(fitted[name][: len(tensor)], tensor)


def test_a_gate_that_is_certain_of_an_old_expert_is_still_won_over(state, pooled):
    certain = {**state, "gate.b2": torch.tensor([500.0, 0.0, 0.0])}
    grown = add_expert(certain, pooled[1], prompts_per_expert=2, temperature=1)
    fitted = fit_gate_row(grown, torch.cat(pooled), torch.arange(28) >= 20, 1, num_old_tasks=3)
    scores = Gate([fitted])(torch.cat(pooled)).softmax(-1)
    assert (scores[20:, 3] > 0.5).all()
    assert (scores[:20, 3] < 0.5).all()


@pytest.mark.parametrize("num_experts", [3, 14])
def test_task_that_is_not_to_be_told_apart_gets_the_share_of_a_task_however_many_experts_there_are(
    num_experts, adapter_config, make_state
):
    rows = torch.randn(616, 32, generator=seeded(1))
    grown = add_expert(make_state(adapter_config(num_experts=num_experts)), rows[:16], 2, 1)
    grown["gate.w2"] = torch.zeros_like(grown["gate.w2"])
    fitted = fit_gate_row(grown, rows, torch.arange(616) < 16, 1, num_old_tasks=6)
    share = Gate([fitted])(torch.randn(2000, 32, generator=seeded(2))).softmax(-1)[:, -1].mean().item()
    assert share == pytest.approx(1 / 7, abs=0.05)


@pytest.fixture
def multiplied(state):
    """``multiplied(4)``: the adapter whose gate has so many times the logits."""
    return lambda factor: {**state, **{name: factor * state[name] for name in ("gate.w2", "gate.b2")}}


def test_new_expert_starts_as_the_one_its_rows_go_to_at_the_gates_temperature(state, multiplied):
    new = torch.randn(8, 32, generator=seeded(3))  # few rows are certain, more are not: the favourite depends on it
    favourites = [int((factor * Gate([state])(new)).softmax(-1).mean(0).argmax()) for factor in (1, 20)]
    assert favourites == [0, 2]
    grown = add_expert(multiplied(20), new, prompts_per_expert=2, temperature=20)
    assert torch.equal(grown["prompts"][6:], state["prompts"][:2])


def test_fit_is_the_same_at_any_temperature(state, multiplied, pooled):
    is_new = torch.arange(28) >= 20
    fitted, hot = (
        fit_gate_row(add_expert(of, pooled[1], 2, temperature), torch.cat(pooled), is_new, temperature, num_old_tasks=3)
        for of, temperature in ((state, 1), (multiplied(4), 4))
    )
    scores = Gate([fitted])(torch.cat(pooled)).softmax(-1)
    torch.testing.assert_close((Gate([hot])(torch.cat(pooled)) / 4).softmax(-1), scores)


def test_training_moves_every_prompt_of_the_last_expert_and_nothing_else(
    state, pooled, tiny_backbone, adapter_config, make_row
):
    config = adapter_config(num_experts=4)
    model = PromptedModel(tiny_backbone, config, torch.randn(6, 32, generator=seeded(5)), StateCache(0))
    rows = [make_row(i) for i in range(3)]
    own = torch.stack([states.pooled for states in model.row_states(rows)])
    grown = fit_gate_row(
        add_expert(state, own, 2, 1), torch.cat([pooled[0], own]), torch.arange(23) >= 20, 1, num_old_tasks=3
    )
    trained = train_last_expert(model, grown, rows, 2, num_steps=20, lr=0.05, generator=seeded())
    assert (trained["prompts"][6:] != grown["prompts"][6:]).any(1).all()
    assert torch.equal(trained["prompts"][:6], grown["prompts"][:6])
    assert all(torch.equal(trained[name], grown[name]) for name in grown if name != "prompts")

    def loss(of):
        return model.losses(PromptAdapter([of]), rows).loss_sum.sum().item()

    assert loss(trained) < loss(grown) - 1
