"""Plots of run folders, as PNG: perplexity over client steps, gate, partition, several runs in one."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
    StrMethodFormatter,
)

from experiments.run_folder import ALL_TASKS, Point, RunFolder, series, task_names

METHOD_NAMES = {"mops": "MoPs", "fedprompt": "FedPrompt", "lora": "LoRA", "ia3": "IA3"}
METHOD_COLOURS = {"mops": "#0072B2", "fedprompt": "#D55E00", "lora": "#009E73", "ia3": "#AA4499"}
# Okabe and Ito's and Paul Tol's colours, which stay apart for colour-blind readers.
TASK_COLOURS = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#D55E00",
    "#882255",
    "#999933",
    "#AA4499",
)
LINE_STYLES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)), (0, (3, 1, 1, 1)))
DPI = 110
WIDTH_INCHES = 9.0
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.labelcolor": "#222222",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


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
    with _figure(target, height=4.4) as figure:
        axes = figure.add_subplot()
        _plot_curve(axes, overall, color="black", linewidth=2.6, marker="o", markersize=5, label="all tasks", zorder=5)
        # The legend then reads from top to bottom as the curves' ends do.
        order = sorted(tasks, key=lambda task: -_last_value(tasks[task]))
        colours = dict(zip(tasks, cycle(TASK_COLOURS), strict=False))
        for task in order:
            _plot_curve(axes, tasks[task], color=colours[task], linewidth=1.2, marker="o", markersize=2.5,
                        label=_wrapped(task))  # fmt: skip
        _draw_bare_model(axes, metrics, [point.value for curve in (overall, *tasks.values()) for point in curve])
        _label_perplexity_axes(axes)
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
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
    with _figure(target, height=4.4) as figure:
        axes = figure.add_subplot()
        for method, label, curve in zip(methods, run_labels(runs), curves, strict=True):
            _plot_curve(axes, curve, color=colours[method], linestyle=next(styles[method]), linewidth=1.8,
                        marker="o", markersize=3.5, label=label)  # fmt: skip
        _label_perplexity_axes(axes)
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
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
    with _figure(target, height=2.2 + 0.34 * num_experts) as figure:
        panels = figure.subplots(1, len(shown), squeeze=False, sharey=True)[0]
        for axes, number in zip(panels, shown, strict=True):
            image = axes.imshow(maps[number], cmap="Blues", vmin=0, vmax=highest, aspect="auto")
            write_cells(axes, maps[number], highest)
            axes.set_title("before training" if number == 0 else f"after round {number}")
            axes.set_xticks(range(len(tasks)), [_wrapped(task) for task in tasks], rotation=90, fontsize=8.5)
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
        panels[0].set_yticks(range(num_experts), _expert_labels(run, num_experts), fontsize=8.5)
        panels[0].set_ylabel("expert")
        figure.supxlabel("task of the test rows", fontsize=10)
        figure.colorbar(image, ax=panels, fraction=0.025, pad=0.01, label="mean gate score")
    return True


def plot_partition(run: RunFolder, target: Path) -> bool:
    """Draw how many training rows of every task each client owns, and above it each client's rows in all.

    Returns:
        False, and nothing is written, if the run has no partition.json.
    """
    partition = run.partition
    if not partition or not partition.get("clients"):
        return False
    tasks, clients = partition["tasks"], partition["clients"]
    counts = np.array([[client["per-task"].get(task, 0) for client in clients] for task in tasks], dtype=float)
    with _figure(target, height=2.6 + 0.27 * len(tasks)) as figure:
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
        bottom.set_yticks(range(len(tasks)), [_wrapped(task) for task in tasks])
        bottom.xaxis.set_major_locator(MaxNLocator(12, integer=True))
        bottom.set_xlabel("client (white: no rows of that task)")
        bottom.tick_params(axis="y", length=0)
        bar = figure.colorbar(image, ax=[top, bottom], fraction=0.03, pad=0.01, label="training rows")
        bar.ax.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
        bar.ax.yaxis.set_major_formatter(FuncFormatter(_plain_number))
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
    configs = [other.config for other in alike]
    keys = differing_keys(configs, ignore=("seed", "output-dir", "resume"))
    short = [key for key in keys if all(len(str(config.get(key))) <= 12 for config in configs)]
    return "".join(f", {key} {run.config.get(key, '-')}" for key in short[:2])


def differing_keys(configs: Sequence[Mapping[str, Any]], ignore: Sequence[str] = ()) -> list[str]:
    """The config keys whose values are not the same in all of ``configs``."""
    keys = dict.fromkeys(key for config in configs for key in config if key not in ignore)
    return [key for key in keys if len({config.get(key) for config in configs}) > 1]


def method_name(config: Mapping[str, Any]) -> str:
    """The method as it is written in the paper."""
    method = str(config.get("method", "unknown method"))
    return METHOD_NAMES.get(method, method)


def readable(task: str) -> str:
    """A task's name for people."""
    return "all tasks" if task == ALL_TASKS else task.replace("_", " ")


@contextmanager
def _figure(target: Path, height: float) -> Iterator[Figure]:
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_INCHES, height), dpi=DPI)
        yield figure
        figure.savefig(target, facecolor="white")


def _plot_curve(axes: Axes, points: Sequence[Point], **style: Any) -> None:  # noqa: ANN401 - matplotlib's own keywords
    axes.plot([point.client_steps for point in points], [point.value for point in points], **style)


def _label_perplexity_axes(axes: Axes) -> None:
    axes.set_yscale("log")
    lowest, highest = axes.get_ylim()
    # A log scale's own ticks are too few within a decade.
    narrow = highest / lowest < 6
    axes.yaxis.set_major_locator(MaxNLocator(9) if narrow else LogLocator(10, subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(_plain_number))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_xlabel("client steps")
    axes.set_ylabel("test perplexity (log scale)")
    axes.grid(axis="y", color="#E3E3E3", linewidth=0.7)
    axes.set_axisbelow(True)


def _draw_bare_model(axes: Axes, metrics: Sequence[Mapping[str, Any]], drawn: Sequence[float]) -> None:
    """A dotted line at the bare model's overall perplexity, unless it would squeeze the curves together."""
    measured = series(metrics, "perplexity-bare")
    bare = measured[-1].value if measured else math.nan
    finite = [value for value in drawn if math.isfinite(value)]
    if finite and min(finite) / 2 <= bare <= max(finite) * 2:
        axes.axhline(bare, color="black", linestyle=":", linewidth=1.2, label="bare model, all tasks")


def gate_maps(metrics: Sequence[Mapping[str, Any]]) -> dict[int, np.ndarray]:
    """Mean gate scores by round: arrays (experts, tasks), NaN where nothing was measured."""
    tasks = {task: column for column, task in enumerate(task_names(metrics))}
    prefix = "gate-expert-"
    entries = [m for m in metrics if m["metric"].startswith(prefix) and m["split"] == "test" and m["task"] in tasks]
    if not entries:
        return {}
    num_experts = 1 + max(int(entry["metric"].removeprefix(prefix)) for entry in entries)
    maps = {entry["round"]: np.full((num_experts, len(tasks)), math.nan) for entry in entries}
    for entry in entries:
        expert = int(entry["metric"].removeprefix(prefix))
        maps[entry["round"]][expert, tasks[entry["task"]]] = entry["value"]
    return maps


def write_cells(axes: Axes, scores: np.ndarray, highest: float) -> None:
    """Write each score into its cell, as ``.42``, where the cells are large enough to read it."""
    if scores.size > 100:
        return
    for (row, column), score in np.ndenumerate(scores):
        text = "" if math.isnan(score) else f"{score:.2f}".removeprefix("0")
        colour = "white" if score > 0.5 * highest else "black"
        axes.text(column, row, text, ha="center", va="center", fontsize=7.5, color=colour)


def _expert_labels(run: RunFolder, num_experts: int) -> list[str]:
    """The tasks each expert was pretrained for in the gate; its number where there are none."""
    tasks = [[known] if isinstance(known, str) else known for known in run.results().get("experts") or []]
    tasks += [[]] * (num_experts - len(tasks))
    names = [_wrapped(" + ".join(own), max_lines=2 * len(own)) if own else "" for own in tasks]
    return [names[number] or str(number) for number in range(num_experts)]


def _wrapped(task: str, max_lines: int = 2) -> str:
    """A task's name in short lines; a task file's may be longer than a plot is wide."""
    return textwrap.fill(readable(task), 24, max_lines=max_lines, placeholder=" …")


def _last_value(points: Sequence[Point]) -> float:
    return points[-1].value if points else math.nan


def _plain_number(value: float, _position: int | None = None) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
