"""What all plots share: names, colours, axes, and how a curve is drawn."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

from experiments.measurements import Point, series
from experiments.wording import readable

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
LINE_STYLES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)), (0, (3, 1, 1, 1)))
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


@contextmanager
def drawn_figure(target: Path, height: float) -> Iterator[Figure]:
    """An empty figure of the usual width, `height` inches high, that becomes the PNG `target` at the end."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_INCHES, height), dpi=DPI)
        yield figure
        figure.savefig(target, facecolor="white")


def plot_curve(axes: Axes, points: Sequence[Point], **style: Any) -> None:  # noqa: ANN401 - matplotlib's own keywords
    """Draw points over client steps."""
    axes.plot([point.client_steps for point in points], [point.value for point in points], **style)


def add_legend(axes: Axes) -> None:
    """Name the curves beside the axes; a figure that is lower than their names becomes as high."""
    several_styles = len(axes.get_lines()) > len(TASK_COLOURS)  # which a short line does not tell apart
    legend = axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), handlelength=3.5 if several_styles else 2)
    figure = axes.figure.figure
    inches = legend.get_window_extent().height / figure.dpi
    figure.set_figheight(max(figure.get_figheight(), inches + 0.1))


def label_perplexity_axes(axes: Axes) -> None:
    """Client steps against test perplexity on a log scale with readable ticks, once the curves are drawn."""
    axes.set_yscale("log")
    lowest, highest = axes.get_ylim()
    # A log scale's own ticks are too few within a decade.
    narrow = highest / lowest < 6
    axes.yaxis.set_major_locator(MaxNLocator(9) if narrow else LogLocator(10, subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(plain_number))
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_xlabel("client steps")
    axes.set_ylabel("test perplexity (log scale)")
    axes.grid(axis="y", color="#E3E3E3", linewidth=0.7)
    axes.set_axisbelow(True)


def draw_bare_model(axes: Axes, metrics: Sequence[Mapping[str, Any]], drawn: Sequence[float]) -> None:
    """A dotted line at the bare model's overall perplexity, unless it would squeeze the curves together."""
    measured = series(metrics, "perplexity-bare")
    bare = measured[-1].value if measured else math.nan
    finite = [value for value in drawn if math.isfinite(value)]
    if finite and min(finite) / 2 <= bare <= max(finite) * 2:
        axes.axhline(bare, color="black", linestyle=":", linewidth=1.2, label="bare model, all tasks")


def wrapped(task: str, max_lines: int = 2, width: int = 24) -> str:
    """A task's name in short lines; a task file's may be longer than a plot is wide."""
    return textwrap.fill(readable(task), width, max_lines=max_lines, placeholder=" …")


def plain_number(value: float, _position: int | None = None) -> str:
    """A tick's label without powers of ten."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
