"""A sweep's curves: test perplexity over client steps, a panel for each row, or one panel where there is one method."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes

from experiments.drawing import (
    LINE_STYLES,
    METHOD_COLOURS,
    TASK_COLOURS,
    draw_bare_model,
    drawn_figure,
    label_perplexity_axes,
    plot_curve,
    wrapped,
)
from experiments.measurements import Point, series
from experiments.run_folder import RunFolder

PANELS_A_LINE = 2
PANEL_INCHES = 3.2

# Name of a curve -> its runs, a seed each.
Curves = Mapping[str, Sequence[RunFolder]]


def plot_sweep(finished: Mapping[tuple[str, str], Sequence[RunFolder]], target: Path) -> bool:
    """Draw the mean over seeds of each row's methods, and the range of the seeds as a band.

    Args:
        finished: (row, method) -> complete runs, a seed each.
        target: the PNG.

    Returns:
        False, and nothing is written, if no run is complete.
    """
    finished = {cell: runs for cell, runs in finished.items() if runs}
    if not finished:
        return False
    rows, methods = (list(dict.fromkeys(cell[place] for cell in finished)) for place in (0, 1))
    if len(methods) == 1:
        panels: dict[str, Curves] = {methods[0]: {row: finished[row, methods[0]] for row in rows}}
    else:
        panels = {row: {m: finished[row, m] for m in methods if (row, m) in finished} for row in rows}
    looks = curve_looks({name: str(run.config["method"]) for of in panels.values() for name, (run, *_) in of.items()})
    lines = math.ceil(len(panels) / PANELS_A_LINE)
    columns = min(len(panels), PANELS_A_LINE)
    with drawn_figure(target, height=0.6 + PANEL_INCHES * lines) as figure:
        axes = figure.subplots(lines, columns, squeeze=False).flatten()
        for (title, curves), panel in zip(panels.items(), axes, strict=False):
            _draw_panel(panel, title, curves, looks)
        for panel in axes[len(panels) :]:
            panel.set_axis_off()
        handles: dict[str, Any] = {}
        for panel in axes:
            shown, labels = panel.get_legend_handles_labels()
            handles.update(zip(labels, shown, strict=True))
        figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=3)
    return True


def mean_curve(runs: Sequence[RunFolder]) -> tuple[list[Point], list[tuple[float, float]]]:
    """The mean test perplexity of runs after each round that all of them measured, and the least and most.

    The seeds' client steps differ where clients stop after an epoch; a point is at their mean.
    """
    curves = [{point.round: point for point in series(run.metrics(), "perplexity")} for run in runs]
    rounds = sorted(set.intersection(*(set(curve) for curve in curves)))
    measured = [[curve[number] for curve in curves] for number in rounds]
    values = [[point.value for point in of] for of in measured]
    steps = [round(fmean(point.client_steps for point in of)) for of in measured]
    points = [Point(*of) for of in zip(rounds, steps, map(fmean, values), strict=True)]
    return points, [(min(of), max(of)) for of in values]


def curve_looks(methods: Mapping[str, str]) -> dict[str, tuple[str, Any]]:
    """The colour and line style of each curve, the same in every panel of a sweep.

    Args:
        methods: name of a curve -> its method. A method has its colour, and its variants differ by line; where all
            curves are of one method, they differ by colour as well.
    """
    if len({*methods.values()}) == 1 < len(methods):
        return dict(zip(methods, zip(cycle(TASK_COLOURS), cycle(LINE_STYLES), strict=False), strict=False))
    styles = {method: cycle(LINE_STYLES) for method in methods.values()}
    return {name: (METHOD_COLOURS[method], next(styles[method])) for name, method in methods.items()}


def _draw_panel(axes: Axes, title: str, curves: Curves, looks: Mapping[str, tuple[str, Any]]) -> None:
    drawn = []
    for name, runs in curves.items():
        points, ranges = mean_curve(runs)
        drawn += [point.value for point in points]
        colour, style = looks[name]
        plot_curve(axes, points, color=colour, linestyle=style, linewidth=1.8, marker="o", markersize=3,
                   label=wrapped(name))  # fmt: skip
        if len(runs) > 1:
            low, high = zip(*ranges, strict=True)
            axes.fill_between([point.client_steps for point in points], low, high, color=colour, alpha=0.2, linewidth=0)
    draw_bare_model(axes, next(iter(curves.values()))[0].metrics(), drawn)
    label_perplexity_axes(axes)
    axes.set_title(title)
