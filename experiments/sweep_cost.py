"""What training cost each method of a sweep until it was as good as the first method ends."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

from experiments.measurements import series
from experiments.run_folder import ALL_TASKS, RunFolder
from experiments.wording import NOTHING, bytes_text, count_text, seconds_text

COLUMNS = ("client steps", "training time", "sent by the clients", "sent to the clients")


class Cost(NamedTuple):
    """What a run had spent by the end of a round; None where its folder does not tell."""

    client_steps: float
    train_seconds: float | None
    bytes_up: float | None
    bytes_down: float | None


def final_perplexity(run: RunFolder) -> float | None:
    """Over all tasks after training; None where it is no finite number, since the run diverged."""
    value = run.results()["perplexity"][ALL_TASKS]
    return None if value is None else float(value)


def cost_cells(first: Sequence[RunFolder], runs: Sequence[RunFolder]) -> list[str]:
    """A method's cost of reaching the first one's final perplexity, as text for `COLUMNS`.

    Args:
        first: the first method's runs, whose final perplexity is the target of the same seed's run.
        runs: the method's.

    Returns:
        Medians over the seeds that reach it, of those that have a target.
    """
    targets = {run.config["seed"]: final_perplexity(run) for run in first}
    costs = [cost_to_reach(run, target) for run in runs if (target := targets.get(run.config["seed"])) is not None]
    reached = [cost for cost in costs if cost]
    if not reached:
        return ["not reached" if costs else NOTHING, NOTHING, NOTHING, NOTHING]
    steps, seconds, up, down = (_median(values) for values in zip(*reached, strict=True))
    note = f" ({len(reached)} of {len(costs)} seeds)" if len(reached) < len(costs) else ""
    return [count_text(steps) + note, seconds_text(seconds), bytes_text(up), bytes_text(down)]


def cost_to_reach(run: RunFolder, target: float) -> Cost | None:
    """What a run had spent when its test perplexity was first at or below a target; None if it never was.

    Time is that of training, without pretraining and measurements. Time and bytes are the sums of what the run logged
    in each round; of a run that logged none, the share of its total that the rounds are of all rounds.
    """
    metrics = run.metrics()
    curve = series(metrics, "perplexity")
    reached = next((point for point in curve if point.round and point.value <= target), None)
    if reached is None:
        return None
    return Cost(
        reached.client_steps,
        _spent(run, metrics, "round-seconds", "train_seconds", reached.round),
        _spent(run, metrics, "bytes-up", "bytes_up", reached.round),
        _spent(run, metrics, "bytes-down", "bytes_down", reached.round),
    )


def steps_note(finished: Mapping[tuple[str, str], Sequence[RunFolder]]) -> list[str]:
    """A sentence on who took how many client steps, if not all runs took as many."""
    steps = {cell: sorted({run.results()["client_steps"] for run in runs}) for cell, runs in finished.items() if runs}
    texts = {cell: "-".join(count_text(of[place]) for place in sorted({0, len(of) - 1})) for cell, of in steps.items()}
    if len({*texts.values()}) < 2:
        return []
    usual = max(texts.values(), key=list(texts.values()).count)
    others = [f"{row}, {method}: {text}" for (row, method), text in texts.items() if text != usual]
    return [f"Client steps differ: {usual}, but {'; '.join(others)}.", ""]


def _spent(
    run: RunFolder, metrics: Sequence[Mapping[str, Any]], metric: str, total: str, last_round: int
) -> float | None:
    logged = {point.round: point.value for point in series(metrics, metric, split="train")}
    rounds = range(1, last_round + 1)
    if logged.keys() >= set(rounds):
        return sum(logged[number] for number in rounds)
    results = run.results()
    return results[total] * last_round / results["rounds"] if total in results else None


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None
