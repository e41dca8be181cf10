"""What a run measured: curves from the lines of its metrics, and the perplexities that its summary tells."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from experiments.run_folder import ALL_TASKS


class Point(NamedTuple):
    """One value of a metric; NaN where the run measured no finite one."""

    round: int
    client_steps: int
    value: float


class PerplexityRow(NamedTuple):
    """One task's test perplexity: bare model, before round 1, after training; None if not measured."""

    task: str
    bare: float | None
    before: float | None
    after: float | None

    @property
    def change_percent(self) -> float | None:
        """Change from before to after; negative is better."""
        if self.before is None or self.after is None:
            return None
        return 100 * (self.after - self.before) / self.before


def series(
    metrics: Sequence[Mapping[str, Any]], metric: str, task: str = ALL_TASKS, split: str = "test"
) -> list[Point]:
    """One metric over the rounds, in order.

    Args:
        metrics: what ``RunFolder.metrics`` returns.
        metric: its name, such as "perplexity".
        task: a task's name, or "all".
        split: "train" or "test".
    """
    points = {}
    for entry in metrics:
        if (entry["metric"], entry["task"], entry["split"]) == (metric, task, split):
            value = math.nan if entry["value"] is None else entry["value"]
            points[entry["round"]] = Point(entry["round"], entry["client-steps"], value)
    return [points[number] for number in sorted(points)]


def task_names(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    """The tasks whose test perplexity was measured, in the order first written, without "all"."""
    measured = (m["task"] for m in metrics if m["metric"] == "perplexity" and m["split"] == "test")
    return [task for task in dict.fromkeys(measured) if task != ALL_TASKS]


def perplexity_rows(summary: Mapping[str, Any]) -> list[PerplexityRow]:
    """A row for each task in the order of the summary, and "all" at the end."""
    stages = [summary.get(name) or {} for name in ("perplexity_bare", "perplexity_before", "perplexity")]
    measured = dict.fromkeys(task for stage in stages for task in stage)
    tasks = [task for task in measured if task != ALL_TASKS] + [task for task in measured if task == ALL_TASKS]
    return [PerplexityRow(task, *(_finite(stage.get(task)) for stage in stages)) for task in tasks]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
