"""How names and numbers are put to people, in tables, plots and reports."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.run_folder import ALL_TASKS

METHOD_NAMES = {"mops": "MoPs", "fedprompt": "FedPrompt", "lora": "LoRA", "ia3": "IA3"}
NOTHING = "–"  # noqa: RUF001 - an en dash stands for a missing figure


def method_name(config: Mapping[str, Any]) -> str:
    """The method as it is written in the paper."""
    method = str(config.get("method", "unknown method"))
    return METHOD_NAMES.get(method, method)


def readable(task: str) -> str:
    """A task's name for people."""
    return "all tasks" if task == ALL_TASKS else task.replace("_", " ")


def backbone_name(summary: Mapping[str, Any]) -> str:
    """The backbone without owner or folders, and how it is compressed if it is."""
    name = Path(str(summary.get("backbone", "unknown model"))).name
    changes = [summary.get(key) for key in ("compression", "quantization")]
    return ", ".join([name, *(str(change) for change in changes if change not in (None, "", "none"))])


def shortened(name: str, width: int) -> str:
    """A name of at most `width` characters; what is too much is cut from the middle, since names differ at the ends."""
    if len(name) <= width:
        return name
    behind = (width - 1) // 2
    return f"{name[: width - 1 - behind].rstrip()}…{name[len(name) - behind :].lstrip()}"


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


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: bool = False) -> str:
    """A table in Markdown, without a line's end behind it.

    Args:
        columns: their headings.
        rows: of as many cells.
        right: all columns but the first are aligned to the right.
    """
    rule = ["---", *["---:" if right else "---"] * (len(columns) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, rule, *rows))
