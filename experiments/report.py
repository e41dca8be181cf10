"""A run folder as one HTML file that opens offline, and its perplexities as a table."""

from __future__ import annotations

import base64
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from experiments.measurements import perplexity_rows
from experiments.plots import plot_drift, plot_gate, plot_partition, plot_perplexity
from experiments.run_folder import ALL_TASKS, RunFolder
from experiments.wording import (
    NOTHING,
    backbone_name,
    bytes_text,
    count_text,
    method_name,
    percent_text,
    perplexity_text,
    readable,
    seconds_text,
)

REPORT = "report.html"
TEMPLATES = Path(__file__).parent / "templates"
STATUS_NOTES = {
    "running": "The run had not ended when this report was made; the figures are those so far.",
    "interrupted": "The run was interrupted; the figures are those it had reached.",
    "failed": "The run failed; the figures are those it had reached.",
    "unfinished": "The run ended before its start was measured.",
}


def write_report(run: RunFolder) -> Path:
    """Write the run's plots as PNG and, with these inside, report.html; both replace older ones.

    Returns:
        The path of report.html.
    """
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(perplexity=perplexity_text, percent=percent_text, readable=readable, shell=shlex.join)
    html = environment.get_template("report.html.j2").render(_contents(run))
    path = run.path / REPORT
    path.write_text(html, encoding="utf-8")
    return path


def print_perplexity_table(summary: Mapping[str, Any], console: Console) -> None:
    """Print the test perplexity of every task: bare model, before, after and change.

    Args:
        summary: what `RunFolder.results` returns.
        console: where to print.
    """
    table = Table(title=escape(f"Test perplexity, {method_name(summary)} on {backbone_name(summary)}"))
    table.add_column("task")
    for column in ("bare model", "before", "after", "change"):
        table.add_column(column, justify="right")
    for row in perplexity_rows(summary):
        if row.task == ALL_TASKS:
            table.add_section()
        figures = [perplexity_text(value) for value in (row.bare, row.before, row.after)]
        style = "bold" if row.task == ALL_TASKS else None
        table.add_row(escape(readable(row.task)), *figures, percent_text(row.change_percent), style=style)
    console.print(table)


def _contents(run: RunFolder) -> dict[str, Any]:
    """Everything the template shows."""
    summary = run.results()
    rows = perplexity_rows(summary)
    plots = {"perplexity": plot_perplexity, "gate": plot_gate, "drift": plot_drift, "partition": plot_partition}
    paths = {name: run.path / f"{name}.png" for name in plots}
    return {
        "method": method_name(summary),
        "backbone": backbone_name(summary),
        "dataset": str(summary.get("dataset", "unknown data")),
        "data_description": summary.get("data_description", ""),
        "data_is_sample": summary.get("data_is_sample", False),
        "status": summary.get("status", "complete"),
        "status_note": STATUS_NOTES.get(summary.get("status", "complete"), ""),
        "overall": next((row for row in rows if row.task == ALL_TASKS), None),
        "rows": rows,
        "images": {name: _base64(paths[name]) for name, plot in plots.items() if plot(run, paths[name])},
        "cost": _cost(summary),
        "setting": _setting(run.manifest),
        "manifest": run.manifest,
        "folder": run.path.resolve().name,
    }


def _cost(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the run spent and lost, as labels and figures; what the summary does not know is left out."""
    steps, seconds = summary.get("client_steps"), summary.get("train_seconds")
    figures = [
        ("rounds", count_text(summary.get("rounds"))),
        ("client steps", count_text(steps)),
        ("trainable parameters", count_text(summary.get("trainable_parameters"))),
        ("training time", seconds_text(seconds)),
        ("time per client step", f"{seconds / steps:.3g} s" if steps and seconds else NOTHING),
        ("tokens per second", count_text(summary.get("tokens_per_second"))),
        ("peak memory", bytes_text(summary.get("peak_memory_bytes"))),
        ("sent by the clients", bytes_text(summary.get("bytes_up"))),
        ("sent to the clients", bytes_text(summary.get("bytes_down"))),
        ("failed client replies", count_text(summary.get("failures"))),
        ("missing client measurements", count_text(summary.get("evaluations_missing"))),
        ("rows truncated", count_text(summary.get("truncated_rows"))),
        ("device", str(summary.get("device", NOTHING))),
        ("number format", str(summary.get("dtype", NOTHING))),
    ]
    return [(label, figure) for label, figure in figures if figure != NOTHING]


def _setting(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Machine and versions of packages, as labels and values."""
    machine = dict(manifest.get("machine", {}))
    memory = machine.pop("memory-bytes", None)
    named = {**machine, "memory": bytes_text(memory), **manifest.get("versions", {})}
    return [(name, str(value)) for name, value in named.items()]


def _base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode("ascii")
