"""Local training: the clients of a cohort side by side, a batch of rows each, on one frozen model.

Everything below and above the prompts is frozen and shared, so the rows of all clients go through the model
together. Each client has its own prompts and gate (leading dimension `J` of every parameter), its own rows and its
own random generator; Adam works element by element, so its state is each client's own as well. The loss is the sum
over clients of the client's mean, which gives each one exactly the gradient it would have alone.
"""

import collections
import itertools
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
from mops_fl.losses import RowLosses
from mops_fl.model import AdaptableModel
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
                "One client's batch does not fit into memory; lower `batch-size`, `max-length` or `cache-megabytes`, "
                f"or take a smaller or quantised backbone ({error})."
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
    training = Training(model, state, clients, config)
    training.advance(config.local_steps)
    return training.results()


class Training:
    """The clients of a cohort in training, all from the same adapter; can be stopped and looked at between steps."""

    def __init__(
        self, model: AdaptableModel, state: AdapterState, clients: Sequence[ClientRows], config: TrainConfig
    ) -> None:
        """Nothing is trained yet; arguments as for `train_cohort`."""
        # Who stops first stands last, so that those still training are always the first ones.
        self._order = sorted(range(len(clients)), key=lambda j: -config.num_steps(len(clients[j].rows)))
        self._clients = [clients[j] for j in self._order]
        self._last_steps = [config.num_steps(len(client.rows)) for client in self._clients]
        self._batches = [draw_rows(client, config.batch_size) for client in self._clients]
        self._model = model
        self._names = list(state)  # a reply has the order of the request
        self._config = config
        self._adapter: Adapter = model.adapter([state] * len(clients))
        self._optimizer: torch.optim.Optimizer = torch.optim.Adam(parameter_groups(self._adapter, config))
        self._finished: list[AdapterState] = []
        self._tallies: list[list[Tensor]] = [[] for _ in clients]
        self._steps_done = 0
        self._seconds = 0.0

    def advance(self, num_steps: int) -> None:
        """So many more steps of each client, fewer of one whose last step comes earlier."""
        began = time.monotonic()
        steps = range(self._steps_done, min(self._steps_done + num_steps, self._last_steps[0]))
        self._steps_done = steps.stop
        for step in steps:
            active = sum(last > step for last in self._last_steps)
            if active < self._adapter.num_adapters:
                self._drop_out(active)
            losses = self._model.losses(self._adapter, [row for rows in self._batches[:active] for row in next(rows)])
            self._optimizer.zero_grad()
            client_losses(losses, active).sum().backward()
            self._optimizer.step()
            for tally, of_step in zip(self._tallies[:active], _tally(losses, active), strict=True):
                tally.append(of_step)
            del losses  # bitsandbytes keeps inputs on the graph, which would stay through the next forward pass
        self._seconds += time.monotonic() - began

    def optimizer_state(self) -> AdapterState:
        """Adam's moments and step count of each parameter, as `parameter/moment`, on the CPU."""
        state = {name: self._optimizer.state[parameter] for name, parameter in self._adapter.trainable().items()}
        return {f"{name}/{moment}": value.cpu() for name, of in state.items() for moment, value in of.items()}

    def go_on(self, steps_done: int, optimizer_state: AdapterState) -> None:
        """Take up a training that was stopped; its adapter is the one that this one was given.

        Args:
            steps_done: steps of each client before the stop; their rows are passed over.
            optimizer_state: what `optimizer_state` gave then.
        """
        for rows in self._batches:
            collections.deque(itertools.islice(rows, steps_done), maxlen=0)
        self._steps_done = steps_done
        parameters = self._adapter.trainable()
        for key, value in optimizer_state.items():
            name, _, moment = key.rpartition("/")
            of_parameter = value.dim() > 0  # Adam's count of steps stays on the CPU
            self._optimizer.state[parameters[name]][moment] = (
                value.to(parameters[name].device) if of_parameter else value
            )

    def results(self) -> list[TrainResult]:
        """One result per client, in the order they were given; sums are over the steps since the last call."""
        states = self._adapter.states() + self._finished
        results = {}
        for j, client, state, tally in zip(self._order, self._clients, states, self._tallies, strict=True):
            loss_sum, num_tokens, *gate_mass = torch.stack(tally).sum(0).tolist()
            results[j] = TrainResult(
                adapter={name: state[name].numpy() for name in self._names},
                num_examples=len(client.rows),
                num_steps=len(tally),
                num_tokens=round(num_tokens),
                loss_sum=loss_sum,
                seconds=self._seconds / len(self._clients),
                gate_mass=tuple(gate_mass),
            )
        self._tallies = [[] for _ in self._clients]
        self._seconds = 0.0
        return [results[j] for j in range(len(results))]

    def _drop_out(self, active: int) -> None:
        """Go on with the first `active` clients, each where its optimiser is."""
        states = self._adapter.states()
        kept: Adapter = self._model.adapter(states[:active])
        optimizer = torch.optim.Adam(parameter_groups(kept, self._config))
        for old, new in zip(self._adapter.parameters(), kept.parameters(), strict=True):
            moments = self._optimizer.state[old]
            optimizer.state[new] = {name: value[:active] if value.dim() else value for name, value in moments.items()}
        self._finished = states[active:] + self._finished
        self._adapter, self._optimizer = kept, optimizer


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
