import pytest
import torch
import torch.nn.functional as F

from mops_fl import head_loss
from mops_fl.head_loss import head_nll


@pytest.fixture(params=[2, 5, 256])
def _chunk(request, monkeypatch):
    monkeypatch.setattr(head_loss, "CHUNK", request.param)


def inputs(num_positions=5, spread=1.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_positions, 8, generator=generator) * spread
    weight, bias = torch.randn(30, 8, generator=generator), torch.randn(30, generator=generator)
    targets = torch.randint(30, (num_positions,), generator=generator)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype), bias.to(dtype), targets


@pytest.mark.usefixtures("_chunk")
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("spread", [1.0, 40.0])  # 40: a target's probability underflows
def test_value_and_gradient_are_those_of_cross_entropy(biased, spread):
    hidden, weight, bias, targets = inputs(spread=spread)
    bias = bias if biased else None
    share = torch.tensor([0.5, 0.0, 2.0, 1.0, -1.0])  # of each position in the loss
    expected = F.cross_entropy(F.linear(hidden, weight, bias), targets, reduction="none")
    (expected_gradient,) = torch.autograd.grad((expected * share).sum(), hidden)
    found = head_nll(hidden, weight, bias, targets)
    (gradient,) = torch.autograd.grad((found * share).sum(), hidden)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-5)
    assert expected.max() > 5


def test_bfloat16_has_float32_losses():
    hidden, weight, bias, targets = inputs(dtype=torch.bfloat16)
    found = head_nll(hidden, weight, bias, targets)
    expected = F.cross_entropy(F.linear(hidden, weight, bias).float(), targets, reduction="none")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    found.sum().backward()
    (expected_gradient,) = torch.autograd.grad(expected.sum(), hidden)
    assert hidden.grad.dtype == torch.bfloat16
    torch.testing.assert_close(hidden.grad, expected_gradient, rtol=2e-2, atol=2e-2)


def test_no_position_no_loss():
    hidden, weight, bias, targets = inputs(0)
    assert head_nll(hidden, weight, bias, targets).shape == (0,)


def test_nothing_is_kept_for_a_gradient_that_nobody_wants():
    hidden, weight, bias, targets = inputs()
    with torch.no_grad():
        assert head_nll(hidden, weight, bias, targets).grad_fn is None
