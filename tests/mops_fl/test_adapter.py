import math

import pytest
import torch

from mops_fl.adapter import PromptAdapter, initial_state

GATE_SHAPES = {"gate.w1": (8, 32), "gate.b1": (8,), "gate.w2": (3, 8), "gate.b2": (3,)}


def fresh_state(config, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return initial_state(config, torch.randn(config.num_prompts, 32, generator=generator), generator)


def random_rows(count):
    return torch.randn(count, 32, generator=torch.Generator().manual_seed(1))


def gate_by_hand(state, x):
    """`softmax(W2 relu(W1 x))` of one row, element by element, `x` over its root mean square."""
    x = x / math.sqrt(sum(value.item() ** 2 for value in x) / len(x))
    hidden = [max(0.0, (w @ x + b).item()) for w, b in zip(state["gate.w1"], state["gate.b1"], strict=True)]
    logits = [(w @ torch.tensor(hidden) + b).item() for w, b in zip(state["gate.w2"], state["gate.b2"], strict=True)]
    return [math.exp(logit) / sum(map(math.exp, logits)) for logit in logits]


@pytest.mark.parametrize(("method", "gate_shapes"), [("mops", GATE_SHAPES), ("fedprompt", {})])
def test_initial_state_holds_the_prompts_and_for_mops_a_gate(method, gate_shapes, adapter_config):
    state = fresh_state(adapter_config(method=method))
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {"prompts": (6, 32), **gate_shapes}
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}


def test_initial_prompts_are_those_given_in_float32_and_a_copy(adapter_config):
    given = random_rows(6).bfloat16()
    state = initial_state(adapter_config(), given, torch.Generator())
    assert torch.equal(state["prompts"], given.float())
    given = given.float()
    state = initial_state(adapter_config(), given, torch.Generator())
    state["prompts"].zero_()
    assert given.any()


def test_initial_state_is_set_by_the_generator(adapter_config):
    first, same, other = (fresh_state(adapter_config(), seed) for seed in (0, 0, 1))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["gate.w1"], other["gate.w1"])


def test_fresh_gate_is_nearly_flat_but_not_the_same_for_all_rows(adapter_config):
    rows = random_rows(20)
    scores = PromptAdapter([fresh_state(adapter_config())]).scores(rows)
    assert (scores - 1 / 3).abs().max() < 0.1
    assert scores.std(0).min() > 0


@pytest.mark.parametrize("num_adapters", [1, 3])
@pytest.mark.parametrize("method", ["mops", "fedprompt"])
def test_states_come_back_bitwise(method, num_adapters, adapter_config, make_state):
    states = [make_state(adapter_config(method=method), seed) for seed in range(num_adapters)]
    returned = PromptAdapter(states).states()
    assert len(returned) == num_adapters
    for before, after in zip(states, returned, strict=True):
        assert list(before) == list(after)
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_states_are_copies_that_training_does_not_touch(adapter_config, make_state):
    adapter = PromptAdapter([make_state(adapter_config())])
    (state,) = adapter.states()
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.zero_()
    assert all(tensor.any() and not tensor.requires_grad for tensor in state.values())


def test_adapters_do_not_share_memory_when_made_of_one_state(adapter_config, make_state):
    state = make_state(adapter_config())
    adapter = PromptAdapter([state, state])
    with torch.no_grad():
        adapter.prompts[0].zero_()
    assert torch.equal(adapter.prompts[1], state["prompts"])
    assert state["prompts"].any()


def test_scores_are_the_written_out_gate_of_each_rows_own_adapter(adapter_config, make_state):
    states = [make_state(adapter_config(), seed) for seed in range(2)]
    pooled = 50 * random_rows(6)
    scores = PromptAdapter(states).scores(pooled)
    expected = [gate_by_hand(states[row // 3], pooled[row]) for row in range(6)]  # owner by owner
    torch.testing.assert_close(scores, torch.tensor(expected), rtol=0, atol=1e-5)


def test_scores_sum_to_one(adapter_config, make_state):
    scores = PromptAdapter([make_state(adapter_config())]).scores(100 * random_rows(9))
    torch.testing.assert_close(scores.sum(1), torch.ones(9), rtol=0, atol=1e-6)
    assert (scores >= 0).all()


def test_gate_looks_at_the_direction_of_the_pooled_state_only(adapter_config, make_state):
    adapter, pooled = PromptAdapter([make_state(adapter_config())]), random_rows(4)
    torch.testing.assert_close(adapter.scores(pooled), adapter.scores(1000 * pooled), rtol=0, atol=1e-5)


def test_plain_prompts_have_no_scores(adapter_config, make_state):
    adapter = PromptAdapter([make_state(adapter_config(method="fedprompt"))])
    assert adapter.scores(random_rows(2)) is None
    assert [name for name, _ in adapter.named_parameters()] == ["prompts"]


def test_each_row_gets_its_owners_prompts(adapter_config, make_state):
    states = [make_state(adapter_config(), seed) for seed in range(2)]
    prompts = PromptAdapter(states).prompts_of_rows(6)
    assert prompts.shape == (6, 6, 32)
    assert all(torch.equal(prompts[row], states[row // 3]["prompts"]) for row in range(6))
