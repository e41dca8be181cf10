"""Local training: the clients of a cohort side by side, a batch of rows each, on one frozen model.

Everything below and above the prompts is frozen and shared, so the rows of all clients go through the model
together. Each client has its own prompts and gate (leading dimension `J` of every parameter), its own rows and its
own random generator; Adam works element by element, so its state is each client's own as well. The loss is the sum
over clients of the client's mean, which gives each one exactly the gradient it would have alone.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mops_fl.adapter import Adapter, AdapterState
from mops_fl.config import TrainConfig
from mops_fl.encoding import EncodedRow
from mops_fl.model import PromptedModel, RowLosses
from mops_fl.payload import TrainResult


@dataclass(frozen=True)
class ClientRows:
    """A client of the cohort.

    Attributes:
        rows: its rows, at least one.
        seed: seeds the order in which it sees them.
    """

    rows: Sequence[EncodedRow]
    seed: tuple[int, ...]


def train_cohort(
    model: PromptedModel, state: AdapterState, clients: Sequence[ClientRows], config: TrainConfig
) -> list[TrainResult]:
    """Train `J` clients from the same global adapter.

    Args:
        model: the frozen model.
        state: the global adapter each client starts from.
        clients: the `J` clients.
        config: rate, steps and batch size, the same for all.

    Returns:
        One result per client, in order.
    """
    started = time.monotonic()
    adapter = Adapter([state] * len(clients)).to(model.backbone.device)
    optimizer = torch.optim.Adam(parameter_groups(adapter, config))
    orders = [draw_rows(client, config.batch_size) for client in clients]
    tallies = []
    for _ in range(config.local_steps):
        losses = model.losses(adapter, [row for order in orders for row in next(order)])
        optimizer.zero_grad()
        client_losses(losses, len(clients)).sum().backward()
        optimizer.step()
        tallies.append(_tally(losses, len(clients)))
    seconds = (time.monotonic() - started) / len(clients)
    totals = torch.stack(tallies).sum(0).tolist()
    return [
        TrainResult(
            adapter={name: trained[name].numpy() for name in state},
            num_examples=len(client.rows),
            num_steps=config.local_steps,
            num_tokens=round(num_tokens),
            loss_sum=loss_sum,
            seconds=seconds,
            gate_mass=tuple(gate_mass),
        )
        for trained, client, (loss_sum, num_tokens, *gate_mass) in zip(adapter.states(), clients, totals, strict=True)
    ]


def parameter_groups(adapter: Adapter, config: TrainConfig) -> list[dict[str, Any]]:
    """What Adam trains at which rate: the prompts, and the gate if there is one."""
    groups: list[dict[str, Any]] = [{"params": [adapter.prompts], "lr": config.lr}]
    if adapter.gate is not None:
        groups.append({"params": list(adapter.gate.parameters()), "lr": config.lr * config.gate_lr_factor})
    return groups


def client_losses(losses: RowLosses, num_clients: int) -> torch.Tensor:
    """`(J,)` the mean over each client's rows of the row's mean loss per token."""
    per_row = losses.loss_sum / losses.num_tokens
    return per_row.reshape(num_clients, -1).mean(1)


def draw_rows(client: ClientRows, batch_size: int) -> Iterator[list[EncodedRow]]:
    """Endless batches: pass after pass over the client's rows, each in a new order."""
    rng = np.random.default_rng(client.seed)
    waiting: list[int] = []
    while True:
        while len(waiting) < batch_size:
            waiting += rng.permutation(len(client.rows)).tolist()
        yield [client.rows[index] for index in waiting[:batch_size]]
        waiting = waiting[batch_size:]


@torch.no_grad()
def _tally(losses: RowLosses, num_clients: int) -> torch.Tensor:
    """`(J, 2 + E)`: loss sum, token count and gate mass of each client in this step, float64."""
    columns = [losses.loss_sum[:, None], losses.num_tokens[:, None]]
    if losses.scores is not None:
        columns.append(losses.scores)
    per_row = torch.cat(columns, 1).double()
    return per_row.reshape(num_clients, -1, per_row.shape[1]).sum(1).cpu()
