import dataclasses

import pytest
import torch

from mops_fl import pretraining
from mops_fl.adapter import Gate, PromptAdapter, initial_state
from mops_fl.config import PretrainConfig
from mops_fl.losses import plain_losses
from mops_fl.model import PromptedModel
from mops_fl.pretraining import (
    gate_inputs,
    initial_prompts,
    pretrain,
    sample_token_embeddings,
    train_gate,
    train_input_prompts,
)
from mops_fl.state_cache import StateCache

TASKS = 3


def pretrain_config(**changes):
    values = {
        "input_prompts": True,
        "input_prompt_steps": 3,
        "input_prompt_lr": 0.05,
        "gate_epochs": 60,
        "gate_lr": 0.02,
    }
    return PretrainConfig(**{**values, **changes})


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def rows(make_row):
    """Thirty rows of three tasks; the words of a task's questions are its own, those of the responses are not."""

    def make(i):
        row = make_row(i, num_tokens=14, prompt_length=10, task=i % TASKS)
        question = 100 * row.task + row.token_ids[:10] % 20
        return dataclasses.replace(row, token_ids=torch.cat([question, row.token_ids[10:]]))

    return [make(i) for i in range(30)]


@pytest.fixture
def build(tiny_backbone):
    def make(config, num_input_prompts=6):
        prompts = sample_token_embeddings(tiny_backbone, num_input_prompts, seeded(3))
        return PromptedModel(tiny_backbone, config, prompts, StateCache(0))

    return make


def same_states(first, second):
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


# The input prompts P1


def test_input_prompts_lower_the_plain_loss_of_a_repeated_row(build, adapter_config, make_row):
    model, row = build(adapter_config()), make_row(1)
    trained = train_input_prompts(model, [row], pretrain_config(input_prompt_steps=30), seeded())
    before, after = (
        plain_losses(model.backbone, prompts, [row]).loss_sum.item() / 4 for prompts in (model.input_prompts, trained)
    )
    assert after < before - 0.5
    assert not trained.requires_grad


def test_first_step_moves_every_input_prompt_by_the_learning_rate(build, adapter_config, make_row):
    model = build(adapter_config())
    trained = train_input_prompts(model, [make_row(1)], pretrain_config(input_prompt_steps=1), seeded())
    step = (trained - model.input_prompts).abs()  # Adam's first step is the rate, wherever there is a gradient
    torch.testing.assert_close(step, torch.full_like(step, 0.05), rtol=1e-3, atol=0)


def test_each_step_takes_one_row_drawn_by_the_generator(build, adapter_config, rows, monkeypatch):
    model, seen = build(adapter_config()), []
    monkeypatch.setattr(
        pretraining, "plain_losses", lambda backbone, p, batch: seen.append(batch) or plain_losses(backbone, p, batch)
    )
    train_input_prompts(model, rows, pretrain_config(input_prompt_steps=20), seeded(1))
    assert [len(batch) for batch in seen] == [1] * 20
    expected = torch.randint(len(rows), (20,), generator=seeded(1)).tolist()
    assert [batch[0].row_id for batch in seen] == expected


def test_both_methods_get_the_same_input_prompts(tiny_backbone, adapter_config, rows):
    results = [
        pretrain(tiny_backbone, rows, TASKS, adapter_config(method=method), pretrain_config(), seeded())
        for method in ("mops", "fedprompt")
    ]
    assert torch.equal(results[0].input_prompts, results[1].input_prompts)
    assert torch.equal(results[0].adapter["prompts"], results[1].adapter["prompts"])
    assert list(results[1].adapter) == ["prompts"]
    assert results[1].gate_accuracy is None


# The gate


@pytest.mark.parametrize("pooling", ["question", "all"])
def test_gate_learns_tasks_that_can_be_told_apart(pooling, tiny_backbone, adapter_config, rows):
    config = adapter_config(pooling=pooling)
    result = pretrain(tiny_backbone, rows, TASKS, config, pretrain_config(), seeded())
    assert result.gate_accuracy > 0.9


def test_gate_accuracy_is_the_share_of_rows_at_their_own_expert(tiny_backbone, adapter_config, rows):
    config = adapter_config()
    result = pretrain(tiny_backbone, rows, TASKS, config, pretrain_config(gate_epochs=4), seeded())
    model = PromptedModel(tiny_backbone, config, result.input_prompts, StateCache(0))
    scores = model.losses(PromptAdapter([result.adapter]), rows).scores
    right = [int(row_scores.argmax()) == row.task for row_scores, row in zip(scores, rows, strict=True)]
    assert result.gate_accuracy == pytest.approx(sum(right) / 30)
    assert 0 < sum(right) < 30  # so early that being right is not the only possible answer


@pytest.mark.parametrize(
    ("num_experts", "experts_of_tasks"),
    [(2, [[0], [1], [0]]), (3, [[0], [1], [2]]), (5, [[0, 3], [1, 4], [2]]), (1, [[0]] * 3)],
)
def test_task_and_expert_belong_together_by_their_numbers_modulo_the_fewer_of_them(
    num_experts, experts_of_tasks, tiny_backbone, adapter_config, rows
):
    config = adapter_config(num_experts=num_experts)
    result = pretrain(tiny_backbone, rows, TASKS, config, pretrain_config(gate_epochs=300), seeded())
    model = PromptedModel(tiny_backbone, config, result.input_prompts, StateCache(0))
    scores = model.losses(PromptAdapter([result.adapter]), rows).scores
    for task, experts in enumerate(experts_of_tasks):
        assert scores[task::TASKS, experts].sum(1).mean() > 0.7
        assert (scores[task::TASKS, experts].mean(0) > 0.1).all()  # of several experts none is left out
    assert result.gate_accuracy > 0.9


@pytest.mark.parametrize("num_experts", [1, 2, 3])
def test_no_more_experts_than_tasks_are_trained_to_the_bit_as_if_there_were_no_groups(
    num_experts, build, adapter_config, rows, make_state
):
    config, settings = adapter_config(num_experts=num_experts), pretrain_config()
    start = make_state(config)
    model = build(config)
    pooled, experts = gate_inputs(model, rows, num_experts)
    gate = Gate([start])
    optimizer = torch.optim.Adam(gate.parameters(), lr=settings.gate_lr)
    for _ in range(settings.gate_epochs):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(gate(pooled), experts).backward()
        optimizer.step()
    trained, _ = train_gate(start, model, rows, TASKS, settings)
    assert all(torch.equal(trained[f"gate.{name}"], p[0]) for name, p in gate.named_parameters())


@pytest.mark.parametrize("pooling", ["question", "all"])
def test_gate_pretraining_never_sees_a_response(pooling, build, adapter_config, rows, make_state):
    config = adapter_config(pooling=pooling)
    others = [
        dataclasses.replace(row, token_ids=torch.cat([row.token_ids[:10], torch.full((20,), row.row_id)]))
        for row in rows
    ]
    trained = [
        train_gate(make_state(config), build(config), given, TASKS, pretrain_config()) for given in (rows, others)
    ]
    assert same_states(trained[0][0], trained[1][0])
    assert trained[0][1] == trained[1][1]


def test_gate_pretraining_leaves_the_prompts_and_moves_the_whole_gate(build, adapter_config, rows, make_state):
    config, start = adapter_config(), make_state(adapter_config())
    trained, _ = train_gate(start, build(config), rows, TASKS, pretrain_config())
    assert {name for name in start if not torch.equal(start[name], trained[name])} == set(start) - {"prompts"}
    assert list(trained) == list(start)
    assert not any(tensor.requires_grad for tensor in trained.values())


def test_without_gate_epochs_the_gate_stays_as_drawn(tiny_backbone, adapter_config, rows):
    result = pretrain(tiny_backbone, rows, TASKS, adapter_config(), pretrain_config(gate_epochs=0), seeded())
    assert result.gate_accuracy is None
    generator = seeded()
    sample_token_embeddings(tiny_backbone, 6, generator)
    for _ in range(3):
        torch.randint(len(rows), (), generator=generator)
    prompts = torch.randn(6, 32, generator=generator) * tiny_backbone.embedding_weight.std()
    drawn = initial_state(adapter_config(), prompts, generator)
    assert same_states(result.adapter, drawn)


# The whole


def test_backbone_stays_as_it_was(tiny_backbone, adapter_config, rows):
    before = {name: tensor.clone() for name, tensor in tiny_backbone.model.state_dict().items()}
    pretrain(tiny_backbone, rows, TASKS, adapter_config(prompt_init="vocabulary"), pretrain_config(), seeded())
    assert same_states(before, dict(tiny_backbone.model.state_dict()))


def test_without_server_rows_nothing_is_pretrained(tiny_backbone, adapter_config):
    result = pretrain(tiny_backbone, [], TASKS, adapter_config(), pretrain_config(), seeded())
    assert torch.equal(result.input_prompts, sample_token_embeddings(tiny_backbone, 6, seeded()))
    assert result.gate_accuracy is None
    assert not result.adapter["gate.b1"].any()
    assert not result.adapter["gate.b2"].any()


def test_start_is_set_by_the_generator(tiny_backbone, adapter_config, rows):
    first, same, other = (
        pretrain(tiny_backbone, rows, TASKS, adapter_config(), pretrain_config(), seeded(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(first.input_prompts, same.input_prompts)
    assert same_states(first.adapter, same.adapter)
    assert not torch.equal(first.input_prompts, other.input_prompts)


# The prompts injected at layer m


@pytest.mark.parametrize("inject_layer", [0, 1, 3])
def test_transformed_prompts_are_the_input_prompts_as_they_arrive(inject_layer, build, adapter_config, tiny_model):
    config = adapter_config(prompt_init="transformed", inject_layer=inject_layer)
    model = build(config)
    hugging_face = tiny_model("llama")(inputs_embeds=model.input_prompts[None], output_hidden_states=True)
    expected = hugging_face.hidden_states[inject_layer][0]
    torch.testing.assert_close(initial_prompts(model, config, seeded()), expected, rtol=0, atol=1e-5)


def test_vocabulary_prompts_are_token_embeddings(build, adapter_config):
    config = adapter_config(prompt_init="vocabulary")
    model = build(config)
    prompts = initial_prompts(model, config, seeded())
    matches = [(model.backbone.embedding_weight == prompt).all(1).sum().item() for prompt in prompts]
    assert matches == [1] * 6
    assert len({tuple(prompt.tolist()) for prompt in prompts}) > 1


def test_random_prompts_spread_like_the_token_embeddings(build, adapter_config):
    config = adapter_config(num_experts=10, prompts_per_expert=20)
    model = build(config)
    prompts = initial_prompts(model, config, seeded())
    assert prompts.shape == (200, 32)
    assert prompts.std().item() == pytest.approx(model.backbone.embedding_weight.std().item(), rel=0.05)
    assert prompts.mean().abs() < 0.02


@pytest.mark.parametrize("method", ["mops", "fedprompt"])
def test_without_input_prompts_there_are_none_and_the_rest_is_as_ever(method, tiny_backbone, adapter_config, rows):
    config = adapter_config(method=method)
    start = pretrain(tiny_backbone, rows, TASKS, config, pretrain_config(input_prompts=False), seeded())
    assert start.input_prompts.shape == (0, 32)
    assert start.adapter["prompts"].shape == (6, 32)
    assert (start.gate_accuracy or 0) > 0.9 or method == "fedprompt"
    model = PromptedModel(tiny_backbone, config, start.input_prompts, StateCache(0))
    # Nothing stands before the tokens: their states are those of the plain model's lower layers.
    row = rows[0]
    expected = tiny_backbone.run_layers(tiny_backbone.embed(row.token_ids), [len(row.token_ids)], 0, 2)
    assert torch.equal(model.row_states([row])[0].tokens, expected)


def test_questions_never_stand_for_their_rows_in_the_cache(tiny_backbone, adapter_config, rows, make_state):
    config = adapter_config()
    cached, fresh = (
        PromptedModel(tiny_backbone, config, torch.randn(6, 32, generator=seeded(5)), StateCache(size))
        for size in (1 << 20, 0)
    )
    gate_inputs(cached, rows, config.num_experts)
    adapter = PromptAdapter([make_state(config)])
    assert torch.equal(cached.losses(adapter, rows).loss_sum, fresh.losses(adapter, rows).loss_sum)
