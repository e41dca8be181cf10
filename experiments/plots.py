"""Plots of run folders, as PNG: perplexity over client steps, gate, drift, partition, several runs in one."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from itertools import cycle, product
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.image import AxesImage
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from experiments.drawing import (
    LINE_STYLES,
    METHOD_COLOURS,
    TASK_COLOURS,
    WIDTH_INCHES,
    add_legend,
    draw_bare_model,
    drawn_figure,
    label_perplexity_axes,
    plain_number,
    plot_curve,
    wrapped,
)
from experiments.measurements import Point, series, task_names
from experiments.run_folder import RunFolder
from experiments.wording import method_name, readable, shortened

# Runs that differ in these alone are repetitions of one experiment.
REPEATED = ("seed", "output-dir", "resume")
# More tasks than this have names of one line instead of two, and maps of the gate one below the other.
FEW_TASKS = 7
# Most tasks that an expert is named after; of the others only the number is said.
MOST_NAMED = 4
# Where a cell of a map is darker than this share of the darkest, white figures have a contrast of 4.5 and more.
DARK = 0.71


def plot_perplexity(run: RunFolder, target: Path) -> bool:
    """Draw the test perplexity over client steps: all tasks thick, each task thin, the bare model dotted.

    Returns:
        False, and nothing is written, if the run evaluated nothing.
    """
    metrics = run.metrics()
    overall = series(metrics, "perplexity")
    if not overall:
        return False
    tasks = {task: series(metrics, "perplexity", task) for task in task_names(metrics)}
    with drawn_figure(target, height=4.4) as figure:
        axes = figure.add_subplot()
        plot_curve(axes, overall, color="black", linewidth=2.6, marker="o", markersize=5, label="all tasks", zorder=5)
        # The legend then reads from top to bottom as the curves' ends do.
        order = sorted(tasks, key=lambda task: -_last_value(tasks[task]))
        looks = dict(zip(tasks, cycle(product(LINE_STYLES, TASK_COLOURS)), strict=False))
        names = dict(zip(tasks, _task_labels(list(tasks)), strict=True))
        for task in order:
            style, colour = looks[task]
            plot_curve(axes, tasks[task], color=colour, linestyle=style, linewidth=1.2, marker="o", markersize=2.5,
                        label=names[task])  # fmt: skip
        draw_bare_model(axes, metrics, [point.value for curve in (overall, *tasks.values()) for point in curve])
        label_perplexity_axes(axes)
        add_legend(axes)
    return True


def plot_comparison(runs: Sequence[RunFolder], target: Path) -> bool:
    """Draw the overall test perplexity of several runs; runs of one method share its colour.

    Returns:
        False, and nothing is written, if none of the runs evaluated anything.
    """
    curves = [series(run.metrics(), "perplexity") for run in runs]
    if not any(curves):
        return False
    methods = [str(run.config.get("method", "")) for run in runs]
    spare = iter(cycle(TASK_COLOURS[3:]))
    colours = {method: METHOD_COLOURS.get(method) or next(spare) for method in dict.fromkeys(methods)}
    styles = {method: cycle(LINE_STYLES) for method in methods}
    with drawn_figure(target, height=4.4) as figure:
        axes = figure.add_subplot()
        for method, label, curve in zip(methods, run_labels(runs), curves, strict=True):
            plot_curve(axes, curve, color=colours[method], linestyle=next(styles[method]), linewidth=1.8,
                        marker="o", markersize=3.5, label=label)  # fmt: skip
        label_perplexity_axes(axes)
        add_legend(axes)
    return True


def plot_gate(run: RunFolder, target: Path) -> bool:
    """Draw the mean gate score of every expert for every task's test rows: first, middle and last evaluation.

    Returns:
        False, and nothing is written, if the run has no gate.
    """
    metrics = run.metrics()
    maps = gate_maps(metrics)
    if not maps:
        return False
    tasks = task_names(metrics)
    rounds = sorted(maps)
    shown = sorted({rounds[0], rounds[len(rounds) // 2], rounds[-1]})
    num_experts = len(maps[rounds[0]])
    highest = max(float(np.nan_to_num(maps[number]).max()) for number in shown) or 1.0
    experts = _expert_labels(run, num_experts)
    most_lines = max(1 + name.count("\n") for name in experts)
    map_height = num_experts * (0.34 + 0.19 * max(most_lines - 2, 0))
    beside = len(tasks) <= FEW_TASKS
    grid = (1, len(shown)) if beside else (len(shown), 1)
    with drawn_figure(target, height=2.2 + map_height * grid[0] + 0.3 * (grid[0] - 1)) as figure:
        figure.set_figwidth(max(WIDTH_INCHES, 3.5 + 0.16 * len(tasks) * grid[1]))
        panels = list(figure.subplots(*grid, squeeze=False, sharex=True, sharey=True).flat)
        for axes, number in zip(panels, shown, strict=True):
            image = draw_gate_map(axes, maps[number], _task_labels(tasks), highest, rotation=90)
            axes.set_title("before training" if number == 0 else f"after round {number}")
            axes.set_yticks(range(num_experts), experts, fontsize=8.5)
        for axes in panels[: grid[0]]:
            axes.set_ylabel("expert")
        figure.supxlabel("task of the test rows", fontsize=10)
        figure.colorbar(image, ax=panels, fraction=0.025, pad=0.01, label="mean gate score")
    return True


def plot_drift(run: RunFolder, target: Path) -> bool:
    """Draw how far the participants of each round ended from their mean: over all numbers, and each expert's prompts.

    Returns:
        False, and nothing is written, if the run had no rounds of several participants.
    """
    metrics = run.metrics()
    overall = series(metrics, "drift", split="train")
    if not overall:
        return False
    names = sorted({m["metric"] for m in metrics if m["metric"].startswith("drift-expert-")}, key=_expert_number)
    labels = _expert_labels(run, len(names))
    with drawn_figure(target, height=3.6) as figure:
        axes = figure.add_subplot()
        plot_curve(axes, overall, color="black", linewidth=2.2, label="everything trained")
        for name, colour in zip(names, cycle(TASK_COLOURS), strict=False):
            label = f"expert: {labels[_expert_number(name)]}"
            plot_curve(axes, series(metrics, name, split="train"), color=colour, linewidth=1.2, label=label)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("client steps")
        axes.set_ylabel("drift (root mean square)")
        axes.grid(axis="y", color="#E3E3E3", linewidth=0.7)
        add_legend(axes)
    return True


def plot_partition(run: RunFolder, target: Path) -> bool:
    """Draw how many training rows of every task each client owns, and above it each client's rows in all.

    Returns:
        False, and nothing is written, if the run has no partition.json, or no rows were dealt.
    """
    partition = run.partition
    if not partition or not partition.get("clients") or not partition["tasks"]:
        return False
    tasks, clients = partition["tasks"], partition["clients"]
    counts = np.array([[client["per-task"].get(task, 0) for client in clients] for task in tasks], dtype=float)
    with drawn_figure(target, height=2.6 + 0.27 * len(tasks)) as figure:
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(1, 0.4 * max(len(tasks), 3)))
        ids = [client["partition-id"] for client in clients]
        edges = np.arange(len(ids) + 1) - 0.5
        top.stairs(counts.sum(axis=0), edges, fill=True, color="#7F8FA6")
        top.set_ylabel("rows in all")
        top.yaxis.set_major_locator(MaxNLocator(3, integer=True))
        norm = LogNorm(1, max(2.0, counts.max()))
        masked = np.ma.masked_equal(counts, 0)
        image = bottom.pcolormesh(edges, np.arange(len(tasks) + 1) - 0.5, masked, cmap="viridis_r", norm=norm)
        bottom.hlines(np.arange(1, len(tasks)) - 0.5, -0.5, len(ids) - 0.5, color="white", linewidth=2.5)
        bottom.tick_params(axis="x", which="both", length=3)
        bottom.invert_yaxis()
        bottom.set_yticks(range(len(tasks)), [wrapped(task) for task in tasks])
        bottom.xaxis.set_major_locator(MaxNLocator(12, integer=True))
        bottom.set_xlabel("client (white: no rows of that task)")
        bottom.tick_params(axis="y", length=0)
        bar = figure.colorbar(image, ax=[top, bottom], fraction=0.03, pad=0.01, label="training rows")
        bar.ax.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
        bar.ax.yaxis.set_major_formatter(FuncFormatter(plain_number))
        bar.ax.yaxis.set_minor_formatter(NullFormatter())
    return True


def run_labels(runs: Sequence[RunFolder], *, with_seed: bool = True) -> list[str]:
    """A short name for each run, no two alike: method, seed, what else differs, or its place in `runs`."""
    labels = [method_name(run.config) for run in runs]
    if with_seed:
        labels = [f"{label}, seed {run.config.get('seed', '?')}" for label, run in zip(labels, runs, strict=True)]
    alike = {label: [run for run, own in zip(runs, labels, strict=True) if own == label] for label in labels}
    labels = [label + _difference(run, alike[label]) for label, run in zip(labels, runs, strict=True)]
    return [f"{label}, run {place}" if labels.count(label) > 1 else label for place, label in enumerate(labels, 1)]


def _difference(run: RunFolder, alike: Sequence[RunFolder]) -> str:
    """The first two short config values that tell the run from those `alike`, as text to append."""
    configs = [identity(other) for other in alike]
    keys = dict.fromkeys(key for config in configs for key in config if key not in REPEATED)
    differing = [key for key in keys if len({config[key] for config in configs if key in config}) > 1]
    short = [key for key in differing if all(len(str(config.get(key))) <= 12 for config in configs)]
    return "".join(f", {key} {identity(run).get(key, '-')}" for key in short[:2])


def identity(run: RunFolder) -> dict[str, Any]:
    """What tells a run from others: its config, and whether it was federated or central."""
    return {**run.config, "training": run.results().get("training", "federated")}


def gate_maps(metrics: Sequence[Mapping[str, Any]]) -> dict[int, np.ndarray]:
    """Mean gate scores by round: arrays (experts, tasks), NaN where nothing was measured."""
    tasks = {task: column for column, task in enumerate(task_names(metrics))}
    prefix = "gate-expert-"
    entries = [m for m in metrics if m["metric"].startswith(prefix) and m["split"] == "test" and m["task"] in tasks]
    if not entries:
        return {}
    num_experts = 1 + max(_expert_number(entry["metric"]) for entry in entries)
    maps = {entry["round"]: np.full((num_experts, len(tasks)), math.nan) for entry in entries}
    for entry in entries:
        maps[entry["round"]][_expert_number(entry["metric"]), tasks[entry["task"]]] = entry["value"]
    return maps


def draw_gate_map(axes: Axes, scores: np.ndarray, columns: Sequence[str], highest: float, rotation: float) -> AxesImage:
    """Draw the gate's scores (experts, columns), shaded up to `highest`, each column's name turned by `rotation`."""
    image = axes.imshow(scores, cmap="Blues", vmin=0, vmax=highest, aspect="auto")
    _write_cells(axes, scores, highest)
    axes.set_xticks(range(len(columns)), columns, rotation=rotation, fontsize=8.5, linespacing=1.05)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return image


def _write_cells(axes: Axes, scores: np.ndarray, highest: float) -> None:
    """Write each score into its cell, as ``.42``, where the cells are large enough to read it."""
    if scores.size > 100:
        return
    for (row, column), score in np.ndenumerate(scores):
        text = "" if math.isnan(score) else f"{score:.2f}".removeprefix("0")
        colour = "white" if score > DARK * highest else "black"
        axes.text(column, row, text, ha="center", va="center", fontsize=7.5, color=colour)


def _expert_number(metric: str) -> int:
    return int(metric.rpartition("-")[2])


def _task_labels(tasks: Sequence[str]) -> list[str]:
    """The names of tasks, which have room for two lines each where they are few."""
    return [wrapped(task) if len(tasks) <= FEW_TASKS else shortened(readable(task), 28) for task in tasks]


def _expert_labels(run: RunFolder, num_experts: int) -> list[str]:
    """The tasks each expert was pretrained for in the gate; its number where there are none."""
    tasks = list(run.results().get("experts") or [])
    tasks += [[]] * (num_experts - len(tasks))
    return [_joined(tasks[number]) or str(number) for number in range(num_experts)]


def _joined(tasks: Sequence[str]) -> str:
    """Several tasks in short lines, none of which breaks within a name; the name of a single one."""
    if len(tasks) < 2:
        return "".join(map(wrapped, tasks))
    names = [shortened(readable(task), 22).replace(" ", "\N{NO-BREAK SPACE}") for task in tasks[:MOST_NAMED]]
    more = [f"{len(tasks) - MOST_NAMED} more"] if len(tasks) > MOST_NAMED else []
    return textwrap.fill(" + ".join([*names, *more]), 24).replace("\N{NO-BREAK SPACE}", " ")


def _last_value(points: Sequence[Point]) -> float:
    return points[-1].value if points else math.nan
