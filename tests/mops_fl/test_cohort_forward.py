"""Many rows, many adapters, many calls of one `PromptedModel`: each row gets what it would get alone, first time."""

import pytest
import torch

from mops_fl.adapter import PromptAdapter
from mops_fl.evaluation import evaluate
from mops_fl.model import PromptedModel
from mops_fl.state_cache import StateCache

TOLERANCE = {"rtol": 0, "atol": 1e-5}
METHODS = pytest.mark.parametrize(
    "changes",
    [{"gating": "attention"}, {"gating": "embedding"}, {"method": "fedprompt"}],
    ids=["attention", "embedding", "fedprompt"],
)


@pytest.fixture
def build(tiny_backbone):
    def make(config, capacity_bytes=1 << 20):
        prompts = torch.randn(4, 32, generator=torch.Generator().manual_seed(5))
        return PromptedModel(tiny_backbone, config, prompts, StateCache(capacity_bytes))

    return make


@pytest.fixture
def rows(make_row):
    """Six rows of different lengths and shares of response."""
    return [make_row(i, num_tokens=6 + 3 * i, prompt_length=2 + 2 * i) for i in range(6)]


def mean_losses(losses, num_adapters):
    """`(J,)` the mean over an adapter's rows of the row's mean loss per token."""
    return (losses.loss_sum / losses.num_tokens).view(num_adapters, -1).mean(1)


def gradients(model, adapter, rows, num_adapters=1):
    mean_losses(model.losses(adapter, rows), num_adapters).sum().backward()
    return {name: parameter.grad for name, parameter in adapter.named_parameters()}


@METHODS
def test_rows_of_a_batch_get_the_losses_they_get_alone(changes, build, rows, adapter_config, make_state):
    config = adapter_config(**changes)
    model, adapter = build(config), PromptAdapter([make_state(config)])
    together = model.losses(adapter, rows)
    for i, row in enumerate(rows):
        alone = model.losses(adapter, [row])
        assert together.num_tokens[i] == alone.num_tokens[0]
        means = [losses.loss_sum / losses.num_tokens for losses in (together, alone)]
        torch.testing.assert_close(means[0][i], means[1][0], **TOLERANCE)
        if together.scores is not None:
            torch.testing.assert_close(together.scores[i], alone.scores[0], **TOLERANCE)


@METHODS
@pytest.mark.parametrize("num_adapters", [2, 3, 6])
def test_cohort_gives_each_adapter_the_gradient_it_gets_alone(
    num_adapters, changes, build, rows, adapter_config, make_state
):
    config = adapter_config(**changes)
    model = build(config)
    states = [make_state(config, seed) for seed in range(num_adapters)]
    together = gradients(model, PromptAdapter(states), rows, num_adapters)
    own = len(rows) // num_adapters
    for j, state in enumerate(states):
        alone = gradients(model, PromptAdapter([state]), rows[j * own : (j + 1) * own])
        assert set(alone) == set(together)
        for name, gradient in alone.items():
            largest = gradient.abs().max()
            assert largest > 0, name
            torch.testing.assert_close(together[name][j] / largest, gradient[0] / largest, **TOLERANCE)


def test_adapter_gets_nothing_from_other_adapters_rows(build, rows, adapter_config, make_state):
    config = adapter_config()
    model, adapter = build(config), PromptAdapter([make_state(config, seed) for seed in range(3)])
    mean_losses(model.losses(adapter, rows), 3)[1].backward()
    for name, parameter in adapter.named_parameters():
        assert [bool(gradient.any()) for gradient in parameter.grad] == [False, True, False], name


@METHODS
def test_cached_states_give_bitwise_the_losses_of_fresh_ones(changes, build, rows, adapter_config, make_state):
    config = adapter_config(**changes)
    cached, fresh, adapter = build(config), build(config, capacity_bytes=0), PromptAdapter([make_state(config)])
    results = [model.losses(adapter, rows) for model in (cached, cached, fresh, fresh)]
    assert all(torch.equal(result.loss_sum, results[0].loss_sum) for result in results)
    for kept, computed in zip(cached.row_states(rows), fresh.row_states(rows), strict=True):
        assert torch.equal(kept.tokens, computed.tokens)
        assert torch.equal(kept.pooled, computed.pooled)


def test_state_of_a_row_does_not_depend_on_the_rows_beside_it(build, rows, adapter_config):
    model = build(adapter_config(), capacity_bytes=0)
    together = model.row_states(rows)
    alone = [model.row_states([row])[0] for row in rows]
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(together, alone, strict=True))


def test_second_pass_runs_no_layer_below_the_prompts(build, rows, adapter_config, monkeypatch):
    model = build(adapter_config(inject_layer=2))
    model.row_states(rows)
    monkeypatch.setattr(model.backbone, "run_layers", lambda *_, **__: pytest.fail("computed again"))
    assert [len(states.tokens) for states in model.row_states(rows)] == [len(row.token_ids) for row in rows]


def test_kept_states_cost_the_row_and_nothing_more(tiny_backbone, rows, adapter_config):
    cache = StateCache(1 << 20)
    model = PromptedModel(tiny_backbone, adapter_config(), torch.zeros(50, 32), cache)
    (states,) = model.row_states(rows[:1])
    assert states.num_bytes == (6 * 32 + 32) * 4
    assert states.tokens.untyped_storage().nbytes() == 6 * 32 * 4  # no view that keeps the prompts' states alive


@METHODS
def test_training_after_an_evaluation_is_bitwise_the_training_without(changes, build, rows, adapter_config, make_state):
    config = adapter_config(**changes)
    results = []
    for evaluated in (False, True):
        model, adapter = build(config), PromptAdapter([make_state(config)])
        if evaluated:
            evaluate(model, adapter, rows, ("task",))
        gradients(model, adapter, rows)
        torch.optim.Adam(adapter.parameters(), lr=0.1).step()
        if evaluated:
            evaluate(model, adapter, rows, ("task",))
        results.append(adapter.states()[0])
    start = make_state(config)
    for name in start:
        assert torch.equal(results[0][name], results[1][name]), name
        assert not torch.equal(results[0][name], start[name]), name


def test_training_lowers_the_loss_on_the_rows_trained_on(build, rows, adapter_config, make_state):
    config = adapter_config()
    model, adapter = build(config), PromptAdapter([make_state(config)])
    optimizer = torch.optim.Adam(adapter.parameters(), lr=0.05)
    course = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = mean_losses(model.losses(adapter, rows), 1).sum()
        loss.backward()
        optimizer.step()
        course.append(loss.item())
    assert course[-1] < course[0] - 0.5
