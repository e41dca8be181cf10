"""Few-shot growth: one more expert for a new task, while every other expert and the rest of the gate stay as they are.

    1. The new expert starts as a copy of the one that the gate gives the new task's questions to.
    2. Its row in the gate's last layer is fitted to tell those questions from the old tasks'. With everything else
       fixed this is a logistic regression on the gate's hidden layer: convex, and no response is needed.
    3. Its prompts learn from the few labelled rows.

Letters: `E` experts before, `P` prompts of an expert, `K = E * P`, `R` rows, `G` gate width.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mops_fl.adapter import AdapterState, Gate
from mops_fl.config import AdapterConfig
from mops_fl.encoding import EncodedRow
from mops_fl.model import PromptedModel
from mops_fl.pretraining import pooled_questions

# On the gate's new weights: few rows can nearly always be told apart, and the weights would grow for ever.
WEIGHT_PENALTY = 1e-3


def grow(
    model: PromptedModel,
    grown_model: PromptedModel,
    state: AdapterState,
    few: Sequence[EncodedRow],
    old: Sequence[EncodedRow],
    config: AdapterConfig,
    *,
    num_old_tasks: int,
    num_steps: int,
    lr: float,
    generator: torch.Generator,
) -> AdapterState:
    """The adapter with one more expert, grown in the three steps.

    Args:
        model: the frozen model as it was, with `E` experts.
        grown_model: the same one with `E + 1`.
        state: a gated adapter of `model`.
        few: labelled rows of the new task.
        old: rows of the old tasks; only their questions are read.
        config: of `state`.
        num_old_tasks: tasks that `old` are of.
        num_steps: steps on the new expert's prompts.
        lr: their Adam learning rate.
        generator: draws the row of each step.
    """
    pooled_few, pooled_old = (pooled_questions(model, rows).cpu() for rows in (few, old))
    of_each, temperature = config.prompts_per_expert, config.gate_temperature
    grown = add_expert(state, pooled_few, of_each, temperature)
    is_new = torch.arange(len(few) + len(old)) < len(few)
    pooled = torch.cat([pooled_few, pooled_old])
    grown = fit_gate_row(grown, pooled, is_new, temperature, num_old_tasks=num_old_tasks)
    return train_last_expert(grown_model, grown, few, of_each, num_steps=num_steps, lr=lr, generator=generator)


def add_expert(state: AdapterState, pooled: Tensor, prompts_per_expert: int, temperature: float) -> AdapterState:
    """The adapter with expert `E`: a copy of the one that rows of the new task mostly go to, its gate row still zero.

    Args:
        state: a gated adapter.
        pooled: `(R, D)` gate inputs of rows of the new task.
        prompts_per_expert: `P`.
        temperature: the gate's logits are divided by it.
    """
    scores = (Gate([state])(pooled) / temperature).softmax(-1).mean(0)
    chosen = state["prompts"].split(prompts_per_expert)[int(scores.argmax())]
    return {
        **state,
        "prompts": torch.cat([state["prompts"], chosen]),
        "gate.w2": F.pad(state["gate.w2"], (0, 0, 0, 1)),
        "gate.b2": F.pad(state["gate.b2"], (0, 1)),
    }


def fit_gate_row(
    state: AdapterState, pooled: Tensor, is_new: Tensor, temperature: float, *, num_old_tasks: int
) -> AdapterState:
    """The adapter with the last expert's row of the gate fitted; nothing else in it changes.

    The last expert's share of the softmax is `sigmoid(z - logsumexp(others))`, with `z` linear in the hidden layer; all
    of them are logits divided by the temperature, so that the fit is the same at any.

    Args:
        state: from `add_expert`.
        pooled: `(R, D)` gate inputs of rows of the new task and of old ones.
        is_new: `(R,)` bool.
        temperature: the gate's logits are divided by it.
        num_old_tasks: tasks that the rows of old ones are of, however many experts these share.
    """
    with torch.no_grad():
        gate = Gate([state])
        others = (gate(pooled)[:, :-1] / temperature).logsumexp(1)  # (R,)
        hidden = gate.hidden(pooled)[0]  # (R, G)
    row = torch.zeros(hidden.shape[1], requires_grad=True)
    # Where new and old rows weigh alike; the penalty holds the weights only.
    bias = others.mean().detach().clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS([row, bias], max_iter=500, line_search_fn="strong_wolfe")
    # As if all tasks were equally frequent, one of them new.
    balance = is_new.float() / is_new.sum() + num_old_tasks * (~is_new).float() / (~is_new).sum()

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits = hidden @ row + bias - others
        wrong = F.binary_cross_entropy_with_logits(logits, is_new.float(), weight=balance, reduction="sum")
        total = wrong + WEIGHT_PENALTY * row.square().sum()
        total.backward()
        return total

    optimizer.step(loss)
    w2, b2 = state["gate.w2"].clone(), state["gate.b2"].clone()
    w2[-1], b2[-1] = temperature * row.detach(), temperature * bias.detach()
    return {**state, "gate.w2": w2, "gate.b2": b2}


def train_last_expert(
    model: PromptedModel,
    state: AdapterState,
    rows: Sequence[EncodedRow],
    prompts_per_expert: int,
    *,
    num_steps: int,
    lr: float,
    generator: torch.Generator,
) -> AdapterState:
    """The adapter after Adam on the last expert's prompts alone, one row a step; the rest is equal to the bit."""
    adapter = model.adapter([state])
    of_last = torch.zeros_like(adapter.prompts)
    of_last[:, -prompts_per_expert:] = 1
    adapter.prompts.register_hook(lambda gradient: gradient * of_last)  # Adam leaves what never had a gradient
    optimizer = torch.optim.Adam([adapter.prompts], lr=lr)
    for _ in range(num_steps):
        row = rows[int(torch.randint(len(rows), (), generator=generator))]
        losses = model.losses(adapter, [row])
        optimizer.zero_grad()
        (losses.loss_sum / losses.num_tokens).sum().backward()
        optimizer.step()
    return {**state, "prompts": adapter.states()[0]["prompts"]}
