"""`mops-fl compare`: runs side by side as a table and a plot, with mean and spread over seeds."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from experiments.durable import writing
from experiments.fairness import unfair_differences
from experiments.measurements import perplexity_rows
from experiments.plots import REPEATED, identity, plot_comparison, run_labels
from experiments.run_folder import ALL_TASKS, RunFolder
from experiments.wording import (
    NOTHING,
    bytes_text,
    count_text,
    markdown_table,
    percent_text,
    perplexity_text,
    readable,
    seconds_text,
)
from mops_fl.errors import InputError

PLOT = "comparison.png"
TABLE = "comparison.md"
# "all" pools the tokens, so that tasks with long answers dominate; this is the geometric mean over the tasks.
TASKS_ALIKE = "each task alike"


class Block(NamedTuple):
    """Rows of a table that belong together; each starts with its label."""

    heading: str
    rows: list[list[str]]


class ComparisonTable(NamedTuple):
    """A table as text, ready for the terminal and for Markdown."""

    title: str
    columns: list[str]
    blocks: list[Block]


class SeedGroup(NamedTuple):
    """The runs of one method that differ in nothing but the seed."""

    label: str
    runs: list[RunFolder]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `compare`."""
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="run folders; gains are against the first")
    parser.add_argument(
        "--output",
        metavar="DIR",
        type=Path,
        help=f"where {PLOT} and {TABLE} go (default: beside the first run)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the comparison of `args.runs` and write it to the folder `args.output`.

    Returns:
        The exit code, 0.

    Raises:
        InputError: If fewer than two runs are named, one is no run folder or corrupt, or the output cannot be
            written.
    """
    if len(args.runs) < 2:
        raise InputError("`compare` needs at least two run folders; name another one.")
    runs = [RunFolder.open(path) for path in args.runs]
    tables, warning = comparison_tables(runs), fairness_warning(runs)
    console = Console()
    for table in map(_to_rich, tables):
        # Many runs are wider than the terminal: better broken lines than figures left out.
        width = max(console.width, console.measure(table).minimum)
        console.print(table, width=width, crop=False, no_wrap=False)
    if warning:
        console.print(warning, style="yellow", markup=False)
    written = write_comparison(runs, args.output or args.runs[0].resolve().parent)
    for path in written:
        console.print(f"written: {path}", markup=False, highlight=False, soft_wrap=True)
    return 0


def write_comparison(runs: Sequence[RunFolder], folder: Path) -> list[Path]:
    """Write comparison.md and, if any run evaluated anything, comparison.png into `folder`.

    Returns:
        The paths written.

    Raises:
        InputError: If the folder cannot be written.
    """
    plot, text = folder / PLOT, folder / TABLE
    warning = fairness_warning(runs)
    with writing(folder, "choose another --output", InputError):
        folder.mkdir(parents=True, exist_ok=True)
        plotted = plot_comparison(runs, plot)
        parts = [_to_markdown(table) for table in comparison_tables(runs)]
        parts += [f"> {warning}\n"] if warning else []
        parts += [f"![Test perplexity over client steps]({PLOT})\n"] if plotted else []
        text.write_text("\n".join(parts), encoding="utf-8")
    return [text, plot] if plotted else [text]


def comparison_tables(runs: Sequence[RunFolder]) -> list[ComparisonTable]:
    """The runs side by side and, if any were repeated with other seeds, the methods with mean and spread."""
    groups = seed_groups(runs)
    repeated = any(len(group.runs) > 1 for group in groups)
    return [_run_table(runs), _group_table(groups)] if repeated else [_run_table(runs)]


def seed_groups(runs: Sequence[RunFolder]) -> list[SeedGroup]:
    """The runs grouped by everything but the seed, in the order given; no two groups have the same label.

    Config keys that only one of two runs has do not tell them apart: other versions of the software know other keys.
    """
    groups: list[list[RunFolder]] = []
    for run in runs:
        same = [group for group in groups if all(_is_repetition(run, other) for other in group)]
        if same:
            same[0].append(run)
        else:
            groups.append([run])
    labels = run_labels([group[0] for group in groups], with_seed=False)
    return [SeedGroup(label, group) for label, group in zip(labels, groups, strict=True)]


def _is_repetition(run: RunFolder, other: RunFolder) -> bool:
    first, second = identity(run), identity(other)
    hashes = [one.results().get("data_sha256") for one in (run, other)]
    if None not in hashes:  # what was read says more than where it lay
        first["data-path"], second["data-path"] = hashes
    return all(first[key] == second[key] for key in first.keys() & second.keys() - set(REPEATED))


def gain_percent(first: float | None, other: float | None) -> float | None:
    """By how much `other` is below `first`, in per cent of `first`; a lower perplexity is a positive gain."""
    return None if first is None or other is None else 100 * (first - other) / first


def common_gain_percent(first: Mapping[object, float], other: Mapping[object, float]) -> float | None:
    """The gain of the mean over the seeds that both have, given seed -> perplexity; None if there is no such seed."""
    common = first.keys() & other.keys()
    means = (statistics.fmean(of[seed] for seed in common) if common else None for of in (first, other))
    return gain_percent(*means)


def fairness_warning(runs: Sequence[RunFolder]) -> str | None:
    """One line that names what differs between the runs though a fair comparison holds it equal, or None."""
    differing = unfair_differences(runs)
    return f"Not a fair comparison, the runs differ in: {'; '.join(differing)}." if differing else None


def _run_table(runs: Sequence[RunFolder]) -> ComparisonTable:
    results = [run.results() for run in runs]
    perplexities = [_perplexity(result) for result in results]
    tasks = _task_order(results)
    values = [[figures.get(task) for figures in perplexities] for task in tasks]
    after = [[readable(task), *map(perplexity_text, row)] for task, row in zip(tasks, values, strict=True)]
    gains = [_gain_row(task, row) for task, row in zip(tasks, values, strict=True)]
    cost = [
        ["client steps", *(count_text(result.get("client_steps")) for result in results)],
        ["trainable parameters", *(count_text(result.get("trainable_parameters")) for result in results)],
        ["sent by the clients", *(bytes_text(result.get("bytes_up")) for result in results)],
        ["training time", *(seconds_text(result.get("train_seconds")) for result in results)],
    ]
    blocks = [
        Block("perplexity", after),
        Block("gain against the first (positive: lower perplexity)", gains),
        Block("cost", cost),
    ]
    return ComparisonTable("Test perplexity after training", ["", *run_labels(runs)], blocks)


def _group_table(groups: Sequence[SeedGroup]) -> ComparisonTable:
    rows, gains = [], []
    for task in _task_order([run.results() for group in groups for run in group.runs]):
        values = [_mean_by_seed(group, task) for group in groups]
        rows.append([readable(task), *(_spread(list(of_seeds.values())) for of_seeds in values)])
        first, *others = values
        gains.append([readable(task), NOTHING, *(percent_text(common_gain_percent(first, other)) for other in others)])
    columns = [f"{group.label}, {_counted(group.runs)}" for group in groups]
    title = "Over seeds: mean ± standard deviation (lowest-highest)"
    gain = "gain of the mean against the first, over the seeds that both have (positive: lower perplexity)"
    return ComparisonTable(title, ["", *columns], [Block("perplexity", rows), Block(gain, gains)])


def _counted(runs: Sequence[RunFolder]) -> str:
    """How many seeds; where one was run again, in how many runs."""
    seeds = len({run.config.get("seed") for run in runs})
    return f"{seeds} seed{'s' * (seeds > 1)}{f' in {len(runs)} runs' * (seeds < len(runs))}"


def _mean_by_seed(group: SeedGroup, task: str) -> dict[object, float]:
    """Seed -> a task's perplexity, the mean where it was run again; without the runs that have none."""
    by_seed: dict[object, list[float]] = {}
    for run in group.runs:
        value = _perplexity(run.results()).get(task)
        if value is not None:
            by_seed.setdefault(run.config.get("seed"), []).append(value)
    return {seed: statistics.fmean(of_seed) for seed, of_seed in by_seed.items()}


def _gain_row(task: str, values: Sequence[float | None]) -> list[str]:
    return [readable(task), NOTHING, *(percent_text(gain_percent(values[0], other)) for other in values[1:])]


def _spread(values: Sequence[float]) -> str:
    if len(values) < 2:
        return perplexity_text(values[0]) if values else NOTHING
    mean, deviation = map(perplexity_text, (statistics.fmean(values), statistics.stdev(values)))
    return f"{mean} ± {deviation} ({perplexity_text(min(values))}-{perplexity_text(max(values))})"


def _perplexity(result: dict[str, Any]) -> dict[str, float | None]:
    figures = {row.task: row.after for row in perplexity_rows(result)}
    of_tasks = [value for task, value in figures.items() if task != ALL_TASKS]
    known = [value for value in of_tasks if value is not None]
    if len(known) == len(of_tasks) > 1:
        figures[TASKS_ALIKE] = statistics.geometric_mean(known)
    return figures


def _task_order(results: Sequence[dict[str, Any]]) -> list[str]:
    """Every task of any of the runs, then both figures over all of them."""
    tasks = dict.fromkeys(task for result in results for task in _perplexity(result))
    return sorted(tasks, key=lambda task: (task == ALL_TASKS, task == TASKS_ALIKE))


def _to_rich(table: ComparisonTable) -> Table:
    """The table with columns at least as wide as their longest word, so that figures are never broken."""
    shown = Table(title=table.title, box=SIMPLE_HEAD)
    rows = [row for block in table.blocks for row in block.rows]
    for column, cells in enumerate(zip(table.columns, *rows, strict=True)):
        longest_word = max(len(word) for cell in cells for word in cell.split())
        shown.add_column(escape(cells[0]), justify="right" if column else "left", min_width=longest_word)
    for block in table.blocks:
        shown.add_section()
        shown.add_row(escape(block.heading), style="italic")
        for row in block.rows:
            shown.add_row(*map(escape, row), style="bold" if row[0] == readable(ALL_TASKS) else None)
    return shown


def _to_markdown(table: ComparisonTable) -> str:
    empty = [""] * (len(table.columns) - 1)
    rows = [row for block in table.blocks for row in ([f"*{block.heading}*", *empty], *block.rows)]
    return f"**{table.title}**\n\n{markdown_table(table.columns, rows, right=True)}\n"
