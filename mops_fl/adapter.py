"""What is trained and sent: soft prompts in groups (experts), and the gate that weighs the groups per input.

An `Adapter` holds `J` adapters side by side, one per client of a cohort, so that one pass over the frozen model
trains them all; a single adapter is `J = 1`. A state is what travels: name -> tensor without the leading `J`.

Letters: `J` adapters, `R` rows, `B = R / J` rows of each adapter, `E` experts, `P` prompts per expert, `K = E * P`,
`D` hidden size, `G` gate width. Rows stand owner by owner: the first `B` belong to adapter 0, and so on.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mops_fl.config import AdapterConfig

AdapterState = dict[str, Tensor]


class Gate(nn.Module):
    """`g = softmax(W2 relu(W1 x))`, the smart gate of the paper (Section 3.2), `J` of them.

    Deviation: `x` is the pooled hidden state divided by its root mean square. Residual streams carry a few
    features hundreds of times larger than the rest, at which the softmax saturates before it has learnt anything.
    """

    def __init__(self, states: Sequence[AdapterState]) -> None:
        super().__init__()
        self.w1 = _stacked(states, "gate.w1")  # (J, G, D)
        self.b1 = _stacked(states, "gate.b1")  # (J, G)
        self.w2 = _stacked(states, "gate.w2")  # (J, E, G)
        self.b2 = _stacked(states, "gate.b2")  # (J, E)

    def forward(self, pooled: Tensor) -> Tensor:
        """Logits of the experts.

        Args:
            pooled: `(R, D)` float32 mean hidden state of each row at the injection layer.

        Returns:
            `(R, E)`; their softmax is the gate's scores.
        """
        logits: Tensor = self.hidden(pooled) @ self.w2.mT + self.b2[:, None]  # (J, B, E)
        return logits.flatten(0, 1)

    def hidden(self, pooled: Tensor) -> Tensor:
        """The hidden layer `(J, B, G)` of rows `(R, D)`."""
        x = nn.functional.rms_norm(pooled, pooled.shape[-1:]).unflatten(0, (len(self.w1), -1))  # (J, B, D)
        hidden: Tensor = (x @ self.w1.mT + self.b1[:, None]).relu()
        return hidden


class Adapter(nn.Module):
    """`J` adapters of one method: parameters whose leading dimension is `J`."""

    @property
    def num_adapters(self) -> int:
        """`J`."""
        return len(next(iter(self.parameters())))

    def trainable(self) -> dict[str, nn.Parameter]:
        """Name in a state -> parameter."""
        return dict(self.named_parameters())

    def states(self) -> list[AdapterState]:
        """The `J` states, detached copies on the CPU."""
        parameters = {name: p.detach().cpu() for name, p in self.trainable().items()}
        return [{name: p[j].clone() for name, p in parameters.items()} for j in range(self.num_adapters)]


class PromptAdapter(Adapter):
    """`J` sets of expert prompts, with or without gates.

    Attributes:
        prompts: `(J, K, D)` float32.
        gate: the gates, or None for plain prompt tuning.
    """

    def __init__(self, states: Sequence[AdapterState]) -> None:
        """Stack states of equal shapes; a state that carries a gate makes a gated adapter."""
        super().__init__()
        self.prompts = _stacked(states, "prompts")
        self.gate = Gate(states) if "gate.w1" in states[0] else None

    def scores(self, pooled: Tensor, temperature: float = 1.0) -> Tensor | None:
        """The gate's scores `(R, E)` of rows pooled to `(R, D)`, each summing to one; None without a gate."""
        return None if self.gate is None else (self.gate(pooled) / temperature).softmax(-1)

    def prompts_of_rows(self, num_rows: int) -> Tensor:
        """The prompts `(R, K, D)` that belong before each of `R` rows."""
        return self.prompts.repeat_interleave(num_rows // len(self.prompts), dim=0)


def initial_state(
    config: AdapterConfig, prompts: Tensor, generator: torch.Generator, gate_input_size: int | None = None
) -> AdapterState:
    """A fresh adapter around given initial prompts `(K, D)`; gate weights are drawn, their output starts near flat.

    `gate_input_size` is for a gate that looks at something else than hidden states `(D,)`.
    """
    state = {"prompts": prompts.float().clone()}
    if config.gated and config.routing == "gate":
        input_size, width, experts = gate_input_size or prompts.shape[1], config.gate_width, config.num_experts
        state["gate.w1"] = torch.randn(width, input_size, generator=generator) / math.sqrt(input_size)
        state["gate.b1"] = torch.zeros(width)
        state["gate.w2"] = torch.randn(experts, width, generator=generator) * 0.1 / math.sqrt(width)
        state["gate.b2"] = torch.zeros(experts)
    return state


def _stacked(states: Sequence[AdapterState], name: str) -> nn.Parameter:
    return nn.Parameter(torch.stack([state[name].float() for state in states]))
