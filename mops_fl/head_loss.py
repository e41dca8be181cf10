"""The loss of a frozen head, without ever holding all its logits.

Vocabularies are large: the logits of 800 positions over 49,152 tokens are 157 MB in float32, and cross entropy with
its gradient holds three tensors of that size. Since the head is frozen, the gradient with respect to its input is
known as soon as the logits are, so both are computed chunk by chunk and the logits are dropped.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Positions per chunk: enough to keep a matrix product busy.
CHUNK = 256


def head_nll(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Negative log-likelihood, in nats, of a target under each position's logits.

    Args:
        hidden: `(N, D)` input of the head.
        weight: `(V, D)` of the head, frozen.
        bias: `(V,)` of the head, frozen, or None.
        targets: `(N,)` token ids.

    Returns:
        `(N,)` float32, differentiable once with respect to `hidden`.
    """
    nll: Tensor = _HeadNll.apply(hidden, weight, bias, targets)  # type: ignore[no-untyped-call]
    return nll


class _HeadNll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:  # noqa: ANN401
        differentiable = ctx.needs_input_grad[0]
        losses, gradients = [], []
        for h, target in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True):
            logits = F.linear(h, weight, bias).float()
            largest, target_logit = logits.amax(1), logits.gather(1, target[:, None])[:, 0]
            probabilities = logits.softmax(1)
            # The largest probability is exp(largest - log_normaliser).
            log_normaliser = largest - probabilities.amax(1).log()
            losses.append(log_normaliser - target_logit)
            if differentiable:
                probabilities[torch.arange(len(h), device=h.device), target] -= 1
                gradients.append(probabilities.to(weight.dtype) @ weight)
        if differentiable:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, grad_nll: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        (gradient,) = ctx.saved_tensors
        return (grad_nll[:, None] * gradient).to(gradient.dtype), None, None, None
