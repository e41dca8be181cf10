"""A run folder as one HTML file that opens offline, and its perplexities as a table."""

from __future__ import annotations

import base64
import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from experiments.drawing import method_name, readable
from experiments.plots import plot_drift, plot_gate, plot_partition, plot_perplexity
from experiments.run_folder import ALL_TASKS, RunFolder

REPORT = "report.html"
TEMPLATES = Path(__file__).parent / "templates"
NOTHING = "–"  # noqa: RUF001 - an en dash stands for a missing figure
STATUS_NOTES = {
    "running": "The run had not ended when this report was made; the figures are those so far.",
    "interrupted": "The run was interrupted; the figures are those it had reached.",
    "failed": "The run failed; the figures are those it had reached.",
    "unfinished": "The run ended before its start was measured.",
}


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


def perplexity_rows(summary: Mapping[str, Any]) -> list[PerplexityRow]:
    """A row for each task in the order of the summary, and "all" at the end."""
    stages = [summary.get(name) or {} for name in ("perplexity_bare", "perplexity_before", "perplexity")]
    measured = dict.fromkeys(task for stage in stages for task in stage)
    tasks = [task for task in measured if task != ALL_TASKS] + [task for task in measured if task == ALL_TASKS]
    return [PerplexityRow(task, *(_finite(stage.get(task)) for stage in stages)) for task in tasks]


def perplexity_text(value: float | None) -> str:
    """A perplexity with about four digits, or a dash if there is none."""
    if value is None or not math.isfinite(value):
        return NOTHING
    return f"{value:.2f}" if value < 100 else f"{value:,.1f}" if value < 10_000 else f"{value:,.0f}"


def percent_text(value: float | None) -> str:
    """A signed percentage, or a dash if there is none."""
    return NOTHING if value is None or not math.isfinite(value) else f"{value:+.1f} %"


def count_text(value: float | None) -> str:
    """A whole number with thousands separated, or a dash if there is none."""
    return NOTHING if value is None else f"{value:,.0f}"


def bytes_text(value: float | None) -> str:
    """A number of bytes in the decimal unit that suits it, or a dash if there is none."""
    if value is None:
        return NOTHING
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:,.1f} TB"


def seconds_text(value: float | None) -> str:
    """A duration as people say it, or a dash if there is none."""
    if value is None:
        return NOTHING
    if value < 60:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


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


def backbone_name(summary: Mapping[str, Any]) -> str:
    """The backbone without owner or folders, and how it is compressed if it is."""
    name = Path(str(summary.get("backbone", "unknown model"))).name
    changes = [summary.get(key) for key in ("compression", "quantization")]
    return ", ".join([name, *(str(change) for change in changes if change not in (None, "", "none"))])


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode("ascii")
