"""`mops-fl evaluate`: perplexity, ROUGE-L and exact match of a trained adapter, per task, on any rows."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from experiments.adapter_options import GREEDY, add_adapter_options, load_model, require_room, room_for_question
from experiments.durable import writing
from experiments.measured_rows import EvaluatedRows, read_rows, run_rows
from experiments.run_folder import ALL_TASKS, CONFIG, only_finite
from experiments.wording import NOTHING, perplexity_text, readable
from mops_fl.config import DataConfig, require_at_least, to_key
from mops_fl.errors import InputError

if TYPE_CHECKING:
    from mops_fl.encoding import EncodedRow
    from mops_fl.evaluation import Evaluation
    from mops_fl.mops_model import MopsModel
    from mops_fl.text_metrics import TextScores

_ADVICE = "choose another file"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `evaluate`."""
    add_adapter_options(parser)
    parser.add_argument(
        "--data",
        metavar="FILE",
        type=Path,
        help=".jsonl[.gz] in Dolly's columns, any categories; or task files of Super-NI, one or a folder "
        "(default: the run's own test rows)",
    )
    parser.add_argument("--tasks", metavar="NAMES", default="", help="only these, comma-separated, wildcards allowed")
    parser.add_argument(
        "--rows", metavar="N", type=int, default=0, help="only so many, spread over the tasks (default: all)"
    )
    parser.add_argument("--max-length", metavar="N", type=int, help="most tokens of a row (default: as in training)")
    parser.add_argument("--no-generation", action="store_true", help="perplexity only, which is much faster")
    parser.add_argument(
        "--max-new-tokens", metavar="N", type=int, default=128, help="of an answer (default: %(default)s)"
    )
    parser.add_argument(
        "--batch-size", metavar="N", type=int, default=8, help="answers made at once (default: %(default)s)"
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures, and the answers, to this file")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, print a table, and write the figures if a file is named.

    Returns:
        The exit code, 0.

    Raises:
        InputError: If an option is out of range, adapter, backbone or data are missing, or the file cannot be written.
    """
    for name in ("rows", "max_new_tokens", "batch_size"):
        require_at_least(to_key(name), getattr(args, name), 0 if name == "rows" else 1)
    if not args.data and not (Path(args.adapter).expanduser() / CONFIG).is_file():
        raise InputError("Only a run's folder knows its test rows; give rows with --data.")
    given = read_rows(args.data, args.tasks, args.rows) if args.data else None
    if args.json:
        _require_writable(args.json)  # now rather than after an hour
    model = load_model(args)
    data = given or run_rows(Path(args.adapter).expanduser(), model.description.data, args.tasks, args.rows)
    from mops_fl.encoding import RowEncoder
    from mops_fl.evaluation import by_length, evaluate

    encoder = RowEncoder(model.tokenizer, _encoding(model, args), data.tasks)
    encoded = by_length(map(encoder.encode, data.rows))
    if not args.no_generation:
        longest = max(encoded, key=lambda row: row.prompt_length)
        require_room(model, model.pad([longest.token_ids[: longest.prompt_length]]), args.max_new_tokens)
    evaluation = evaluate(model.adaptable, model.adapter, encoded, data.tasks)
    answers = {} if args.no_generation else answer_rows(model, encoded, args.max_new_tokens, args.batch_size)
    scores = score_answers(answers, data)
    truncated = sum(row.truncated for row in encoded)
    console = Console()
    try:
        if args.json:
            content = only_finite(_to_json(args, evaluation, scores, data, answers))
            with writing(args.json, _ADVICE, InputError):
                args.json.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    finally:  # a full disk costs the file, but not the table
        console.print(f"{len(encoded)} rows, {truncated} truncated: {data.description}", markup=False, soft_wrap=True)
        console.print(_table(evaluation, scores, data))
    return 0


def _require_writable(path: Path) -> None:
    """Refuse a file that cannot be written; one that is not there is not made, since others read an empty one."""
    is_new = not path.exists()
    with writing(path, _ADVICE, InputError):
        path.open("a").close()
        if is_new:
            path.resolve().unlink()


def _encoding(model: MopsModel, args: argparse.Namespace) -> DataConfig:
    """How rows become tokens: as in training, but for the length that is asked for.

    Raises:
        InputError: such a row would be too short for the template or too long for the backbone.
    """
    config = model.description.data
    if args.max_length is None:
        return config
    room = room_for_question(model, 0 if args.no_generation else args.max_new_tokens)
    if args.max_length > room:
        raise InputError(
            f"`max-length` is {args.max_length}, but beside prompts and answer the backbone's window has room for "
            f"{room} tokens; choose at most as many."
        )
    return replace(config, max_length=args.max_length)


def answer_rows(model: MopsModel, rows: Sequence[EncodedRow], max_new_tokens: int, batch_size: int) -> dict[int, str]:
    """Row id -> the answer of the likeliest token each time, rows of like length together."""
    answers: dict[int, str] = {}
    ordered = sorted(rows, key=lambda row: row.prompt_length)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("answering", total=len(ordered))
        for start in range(0, len(ordered), batch_size):
            batch = ordered[start : start + batch_size]
            inputs = model.pad([row.token_ids[: row.prompt_length] for row in batch])
            output = model.generate(**inputs, max_new_tokens=max_new_tokens, **GREEDY)
            texts = model.tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            answers |= {row.row_id: text.strip() for row, text in zip(batch, texts, strict=True)}
            bar.advance(task, len(batch))
    return answers


def score_answers(answers: dict[int, str], data: EvaluatedRows) -> dict[str, TextScores]:
    """The scores of each task that has answers, and of all together."""
    from mops_fl.text_metrics import score_texts

    scores = {}
    for task in (*data.tasks, ALL_TASKS) if answers else ():
        rows = [row for row in data.rows if task in (row.task, ALL_TASKS)]
        if rows:
            scores[task] = score_texts([answers[row.row_id] for row in rows], [row.references for row in rows])
    return scores


def _table(evaluation: Evaluation, scores: dict[str, TextScores], data: EvaluatedRows) -> Table:
    table = Table("task")
    for column in ("rows", "perplexity", "ROUGE-L", "exact match"):
        table.add_column(column, justify="right")
    perplexity = evaluation.perplexity()
    for task in sorted(perplexity, key=lambda task: task == ALL_TASKS):
        score = scores.get(task)
        texts = (f"{score.rouge_l:.1f}", f"{score.exact_match:.1f} %") if score else (NOTHING, NOTHING)
        if task == ALL_TASKS:
            table.add_section()
        table.add_row(escape(readable(task)), str(_count(task, data)), perplexity_text(perplexity[task]), *texts)
    return table


def _to_json(
    args: argparse.Namespace,
    evaluation: Evaluation,
    scores: dict[str, TextScores],
    data: EvaluatedRows,
    answers: dict[int, str],
) -> dict[str, Any]:
    gate = dict(zip(evaluation.tasks, evaluation.gate or (), strict=False))
    tasks: dict[str, dict[str, Any]] = {}
    for task, perplexity in evaluation.perplexity().items():
        tasks[task] = {"rows": _count(task, data), "perplexity": perplexity}
        if task in scores:
            tasks[task] |= {"rouge-l": scores[task].rouge_l, "exact-match": scores[task].exact_match}
        if task in gate:
            tasks[task]["gate"] = gate[task]
    return {
        "adapter": args.adapter,
        "data": data.description,
        "max-new-tokens": None if args.no_generation else args.max_new_tokens,
        "tasks": tasks,
        "answers": [
            {
                "task": row.task,
                "instruction": row.instruction,
                "answer": answers[row.row_id],
                "references": row.references,
            }
            for row in data.rows
            if row.row_id in answers
        ],
    }


def _count(task: str, data: EvaluatedRows) -> int:
    return sum(task in (row.task, ALL_TASKS) for row in data.rows)
