"""What is trained row by row, input prompts and a grown expert, agrees with Adam written out."""

import torch

from mops_fl.adapter import PromptAdapter
from mops_fl.config import PretrainConfig
from mops_fl.growth import train_last_expert
from mops_fl.losses import plain_losses
from mops_fl.model import PromptedModel
from mops_fl.pretraining import pretrain, sample_token_embeddings
from mops_fl.state_cache import StateCache


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def adam_by_hand(parameter, losses, lr, mask=1.0):
    mean, square = torch.zeros_like(parameter), torch.zeros_like(parameter)
    for step, loss in enumerate(losses, start=1):
        gradient = torch.autograd.grad(loss(), parameter)[0] * mask
        with torch.no_grad():
            mean.mul_(0.9).add_(0.1 * gradient)
            square.mul_(0.999).add_(0.001 * gradient**2)
            parameter -= lr * (mean / (1 - 0.9**step)) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
    return parameter.detach()


def test_input_prompts_are_trained_by_adam_on_the_mean_loss_of_a_row_a_step(tiny_backbone, adapter_config, make_row):
    config, settings = adapter_config(), PretrainConfig(True, 4, 0.05, 0, 0.02)
    rows = [make_row(i, num_tokens=10 + 6 * i, prompt_length=8) for i in range(4)]
    start = pretrain(tiny_backbone, rows, 3, config, settings, seeded())

    generator = seeded()
    prompts = sample_token_embeddings(tiny_backbone, 6, generator).requires_grad_()
    drawn = [rows[int(torch.randint(4, (), generator=generator))] for _ in range(4)]

    def loss_of(row):
        losses = plain_losses(tiny_backbone, prompts, [row])
        return losses.loss_sum[0] / losses.num_tokens[0]

    expected = adam_by_hand(prompts, [lambda row=row: loss_of(row) for row in drawn], lr=0.05)
    torch.testing.assert_close(start.input_prompts, expected, rtol=0, atol=1e-5)
    assert len({len(row.token_ids) for row in drawn}) > 1


def test_last_expert_is_trained_by_adam_on_the_mean_loss_of_a_row_a_step(
    tiny_backbone, adapter_config, make_row, make_state
):
    config = adapter_config()
    model = PromptedModel(tiny_backbone, config, torch.randn(6, 32, generator=seeded(5)), StateCache(0))
    state, rows = make_state(config), [make_row(i, num_tokens=10 + 6 * i, prompt_length=8) for i in range(4)]
    trained = train_last_expert(model, state, rows, 2, num_steps=5, lr=0.05, generator=seeded())

    generator = seeded()
    drawn = [rows[int(torch.randint(4, (), generator=generator))] for _ in range(5)]
    adapter = PromptAdapter([state])
    mask = torch.zeros(1, 6, 32)
    mask[:, 4:] = 1

    def loss_of(row):
        losses = model.losses(adapter, [row])
        return losses.loss_sum[0] / losses.num_tokens[0]

    expected = adam_by_hand(adapter.prompts, [lambda row=row: loss_of(row) for row in drawn], lr=0.05, mask=mask)
    torch.testing.assert_close(trained["prompts"], expected[0], rtol=0, atol=1e-5)
