"""The forward pass of MoPs against one written out below: by hand from the weights, one row, no library attention."""

import dataclasses
import math

import pytest
import torch

from mops_fl.adapter import PromptAdapter
from mops_fl.errors import InputError
from mops_fl.losses import plain_losses
from mops_fl.model import PromptedModel
from mops_fl.state_cache import StateCache

TOLERANCE = {"rtol": 0, "atol": 1e-5}


def rms_norm(x, weight=1.0, eps=1e-6):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def rotated(x):
    """Rotary positions 0, 1, ... of `(T, d)`."""
    half = x.shape[1] // 2
    frequencies = 10_000.0 ** (-torch.arange(half) / half)
    angles = torch.arange(len(x))[:, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    first, second = x[:, :half], x[:, half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], 1)


def layer_by_hand(layer, hidden, gate=None):
    """One Llama layer with 4 heads and 2 groups; `gate` `(T,)` multiplies the weights after the softmax."""
    attention = layer.self_attn
    x = rms_norm(hidden, layer.input_layernorm.weight)
    heads = []
    for h in range(4):
        own, shared = slice(8 * h, 8 * h + 8), slice(8 * (h // 2), 8 * (h // 2) + 8)
        query = rotated(x @ attention.q_proj.weight[own].T)
        key = rotated(x @ attention.k_proj.weight[shared].T)
        future = torch.ones(len(x), len(x)).triu(1).bool()
        weights = (query @ key.T / math.sqrt(8)).masked_fill(future, -math.inf).softmax(1)
        if gate is not None:
            weights = weights * gate
        heads.append(weights @ (x @ attention.v_proj.weight[shared].T))
    hidden = hidden + torch.cat(heads, 1) @ attention.o_proj.weight.T
    x = rms_norm(hidden, layer.post_attention_layernorm.weight)
    up = torch.nn.functional.silu(x @ layer.mlp.gate_proj.weight.T) * (x @ layer.mlp.up_proj.weight.T)
    return hidden + up @ layer.mlp.down_proj.weight.T


def gate_by_hand(state, pooled):
    hidden = (state["gate.w1"] @ rms_norm(pooled, eps=torch.finfo().eps) + state["gate.b1"]).clamp(min=0)
    exponentials = (state["gate.w2"] @ hidden + state["gate.b2"]).exp()
    return exponentials / exponentials.sum()


def loss_by_hand(backbone, config, input_prompts, state, row):
    """METHOD: layers below m on [P1 ; X], the gate, layers from m on [prompts ; X]. Returns loss sum and scores."""
    model = backbone.model.model
    num_input = len(input_prompts)
    hidden = torch.cat([input_prompts, model.embed_tokens.weight[row.token_ids]])
    for layer in model.layers[: config.inject_layer]:
        hidden = layer_by_hand(layer, hidden)
    pooled = hidden if config.pooling == "all" else hidden[num_input : num_input + row.prompt_length]
    scores = gate_by_hand(state, pooled.mean(0)) if "gate.w1" in state else None

    num_prompts, num_tokens = len(state["prompts"]), len(row.token_ids)
    hidden = torch.cat([state["prompts"], hidden[num_input:]])
    per_position = torch.ones(num_prompts + num_tokens)
    if scores is not None:
        per_position[:num_prompts] = torch.stack([scores[k // config.prompts_per_expert] for k in range(num_prompts)])
    for layer in model.layers[config.inject_layer :]:
        if config.gating == "attention":
            hidden = layer_by_hand(layer, hidden, per_position)
        else:
            hidden = layer_by_hand(layer, hidden * per_position[:, None])
    logits = rms_norm(hidden, model.norm.weight) @ backbone.model.lm_head.weight.T
    loss = torch.zeros(())
    for i in range(row.loss_start, num_tokens):
        loss = loss - logits[num_prompts + i - 1].log_softmax(0)[row.token_ids[i]]
    return loss, scores


@pytest.fixture
def build(tiny_backbone):
    """``build(config, num_input_prompts=6, cache_bytes=0)``: the model under test, on the tiny Llama."""

    def make(config, num_input_prompts=6, cache_bytes=0):
        prompts = torch.randn(num_input_prompts, 32, generator=torch.Generator().manual_seed(5))
        return PromptedModel(tiny_backbone, config, prompts, StateCache(cache_bytes))

    return make


READINGS = [(gating, pooling) for gating in ("attention", "embedding") for pooling in ("question", "all")]


def assert_equals_hand(model, config, state, row):
    losses = model.losses(PromptAdapter([state]), [row])
    expected, scores = loss_by_hand(model.backbone, config, model.input_prompts, state, row)
    # Losses are sums of some nats per token: the tolerance is per token.
    torch.testing.assert_close(losses.loss_sum[0] / losses.num_tokens[0], expected / losses.num_tokens[0], **TOLERANCE)
    assert losses.num_tokens.tolist() == [len(row.token_ids) - row.loss_start]
    if scores is None:
        assert losses.scores is None
    else:
        torch.testing.assert_close(losses.scores[0], scores, **TOLERANCE)


@pytest.mark.parametrize("inject_layer", [0, 1, 2, 3])
@pytest.mark.parametrize(("gating", "pooling"), READINGS)
def test_mops_is_the_written_out_forward(gating, pooling, inject_layer, build, adapter_config, make_row, make_state):
    config = adapter_config(gating=gating, pooling=pooling, inject_layer=inject_layer)
    assert_equals_hand(build(config), config, make_state(config), make_row(1))


@pytest.mark.parametrize("inject_layer", [0, 2, 3])
def test_fedprompt_is_the_same_forward_without_gate(inject_layer, build, adapter_config, make_row, make_state):
    config = adapter_config(method="fedprompt", inject_layer=inject_layer)
    assert_equals_hand(build(config), config, make_state(config), make_row(1))


@pytest.mark.parametrize("num_input_prompts", [0, 1, 9])
@pytest.mark.parametrize(("gating", "pooling"), READINGS)
def test_input_prompts_may_be_another_number_than_experts_prompts(
    gating, pooling, num_input_prompts, build, adapter_config, make_row, make_state
):
    config = adapter_config(gating=gating, pooling=pooling)
    assert_equals_hand(build(config, num_input_prompts), config, make_state(config), make_row(1))


@pytest.mark.parametrize("gating", ["attention", "embedding"])
def test_loss_on_all_tokens_leaves_out_the_first_only(gating, build, adapter_config, make_row, make_state):
    config, row = adapter_config(gating=gating), make_row(1, loss_start=1)
    assert_equals_hand(build(config), config, make_state(config), row)


def test_gradient_is_that_of_the_written_out_forward(build, adapter_config, make_row, make_state):
    config, row = adapter_config(), make_row(1)
    model, adapter = build(config), PromptAdapter([make_state(config)])
    model.losses(adapter, [row]).loss_sum.sum().backward()
    state = {name: tensor.requires_grad_() for name, tensor in make_state(config).items()}
    loss_by_hand(model.backbone, config, model.input_prompts, state, row)[0].backward()
    for name, parameter in adapter.named_parameters():
        largest = state[name].grad.abs().max()
        assert largest > 0, name
        torch.testing.assert_close(parameter.grad[0] / largest, state[name].grad / largest, **TOLERANCE)


def test_plain_losses_are_hugging_faces_with_the_prompts_as_embeddings(build, adapter_config, make_row, tiny_model):
    model, rows = build(adapter_config()), [make_row(1), make_row(2, num_tokens=5, prompt_length=2)]
    losses = plain_losses(model.backbone, model.input_prompts, rows)
    hugging_face = tiny_model("llama")
    for row, loss in zip(rows, losses.loss_sum, strict=True):
        embeddings = torch.cat([model.input_prompts, hugging_face.model.embed_tokens(row.token_ids)])
        labels = torch.full((len(embeddings),), -100)
        labels[6 + row.loss_start :] = row.token_ids[row.loss_start :]
        mean = hugging_face(inputs_embeds=embeddings[None], labels=labels[None]).loss
        torch.testing.assert_close(loss / (len(row.token_ids) - row.loss_start), mean, **TOLERANCE)


@pytest.mark.parametrize("layer", [4, 5, 30])
def test_layer_that_the_backbone_does_not_have_is_refused(layer, build, adapter_config):
    with pytest.raises(InputError, match=rf"`inject-layer` is {layer}, but the backbone has layers 0 to 3"):
        build(adapter_config(inject_layer=layer))


def test_negative_layer_is_refused(adapter_config):
    with pytest.raises(InputError, match="`inject-layer` is -1"):
        adapter_config(inject_layer=-1)


def test_frozen_part_gets_no_gradient(build, adapter_config, make_row, make_state):
    config = adapter_config()
    model = build(config)
    model.input_prompts.requires_grad_(True)
    before = {name: tensor.clone() for name, tensor in model.backbone.model.state_dict().items()}
    model.losses(PromptAdapter([make_state(config)]), [make_row(1)]).loss_sum.sum().backward()
    assert all(parameter.grad is None for parameter in model.backbone.model.parameters())
    assert model.input_prompts.grad is None
    assert all(torch.equal(before[name], t) for name, t in model.backbone.model.state_dict().items())


def test_gate_pooled_over_the_question_does_not_see_the_response(build, adapter_config, make_row, make_state):
    row = make_row(1)
    other = dataclasses.replace(row, row_id=2, token_ids=torch.cat([row.token_ids[:8], make_row(2).token_ids]))
    for pooling, unmoved in (("question", True), ("all", False)):
        config = adapter_config(pooling=pooling)
        model, adapter = build(config), PromptAdapter([make_state(config)])
        scores = [model.losses(adapter, [r]).scores for r in (row, other)]
        assert torch.allclose(*scores, rtol=0, atol=1e-6) == unmoved, pooling
