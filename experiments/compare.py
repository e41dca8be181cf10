"""`mops-fl compare`: runs side by side as a table and a plot, with mean and spread over seeds."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from experiments.drawing import readable
from experiments.plots import differing_keys, plot_comparison, run_labels, told_apart
from experiments.report import (
    NOTHING,
    bytes_text,
    count_text,
    percent_text,
    perplexity_rows,
    perplexity_text,
    seconds_text,
)
from experiments.run_folder import ALL_TASKS, RunFolder
from mops_fl.errors import InputError

PLOT = "comparison.png"
TABLE = "comparison.md"
# Runs that differ in these alone are repetitions of one experiment.
REPEATED = ("seed", "output-dir", "resume")
# Whatever decides which test rows there are and which of their tokens count.
TEST_ROWS = ("data-seed", "num-rows", "test-fraction", "server-rows", "eval-rows", "max-length", "loss-on")
# The bare model gives the same perplexity on the same rows, up to the machine's rounding.
BARE_TOLERANCE = 0.01


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


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `compare` to the parser of `mops-fl`."""
    parser = subparsers.add_parser("compare", help="put runs side by side: table, gain in %, curves in one plot")
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
    try:
        folder.mkdir(parents=True, exist_ok=True)
        plotted = plot_comparison(runs, plot)
        parts = [_to_markdown(table) for table in comparison_tables(runs)]
        parts += [f"> {warning}\n"] if warning else []
        parts += [f"![Test perplexity over client steps]({PLOT})\n"] if plotted else []
        text.write_text("\n".join(parts), encoding="utf-8")
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error.strerror}); choose another --output.") from error
    return [text, plot] if plotted else [text]


def comparison_tables(runs: Sequence[RunFolder]) -> list[ComparisonTable]:
    """The runs side by side and, if any were repeated with other seeds, the methods with mean and spread."""
    groups = seed_groups(runs)
    repeated = any(len(group.runs) > 1 for group in groups)
    return [_run_table(runs), _group_table(groups)] if repeated else [_run_table(runs)]


def seed_groups(runs: Sequence[RunFolder]) -> list[SeedGroup]:
    """The runs grouped by everything but the seed, in the order given; no two groups have the same label."""
    groups: list[list[RunFolder]] = []
    for run in runs:
        own = told_apart(run)
        same = [group for group in groups if not differing_keys([told_apart(group[0]), own], ignore=REPEATED)]
        if same:
            same[0].append(run)
        else:
            groups.append([run])
    labels = run_labels([group[0] for group in groups], with_seed=False)
    return [SeedGroup(label, group) for label, group in zip(labels, groups, strict=True)]


def gain_percent(first: float | None, other: float | None) -> float | None:
    """By how much `other` is below `first`, in per cent of `first`; a lower perplexity is a positive gain."""
    return None if first is None or other is None else 100 * (first - other) / first


def fairness_warning(runs: Sequence[RunFolder]) -> str | None:
    """One line that names what differs between the runs though a fair comparison holds it equal, or None."""
    results = [run.results() for run in runs]
    compared: dict[str, list[object]] = {
        "client steps": [count_text(result.get("client_steps")) for result in results],
        "dataset": [_dataset(result) for result in results],
        "backbone": [result.get("backbone") for result in results],
        "compression": [result.get("compression") for result in results],
        "quantization": [result.get("quantization") for result in results],
        "status": [result.get("status", "complete") for result in results],
    }
    differing = [f"{name} ({_listed(values)})" for name, values in compared.items() if len(set(values)) > 1]
    differing += _differing_test_rows(runs, results)
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
    blocks = [Block("perplexity", after), Block("gain against the first", gains), Block("cost", cost)]
    return ComparisonTable("Test perplexity after training", ["", *run_labels(runs)], blocks)


def _group_table(groups: Sequence[SeedGroup]) -> ComparisonTable:
    results = [[run.results() for run in group.runs] for group in groups]
    rows, gains = [], []
    for task in _task_order([result for group in results for result in group]):
        values = [[_perplexity(result).get(task) for result in group] for group in results]
        known = [[value for value in group if value is not None] for group in values]
        means = [statistics.fmean(group) if group else None for group in known]
        rows.append([readable(task), *map(_spread, known)])
        gains.append(_gain_row(task, means))
    columns = [f"{group.label}, {len(group.runs)} seed{'s' * (len(group.runs) > 1)}" for group in groups]
    title = "Over seeds: mean ± standard deviation (lowest-highest)"
    blocks = [Block("perplexity", rows), Block("gain of the mean against the first", gains)]
    return ComparisonTable(title, ["", *columns], blocks)


def _gain_row(task: str, values: Sequence[float | None]) -> list[str]:
    return [readable(task), NOTHING, *(percent_text(gain_percent(values[0], other)) for other in values[1:])]


def _spread(values: Sequence[float]) -> str:
    if len(values) < 2:
        return perplexity_text(values[0]) if values else NOTHING
    mean, deviation = map(perplexity_text, (statistics.fmean(values), statistics.stdev(values)))
    return f"{mean} ± {deviation} ({perplexity_text(min(values))}-{perplexity_text(max(values))})"


def _perplexity(result: dict[str, Any]) -> dict[str, float | None]:
    return {row.task: row.after for row in perplexity_rows(result)}


def _task_order(results: Sequence[dict[str, Any]]) -> list[str]:
    """Every task of any of the runs, and "all" at the end."""
    tasks = dict.fromkeys(task for result in results for task in _perplexity(result))
    return sorted(tasks, key=lambda task: task == ALL_TASKS)


def _dataset(result: dict[str, Any]) -> str:
    name = str(result.get("dataset"))
    return f"{name}, bundled sample" if result.get("data_is_sample") else name


def _differing_test_rows(runs: Sequence[RunFolder], results: Sequence[dict[str, Any]]) -> list[str]:
    """Config keys that choose the test rows; where they agree, the bare model is the judge."""
    configs = [run.config for run in runs]
    keys = [key for key in differing_keys(configs) if key in TEST_ROWS]
    if keys:
        values = [f"{key} {_listed([config.get(key) for config in configs])}" for key in keys]
        return [f"test rows ({', '.join(values)})"]
    bare = [row.bare for result in results for row in perplexity_rows(result)
            if row.task == ALL_TASKS and row.bare is not None]  # fmt: skip
    if bare and max(bare) > (1 + BARE_TOLERANCE) * min(bare):
        return [f"perplexity of the bare model ({_listed([perplexity_text(value) for value in bare])})"]
    return []


def _listed(values: Sequence[object]) -> str:
    return " / ".join(str(value) for value in dict.fromkeys(values))


def _to_rich(table: ComparisonTable) -> Table:
    """The table with columns at least as wide as their longest word, so that figures are never broken."""
    shown = Table(title=table.title, box=SIMPLE_HEAD)
    rows = [row for block in table.blocks for row in block.rows]
    for column, cells in enumerate(zip(table.columns, *rows, strict=True)):
        longest_word = max(len(word) for cell in cells for word in cell.split())
        shown.add_column(cells[0], justify="right" if column else "left", min_width=longest_word)
    for block in table.blocks:
        shown.add_section()
        shown.add_row(block.heading, style="italic")
        for row in block.rows:
            shown.add_row(*row, style="bold" if row[0] == readable(ALL_TASKS) else None)
    return shown


def _to_markdown(table: ComparisonTable) -> str:
    empty = [""] * (len(table.columns) - 1)
    lines = [table.columns, ["---", *["---:" for _ in empty]]]
    for block in table.blocks:
        lines += [[f"*{block.heading}*", *empty], *block.rows]
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"**{table.title}**\n\n{body}\n"
