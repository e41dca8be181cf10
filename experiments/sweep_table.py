"""What a sweep came to: perplexity beside the paper's, gains, what reaching the first method cost, answers, curves."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from experiments.compare import common_gain_percent
from experiments.durable import writing
from experiments.fairness import measured_differences
from experiments.run_folder import ALL_TASKS, RunFolder
from experiments.sweep_cost import COLUMNS, cost_cells, final_perplexity, steps_note
from experiments.sweep_plot import plot_sweep
from experiments.sweep_scores import scores_markdown
from experiments.wording import NOTHING, markdown_table, percent_text, perplexity_text
from mops_fl.errors import InputError

if TYPE_CHECKING:
    from experiments.sweep import Sweep

DIVERGED = "diverged"

# (row, method) -> complete runs, a seed each.
Finished = Mapping[tuple[str, str], Sequence[RunFolder]]


def write_sweep_report(sweep: Sweep) -> str:
    """Write a sweep's tables and curves beside its run folders, from those that are complete.

    Returns:
        The text of the tables, Markdown.

    Raises:
        InputError: the folder cannot be written, or a run folder is another run's or corrupt.
    """
    finished = {
        (row, method): [run for one in sweep.of(row, method) if (run := one.finished())]
        for row in sweep.rows
        for method in sweep.methods
    }
    text = sweep_markdown(sweep, finished)
    with writing(sweep.output, "choose another --output", InputError):
        sweep.output.mkdir(parents=True, exist_ok=True)
        if plot_sweep(finished, sweep.output / f"{sweep.name}.png"):
            text += f"\n![Test perplexity over client steps]({sweep.name}.png)\n"
        (sweep.output / f"{sweep.name}.md").write_text(text, encoding="utf-8")
    return text


def sweep_markdown(sweep: Sweep, finished: Finished) -> str:
    """The tables of a sweep, given the complete runs of each row and method."""
    lines = [f"## {sweep.title}", "", _perplexity_note(sweep), "", *_warnings(sweep, finished)]
    lines += [*_perplexity_table(sweep, finished), "", *steps_note(finished), *_cost_table(sweep, finished)]
    lines += scores_markdown(finished, sweep.num_seeds)
    return "\n".join(lines) + "\n"


def _perplexity_table(sweep: Sweep, finished: Finished) -> list[str]:
    first, *others = sweep.methods
    gains = [f"{method} against {first}" for method in others]
    rows = []
    for row in sweep.rows:
        runs = {method: finished[row, method] for method in sweep.methods}
        cells = [_cell(runs[method], sweep.num_seeds, sweep.paper.get(row, {}).get(method)) for method in sweep.methods]
        bare = next((run.results()["perplexity_bare"][ALL_TASKS] for of in runs.values() for run in of), None)
        finals = {method: _finals(runs[method]) for method in sweep.methods}
        gain = [percent_text(common_gain_percent(finals[first], finals[method])) for method in others]
        rows.append([row, perplexity_text(bare), *cells, *gain])
    note = f"Against {first}: gain of the mean over the seeds that both have; positive where the perplexity is lower."
    table = markdown_table(["", "bare model", *sweep.methods, *gains], rows)
    return [table, "", note] if others else [table]


def _cost_table(sweep: Sweep, finished: Finished) -> list[str]:
    first = sweep.methods[0]
    rows = [[row, method, *cost_cells(finished[row, first], runs)] for (row, method), runs in finished.items() if runs]
    return [
        f"Cost of reaching the final perplexity of the same seed's {first} (first measurement at or below it, median "
        "over the seeds that reach it; the time is that of training alone):",
        "",
        markdown_table(["", "method", *COLUMNS], rows),
    ]


def _perplexity_note(sweep: Sweep) -> str:
    spread = ", mean ± standard deviation over seeds" if sweep.num_seeds > 1 else ", one seed"
    papers = "; in brackets the paper's, of LLaMA-7B after the paper's own number of steps" if sweep.paper else ""
    return f"Test perplexity after training{spread}{papers}."


def _warnings(sweep: Sweep, finished: Finished) -> list[str]:
    """What is said before the tables of that on which the runs were measured, if anything."""
    runs_of = {row: [run for method in sweep.methods for run in finished[row, method]] for row in sweep.rows}
    rows_of: dict[str, list[str]] = {}
    for row, runs in runs_of.items():
        if differing := measured_differences(runs):
            rows_of.setdefault("; ".join(differing), []).append(row)
    sampled = any(run.results().get("data_is_sample") for runs in runs_of.values() for run in runs)
    lines = [
        f"> Not a fair comparison: the runs of {', '.join(rows)} differ in: {differing}."
        for differing, rows in rows_of.items()
    ]
    lines += ["> Some or all runs are on the bundled sample, which is no real data set."] if sampled else []
    return [part for line in lines for part in (line, "")]


def _cell(runs: Sequence[RunFolder], num_seeds: int, paper: float | None) -> str:
    """Mean and spread of the seeds that did not diverge, the paper's figure, and how many seeds these are."""
    values = _finals(runs).values()
    diverged = len(runs) - len(values)
    text = perplexity_text(statistics.fmean(values)) if values else DIVERGED if runs else NOTHING
    if len(values) > 1:
        text += f" ± {perplexity_text(statistics.stdev(values))}"
    if paper is not None:
        text += f" ({paper})"
    if values and diverged:
        text += f" ({len(values)} of {num_seeds} seeds, {diverged} {DIVERGED})"
    elif 0 < len(runs) < num_seeds:
        text += f" ({len(runs)} of {num_seeds} seeds)"
    return text


def _finals(runs: Sequence[RunFolder]) -> dict[object, float]:
    """Seed -> final perplexity, without the runs that diverged."""
    finals = {run.config["seed"]: final_perplexity(run) for run in runs}
    return {seed: value for seed, value in finals.items() if value is not None}
