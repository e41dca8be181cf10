"""Perplexity per task, from sums and counts, and how the gate treated each task."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Protocol, TypeVar

import numpy as np
import torch

from mops_fl.adapter import Adapter
from mops_fl.backbone import Backbone
from mops_fl.encoding import EncodedRow
from mops_fl.losses import RowLosses, plain_losses
from mops_fl.model import AdaptableModel
from mops_fl.payload import EvaluateResult

# Positions of one packed forward pass: enough to keep the matrix products busy, little enough for a laptop.
BATCH_TOKENS = 2048

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class Spread(Protocol):
    """The built-in `map`, or one that works on several items at once."""

    def __call__(self, task: Callable[[Item], Answer], items: Iterable[Item], /) -> Iterable[Answer]:
        """The answers, in the order of the items."""
        ...


@dataclass(frozen=True)
class Evaluation:
    """Sums over the rows of each task.

    Attributes:
        tasks: task names.
        loss_sum: nats, per task.
        num_tokens: tokens that carried loss, per task.
        gate: mean gate score, one list of `E` per task; None without a gate.
    """

    tasks: tuple[str, ...]
    loss_sum: tuple[float, ...]
    num_tokens: tuple[int, ...]
    gate: tuple[tuple[float, ...], ...] | None

    def perplexity(self) -> dict[str, float]:
        """`exp(loss_sum / num_tokens)` for `all` and for each task that has rows; infinite where no float holds it.

        `all` pools the tokens of every task, so that a task weighs as much as it has tokens that carry loss: one with
        long answers dominates.
        """
        figures = {"all": _exp(sum(self.loss_sum) / sum(self.num_tokens))}
        for task, loss_sum, num_tokens in zip(self.tasks, self.loss_sum, self.num_tokens, strict=True):
            if num_tokens:
                figures[task] = _exp(loss_sum / num_tokens)
        return figures

    def sums(self, tasks: Sequence[str], rows_per_task: Mapping[str, int]) -> EvaluateResult:
        """What adds up with other clients' measurements, for `tasks`, some of which may not be among this one's."""
        nothing = (0.0, 0, (0.0,) * len(self.gate[0]) if self.gate else ())
        gate = self.gate or [()] * len(self.tasks)
        of_task = dict(zip(self.tasks, zip(self.loss_sum, self.num_tokens, gate, strict=True), strict=True))
        chosen = [of_task.get(task, nothing) for task in tasks]
        num_rows = tuple(rows_per_task.get(task, 0) for task in tasks)
        return EvaluateResult(
            loss_sum=tuple(loss_sum for loss_sum, _, _ in chosen),
            num_tokens=tuple(num_tokens for _, num_tokens, _ in chosen),
            num_rows=num_rows,
            gate_mass=tuple(
                count * score for (*_, scores), count in zip(chosen, num_rows, strict=True) for score in scores
            ),
        )

    @classmethod
    def of_sums(cls, tasks: tuple[str, ...], results: Sequence[EvaluateResult]) -> "Evaluation":
        """One measurement of what several clients measured."""
        loss_sum, num_tokens, num_rows, gate_mass = (
            np.sum([getattr(result, field.name) for result in results], axis=0) for field in fields(EvaluateResult)
        )
        scores = gate_mass.reshape(len(tasks), -1) / np.maximum(num_rows, 1)[:, None]
        gate = tuple(map(tuple, scores.tolist())) if scores.size else None
        return cls(tasks, tuple(loss_sum.tolist()), tuple(map(int, num_tokens)), gate)


def evaluate(
    model: AdaptableModel,
    adapter: Adapter,
    rows: Sequence[EncodedRow],
    tasks: tuple[str, ...],
    spread: Spread = map,
) -> Evaluation:
    """Measure one adapter (`J = 1`) on rows."""
    return _evaluate(lambda batch: model.losses(adapter, batch), rows, tasks, spread)


def evaluate_bare(
    backbone: Backbone, rows: Sequence[EncodedRow], tasks: tuple[str, ...], spread: Spread = map
) -> Evaluation:
    """Measure the backbone without any prompts."""
    no_prompts = torch.zeros(0, backbone.hidden_size)
    return _evaluate(lambda batch: plain_losses(backbone, no_prompts, batch), rows, tasks, spread)


def by_length(rows: Iterable[EncodedRow]) -> list[EncodedRow]:
    """Short rows first: those of a packed batch then fill it alike, whatever their tasks."""
    return sorted(rows, key=lambda row: (len(row.token_ids), row.row_id))


def packed_batches(rows: Sequence[EncodedRow]) -> Iterator[list[EncodedRow]]:
    """Rows in order, in batches of at most `BATCH_TOKENS` tokens (a single longer row goes alone)."""
    batch: list[EncodedRow] = []
    for row in rows:
        if batch and sum(len(member.token_ids) for member in [*batch, row]) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _exp(nats: float) -> float:
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


def _evaluate(
    losses: Callable[[list[EncodedRow]], RowLosses],
    rows: Sequence[EncodedRow],
    tasks: tuple[str, ...],
    spread: Spread,
) -> Evaluation:
    # The decorated function, since a thread's grad mode is its own.
    results = list(spread(torch.no_grad()(losses), packed_batches(rows)))
    labels = torch.tensor([row.task for row in rows])

    def per_task(values: torch.Tensor) -> torch.Tensor:
        sums = torch.zeros(len(tasks), *values.shape[1:], dtype=torch.float64)
        return sums.index_add(0, labels, values.double().cpu())

    gate = None
    scores_per_batch = [result.scores for result in results if result.scores is not None]
    if scores_per_batch:
        scores = torch.cat(scores_per_batch)
        num_rows = per_task(torch.ones(len(rows), 1)).clamp(min=1)
        gate = tuple(tuple(task) for task in (per_task(scores) / num_rows).tolist())
    return Evaluation(
        tasks=tasks,
        loss_sum=tuple(per_task(torch.cat([result.loss_sum for result in results])).tolist()),
        num_tokens=tuple(int(n) for n in per_task(torch.cat([result.num_tokens for result in results])).tolist()),
        gate=gate,
    )
