"""ROUGE-L and exact match of a sweep's runs, where `mops-fl evaluate RUN --json RUN/evaluation.json` left them."""

import json
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from experiments.run_folder import ALL_TASKS, RunFolder
from experiments.wording import markdown_table
from mops_fl.errors import InputError

EVALUATION = "evaluation.json"


class Scores(NamedTuple):
    """Scores of a run's answers over all tasks, and on what they were measured.

    Attributes:
        rouge_l: mean, from 0 to 100.
        exact_match: per cent of the answers.
        setting: number and description of the rows, and most tokens of an answer.
    """

    rouge_l: float
    exact_match: float
    setting: tuple[object, ...]


def read_scores(run: RunFolder) -> Scores | None:
    """What evaluation.json says; None if there is no such file, or the run answered nothing.

    Raises:
        InputError: it cannot be read, or is not what `mops-fl evaluate` writes.
    """
    path = run.path / EVALUATION
    if not path.exists():
        return None
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        overall = content["tasks"][ALL_TASKS]
        if "rouge-l" not in overall:
            return None
        setting = (overall["rows"], content["data"], content["max-new-tokens"])
        return Scores(float(overall["rouge-l"]), float(overall["exact-match"]), setting)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not what `mops-fl evaluate` writes ({error!r}); make it again.") from error


def scores_markdown(finished: Mapping[tuple[str, str], Sequence[RunFolder]], num_seeds: int) -> list[str]:
    """A table of the scores of each row and method that has any, as lines; none if none has.

    Args:
        finished: (row, method) -> complete runs, a seed each.
        num_seeds: how many there should be.
    """
    read = {cell: [read_scores(run) for run in runs] for cell, runs in finished.items()}
    found = {cell: [one for one in of if one] for cell, of in read.items() if any(of)}
    if not found:
        return []
    lines = ["", "Answers to the test rows (mean over seeds; higher is better):", ""]
    if len({one.setting for of in found.values() for one in of}) > 1:
        lines += ["> Not a fair comparison: answers to other rows, or of another greatest length.", ""]
    table = []
    for (row, method), scores in found.items():
        rows = "/".join(dict.fromkeys(str(one.setting[0]) for one in scores))
        few = f" ({len(scores)} of {num_seeds} seeds)" if len(scores) < num_seeds else ""
        rouge_l, exact = fmean(one.rouge_l for one in scores), fmean(one.exact_match for one in scores)
        table.append([row, method, rows, f"{rouge_l:.1f}{few}", f"{exact:.1f} %"])
    return [*lines, markdown_table(["", "method", "rows", "ROUGE-L", "exact match"], table)]
