"""Local training: the clients of a cohort side by side, a batch of rows each, on one frozen model.

Everything below and above the prompts is frozen and shared, so the rows of all clients go through the model
together. Each client has its own prompts and gate (leading dimension `J` of every parameter), its own rows and its
own random generator; Adam works element by element, so its state is each client's own as well. The loss is the sum
over clients of the client's mean, which gives each one exactly the gradient it would have alone.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mops_fl.adapter import Adapter, AdapterState
from mops_fl.config import TrainConfig
from mops_fl.encoding import EncodedRow
from mops_fl.errors import InputError
from mops_fl.model import AdaptableModel, RowLosses
from mops_fl.payload import TrainResult

logger = logging.getLogger(__name__)


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
    model: AdaptableModel, state: AdapterState, clients: Sequence[ClientRows], config: TrainConfig
) -> list[TrainResult]:
    """Train `J` clients from the same global adapter; in halves where they do not fit into memory together.

    Args:
        model: the frozen model.
        state: the global adapter each client starts from.
        clients: the `J` clients.
        config: rate, steps and batch size, the same for all.

    Returns:
        One result per client, in order.

    Raises:
        InputError: not even one client fits into memory.
    """
    try:
        return _train_together(model, state, clients, config)
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        if len(clients) == 1:
            raise InputError(
                "One client's batch does not fit into memory; lower `batch-size` or `max-length`, or take a smaller "
                f"or quantised backbone ({error})."
            ) from error
    # Behind the handler, which keeps the failed attempt's tensors alive.
    logger.warning("%d clients do not fit into memory together; they are trained in halves", len(clients))
    torch.cuda.empty_cache()
    half = len(clients) // 2
    parts = (clients[:half], clients[half:])
    return [result for part in parts for result in train_cohort(model, state, part, config)]


def _train_together(
    model: AdaptableModel, state: AdapterState, clients: Sequence[ClientRows], config: TrainConfig
) -> list[TrainResult]:
    started = time.monotonic()
    # Who stops first stands last, so that those still training are always the first ones.
    order = sorted(range(len(clients)), key=lambda j: -config.num_steps(len(clients[j].rows)))
    num_steps = [config.num_steps(len(clients[j].rows)) for j in order]
    batches = [draw_rows(clients[j], config.batch_size) for j in order]
    adapter: Adapter = model.adapter([state] * len(clients))
    optimizer: torch.optim.Optimizer = torch.optim.Adam(parameter_groups(adapter, config))
    states: list[AdapterState] = []
    tallies: list[list[Tensor]] = [[] for _ in order]
    for step in range(num_steps[0]):
        active = sum(steps > step for steps in num_steps)
        if active < adapter.num_adapters:
            states = adapter.states()[active:] + states
            adapter, optimizer = _first(active, model, adapter, optimizer, config)
        losses = model.losses(adapter, [row for rows in batches[:active] for row in next(rows)])
        optimizer.zero_grad()
        client_losses(losses, active).sum().backward()
        optimizer.step()
        for tally, of_step in zip(tallies, _tally(losses, active), strict=False):
            tally.append(of_step)
    states = adapter.states() + states
    totals = [torch.stack(tally).sum(0).tolist() for tally in tallies]
    seconds = (time.monotonic() - started) / len(clients)
    results = {
        j: TrainResult(
            adapter={name: trained[name].numpy() for name in state},
            num_examples=len(clients[j].rows),
            num_steps=steps,
            num_tokens=round(num_tokens),
            loss_sum=loss_sum,
            seconds=seconds,
            gate_mass=tuple(gate_mass),
        )
        for j, trained, steps, (loss_sum, num_tokens, *gate_mass) in zip(order, states, num_steps, totals, strict=True)
    }
    return [results[j] for j in range(len(clients))]


def parameter_groups(adapter: Adapter, config: TrainConfig) -> list[dict[str, Any]]:
    """What Adam trains at which rate: a gate has its own."""
    rates = {"gate": config.lr * config.gate_lr_factor}
    return [
        {"params": [parameter], "lr": rates.get(name.partition(".")[0], config.lr)}
        for name, parameter in adapter.trainable().items()
    ]


def client_losses(losses: RowLosses, num_clients: int) -> Tensor:
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


def _first(
    active: int, model: AdaptableModel, adapter: Adapter, optimizer: torch.optim.Optimizer, config: TrainConfig
) -> tuple[Adapter, torch.optim.Optimizer]:
    """The first `active` adapters, and an optimiser that goes on with them where the given one is."""
    kept: Adapter = model.adapter(adapter.states()[:active])
    continued = torch.optim.Adam(parameter_groups(kept, config))
    for old, new in zip(adapter.parameters(), kept.parameters(), strict=True):
        moments = optimizer.state[old]
        continued.state[new] = {name: value[:active] if value.dim() else value for name, value in moments.items()}
    return kept, continued


@torch.no_grad()
def _tally(losses: RowLosses, num_clients: int) -> Tensor:
    """`(J, 2 + E)`: loss sum, token count and gate mass of each client in this step, float64."""
    columns = [losses.loss_sum[:, None], losses.num_tokens[:, None]]
    if losses.scores is not None:
        columns.append(losses.scores)
    per_row = torch.cat(columns, 1).double()
    return per_row.reshape(num_clients, -1, per_row.shape[1]).sum(1)


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)
