"""What the page of `mops-fl explore` shows beside answers: the gate's map, the runs' perplexities, questions to try."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from experiments.drawing import DPI, STYLE, wrapped
from experiments.measured_rows import run_rows
from experiments.measurements import PerplexityRow, perplexity_rows, task_names
from experiments.plots import draw_gate_map, gate_maps
from experiments.run_folder import ALL_TASKS, RunFolder
from experiments.wording import markdown_table, perplexity_text, readable
from mops_fl.config import DataConfig
from mops_fl.data import Row, read_dolly, spread_rows
from mops_fl.errors import InputError
from mops_fl.sources import sample_path

MARK_COLOUR = "#D55E00"


def draw_gate(run: RunFolder, expert_names: Sequence[str], scores: Sequence[float] | None) -> Figure | None:
    """The gate's mean scores of the run's last evaluation, experts by tasks, and beside them those of one input.

    Args:
        run: the run.
        expert_names: a name for each expert.
        scores: what the gate gave each expert for the input; None as long as there is none.

    Returns:
        None if the run measured no gate.
    """
    maps = gate_maps(run.metrics())
    if not maps:
        return None
    last, tasks = maps[max(maps)], task_names(run.metrics())
    own = np.full((len(last), 1), np.nan) if scores is None else np.array(scores)[:, None]
    highest = float(np.nan_to_num(np.hstack([last, own])).max()) or 1.0
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10.0, 1.4 + 0.34 * len(last)), dpi=DPI, facecolor="white")
        panels = figure.subplots(1, 2, width_ratios=(len(tasks), 1), sharey=True)
        turned = 0 if len(tasks) <= 8 else 90  # names of many tasks have no room beside each other
        for axes, values, columns in zip(panels, (last, own), (tasks, ["this input"]), strict=True):
            names = [wrapped(name, max_lines=3, width=14) for name in columns]
            image = draw_gate_map(axes, values, names, highest, turned)
        panels[0].set_yticks(range(len(last)), [wrapped(name, max_lines=3) for name in expert_names], fontsize=8.5)
        panels[0].set_ylabel("expert")
        panels[0].set_xlabel(f"task of the test rows, after round {max(maps)}")
        panels[1].spines[:].set(visible=True, edgecolor=MARK_COLOUR, linewidth=2.5)
        panels[1].tick_params(axis="x", labelcolor=MARK_COLOUR)
        figure.colorbar(image, ax=panels, fraction=0.025, pad=0.01, label="gate score")
    return figure


def perplexity_table(runs: Sequence[RunFolder], labels: Sequence[str]) -> str:
    """Test perplexity per task in Markdown: the bare model, and each run before training and after, the best bold."""
    tables = [{row.task: row for row in perplexity_rows(run.results())} for run in runs]
    tasks = sorted(dict.fromkeys(task for table in tables for task in table), key=lambda task: task == ALL_TASKS)
    columns = [part for label in labels for part in (f"{label}, before", label)]
    lines = []
    for task in tasks:
        rows = [table.get(task, PerplexityRow(task, None, None, None)) for table in tables]
        lowest = min((row.after for row in rows if row.after is not None), default=None)
        bare = next((row.bare for row in rows if row.bare is not None), None)
        cells = [cell for row in rows for cell in (perplexity_text(row.before), _marked(row.after, lowest))]
        lines.append([readable(task), perplexity_text(bare), *cells])
    return markdown_table(["task", "bare model", *columns], lines, right=True)


def example_rows(run: RunFolder, data: DataConfig) -> tuple[Row, ...]:
    """A row for each of the run's tasks, of the bundled sample or else, if they are on this machine, its test rows."""
    tasks = task_names(run.metrics())
    rows = [row for row in read_dolly(sample_path()) if row.task in tasks]
    if rows:
        return spread_rows(rows, len({row.task for row in rows}))
    try:
        return run_rows(run.path, data, "", len(tasks)).rows
    except InputError:
        return ()


def _marked(value: float | None, lowest: float | None) -> str:
    text = perplexity_text(value)
    return f"**{text}**" if value is not None and value == lowest else text
