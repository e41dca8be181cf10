import copy

import peft
import pytest
import torch

from mops_fl.backbone import Backbone
from mops_fl.errors import InputError
from mops_fl.losses import plain_losses
from mops_fl.weights import AdaptedModel, initial_weights

CONFIGS = {
    "lora": lambda config: peft.LoraConfig(
        task_type="CAUSAL_LM", r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules=["q_proj", "v_proj"]
    ),
    "ia3": lambda config: peft.IA3Config(
        task_type="CAUSAL_LM",
        target_modules=["k_proj", "v_proj", "down_proj"],
        feedforward_modules=["down_proj"],
    ),
}
PEFT_PARTS = {"a": "lora_A.default.weight", "b": "lora_B.default.weight", "scale": "ia3_l.default"}
FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]


def random_state(backbone, config, seed=0):
    """An adapter that changes what the model does."""
    generator = torch.Generator().manual_seed(seed)
    state = initial_weights(backbone, config, generator)
    return {name: tensor + 0.2 * torch.randn(tensor.shape, generator=generator) for name, tensor in state.items()}


def rows_of(make_row):
    return [make_row(1), make_row(2, num_tokens=9, prompt_length=3)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", CONFIGS)
def test_losses_and_gradients_are_pefts(method, family, tiny_model, byte_tokenizer, adapter_config, make_row):
    config, reference = adapter_config(method=method), tiny_model(family)
    backbone = Backbone(tiny_model(family), byte_tokenizer)
    model, state = AdaptedModel(backbone, config), random_state(backbone, config)
    adapter = model.adapter([state])
    reference = peft.get_peft_model(copy.deepcopy(reference), CONFIGS[method](config)).eval()
    parameters = {name: p for name, p in reference.named_parameters() if p.requires_grad}
    assert len(parameters) == len(state)
    theirs = {}
    for name, tensor in state.items():
        matrix, _, part = name.rpartition(".")
        theirs[name] = parameters[f"base_model.model.model.layers.{matrix}.{PEFT_PARTS[part]}"]
        theirs[name].data = tensor.reshape(theirs[name].shape).clone()
    rows = rows_of(make_row)
    losses = model.losses(adapter, rows).loss_sum
    losses.sum().backward()
    for row, loss in zip(rows, losses, strict=True):
        labels = row.token_ids.clone()
        labels[: row.loss_start] = -100
        output = reference(input_ids=row.token_ids[None], labels=labels[None])
        num_tokens = len(row.token_ids) - row.loss_start
        torch.testing.assert_close(loss, output.loss * num_tokens, rtol=1e-4, atol=1e-4)
        (output.loss * num_tokens).backward()
    for name, parameter in adapter.trainable().items():
        gradient, expected = parameter.grad[0], theirs[name].grad.reshape(state[name].shape)
        largest = expected.abs().max()
        assert largest > 0, name
        torch.testing.assert_close(gradient / largest, expected / largest, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("method", "family", "matrix"),
    [
        ("lora", "phi3", "0.self_attn.q_proj"),
        ("ia3", "phi3", "0.self_attn.k_proj"),
        ("ia3", "mixtral", "0.mlp.down_proj"),
        ("ia3", "starcoder2", "0.mlp.down_proj"),
        ("ia3", "qwen2_moe", "0.mlp.down_proj"),
    ],
)
def test_backbone_without_a_matrix_that_the_method_changes_is_refused(
    method, family, matrix, tiny_model, byte_tokenizer, adapter_config
):
    experts = {"num_local_experts": 4} if family == "mixtral" else {"num_experts": 4, "num_experts_per_tok": 2}
    backbone = Backbone(tiny_model(family, pad_token_id=0, **experts), byte_tokenizer)
    config, name = adapter_config(method=method), type(backbone.model).__name__
    for build in (lambda: AdaptedModel(backbone, config), lambda: random_state(backbone, config)):
        with pytest.raises(InputError, match=rf"{name} has no layers\.{matrix}, which the method {method} changes"):
            build()


def test_lora_of_attention_is_possible_beside_experts(tiny_model, byte_tokenizer, adapter_config, make_row):
    backbone = Backbone(tiny_model("mixtral", num_local_experts=4), byte_tokenizer)
    config = adapter_config(method="lora")
    model = AdaptedModel(backbone, config)
    losses = model.losses(model.adapter([random_state(backbone, config)]), rows_of(make_row))
    assert losses.loss_sum.isfinite().all()


@pytest.mark.parametrize("method", CONFIGS)
def test_fresh_adapter_changes_nothing(method, tiny_backbone, adapter_config, make_row):
    config, rows = adapter_config(method=method), rows_of(make_row)
    expected = plain_losses(tiny_backbone, torch.zeros(0, 32), rows).loss_sum
    model = AdaptedModel(tiny_backbone, config)
    state = initial_weights(tiny_backbone, config, torch.Generator().manual_seed(0))
    torch.testing.assert_close(model.losses(model.adapter([state]), rows).loss_sum, expected, rtol=0, atol=1e-5)
    changed = model.losses(model.adapter([random_state(tiny_backbone, config)]), rows).loss_sum
    assert (changed - expected).abs().min() > 1e-2
    # Nothing of it stays behind.
    assert torch.equal(plain_losses(tiny_backbone, torch.zeros(0, 32), rows).loss_sum, expected)


@pytest.mark.parametrize("method", CONFIGS)
def test_each_row_is_under_the_adapter_that_owns_it(method, tiny_backbone, adapter_config, make_row):
    config = adapter_config(method=method)
    model = AdaptedModel(tiny_backbone, config)
    rows = [make_row(i, num_tokens=6 + 3 * i, prompt_length=2 + 2 * i) for i in range(6)]
    states = [random_state(tiny_backbone, config, seed) for seed in range(3)]
    together = model.losses(model.adapter(states), rows).loss_sum
    for i, row in enumerate(rows):
        alone = model.losses(model.adapter([states[i // 2]]), [row]).loss_sum[0]
        torch.testing.assert_close(together[i], alone, rtol=1e-5, atol=1e-5)


def test_a_second_model_puts_no_second_wrapper_on(tiny_backbone, adapter_config, make_row):
    config, rows = adapter_config(method="lora"), rows_of(make_row)
    state = random_state(tiny_backbone, config)
    first = AdaptedModel(tiny_backbone, config)
    expected = first.losses(first.adapter([state]), rows).loss_sum
    second = AdaptedModel(tiny_backbone, config)
    assert torch.equal(second.losses(second.adapter([state]), rows).loss_sum, expected)
    assert not [name for name, _ in tiny_backbone.layers.named_modules() if ".base.base" in name]


def test_an_error_in_a_pass_leaves_no_change_behind(tiny_backbone, adapter_config, make_row, monkeypatch):
    config, rows = adapter_config(method="ia3"), rows_of(make_row)
    expected = plain_losses(tiny_backbone, torch.zeros(0, 32), rows).loss_sum
    model = AdaptedModel(tiny_backbone, config)
    adapter = model.adapter([random_state(tiny_backbone, config)])
    with monkeypatch.context() as patch:
        patch.setattr(tiny_backbone, "token_nll", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model.losses(adapter, rows)
    assert torch.equal(plain_losses(tiny_backbone, torch.zeros(0, 32), rows).loss_sum, expected)
