"""`mops-fl grow`: one more expert for a task that nobody trained on, from few rows, the others staying as they are."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from experiments.adapter_options import require_seed
from experiments.durable import writing
from experiments.measured_rows import run_data
from experiments.measurements import PerplexityRow
from experiments.run_folder import ALL_TASKS, RunFolder, only_finite, require_empty
from experiments.wording import percent_text, perplexity_text, readable
from mops_fl.config import DataConfig, read_section, require_at_least, require_positive
from mops_fl.errors import InputError

if TYPE_CHECKING:
    from mops_fl.data import TaskData
    from mops_fl.evaluation import Evaluation
    from mops_fl.mops_model import MopsModel

GROWTH = "growth.json"
# Most bytes of frozen states that are kept: each row is looked at before and after.
CACHE_BYTES = 1 << 30


@dataclass(frozen=True)
class Growth:
    """What came of it.

    Attributes:
        task: the new one.
        rows: labelled rows that the new expert learnt from.
        steps: its steps.
        lr: its Adam learning rate.
        seed: of the choice and the order of rows.
        perplexity_before: per task and for `all`, with the adapter as it was.
        perplexity: likewise, afterwards.
        new_expert: mean gate score of the new expert on the test rows of each task.
    """

    task: str
    rows: int
    steps: int
    lr: float
    seed: int
    perplexity_before: dict[str, float]
    perplexity: dict[str, float]
    new_expert: dict[str, float]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `grow`."""
    parser.add_argument("run_folder", metavar="RUN", type=Path, help="a run of MoPs with held-out-tasks")
    parser.add_argument("--task", metavar="NAME", help="which of them (default: the first)")
    parser.add_argument("--rows", metavar="N", type=int, default=16, help="to learn from (default: %(default)s)")
    parser.add_argument("--steps", metavar="N", type=int, default=50, help="(default: %(default)s)")
    parser.add_argument("--lr", metavar="RATE", type=float, default=0.001, help="(default: %(default)s)")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--output", metavar="DIR", type=Path, help="the new adapter's folder (default: RUN-TASK)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Grow, print a table, write the new adapter.

    Returns:
        The exit code, 0.

    Raises:
        InputError: the run has no gate or no such held-out task, its rows are not there, the server has none, an option
            is out of range, or the folder is taken or cannot be written.
    """
    require_at_least("rows", args.rows, 1)
    require_at_least("steps", args.steps, 1)
    require_positive("lr", args.lr)
    require_seed(args.seed)
    folder = RunFolder.open(args.run_folder.resolve())  # `.` has no name
    if folder.config.get("method") != "mops" or folder.config.get("routing") != "gate":
        raise InputError(f"{folder.path} has no gate to grow; name a run of MoPs with routing gate.")
    data = run_data(folder, read_section(DataConfig, folder.config))
    held_out = data.tasks[len(data.trained_tasks) :]
    task = args.task or next(iter(held_out), "")
    if task not in held_out:
        known = ", ".join(held_out) or "none; train one with the key held-out-tasks"
        raise InputError(f"{task or 'No task'!r} is not among the held-out tasks of {folder.path}: {known}.")
    if not data.server:
        raise InputError(
            f"The server of {folder.path} has no rows to tell {task!r} from; train a run with server-rows above 0."
        )
    if not any(row.task == task for row in data.held_out):
        raise InputError(
            f"The server of {folder.path} has no row of {task!r} to learn from; train a run with more server-rows, or "
            "choose another --task."
        )
    output = args.output or folder.path.with_name(f"{folder.path.name}-{task}")
    require_empty(output)
    with writing(output, "choose another --output", InputError):
        output.mkdir(parents=True, exist_ok=True)  # before the minutes of training
    grown, growth = _grow(folder, data, task, args)
    with writing(output, "choose another --output", InputError):
        grown.save_pretrained(output)
        (output / GROWTH).write_text(json.dumps(only_finite(asdict(growth)), indent=2) + "\n", encoding="utf-8")
    console = Console(soft_wrap=True)
    console.print(_table(growth, data.tasks))
    console.print(f"adapter: {output}", markup=False, highlight=False)
    return 0


def _grow(folder: RunFolder, data: TaskData, task: str, args: argparse.Namespace) -> tuple[MopsModel, Growth]:
    import torch

    from mops_fl.adapter_folder import SavedAdapter
    from mops_fl.encoding import RowEncoder
    from mops_fl.evaluation import by_length, evaluate
    from mops_fl.growth import grow
    from mops_fl.model import PromptedModel
    from mops_fl.mops_model import MopsModel
    from mops_fl.payload import INPUT_PROMPTS
    from mops_fl.state_cache import StateCache

    before = MopsModel.from_pretrained(folder.path)
    description, config = before.description, before.description.adapter
    encode = RowEncoder(before.tokenizer, description.data, data.tasks).encode
    generator = torch.Generator().manual_seed(args.seed)
    labelled = [row for row in data.held_out if row.task == task]
    order = torch.randperm(len(labelled), generator=generator)[: args.rows].tolist()
    few = [encode(labelled[index]) for index in order]
    server = [encode(row) for row in data.server]
    test = by_length(map(encode, data.evaluation_rows(int(folder.config["eval-rows"]))))

    state = before.adapter.states()[0]
    cache = StateCache(CACHE_BYTES)
    assert isinstance(before.adaptable, PromptedModel)
    input_prompts = before.adaptable.input_prompts
    grown_config = replace(config, num_experts=config.num_experts + 1)
    model, grown_model = (PromptedModel(before.backbone, of, input_prompts, cache) for of in (config, grown_config))
    old = evaluate(model, model.adapter([state]), test, data.tasks)
    grown = grow(
        model, grown_model, state, few, server, config,
        num_old_tasks=len(data.trained_tasks), num_steps=args.steps, lr=args.lr, generator=generator,
    )  # fmt: skip
    new = evaluate(grown_model, grown_model.adapter([grown]), test, data.tasks)

    experts = (*(description.experts or ((),) * config.num_experts), (task,))
    arrays = {name: tensor.numpy() for name, tensor in {**grown, INPUT_PROMPTS: input_prompts.cpu()}.items()}
    card = f"{folder.path.name} with one more expert, for {readable(task)}, from {len(few)} rows.\n"
    saved = SavedAdapter(replace(description, adapter=grown_config, experts=experts), arrays, card)
    growth = Growth(
        task, len(few), args.steps, args.lr, args.seed, old.perplexity(), new.perplexity(), _new_expert(new)
    )  # fmt: skip
    return MopsModel(before.backbone, saved), growth


def _new_expert(evaluation: Evaluation) -> dict[str, float]:
    """Mean score of the last expert, per task."""
    scores: Any = evaluation.gate
    return {task: of_task[-1] for task, of_task in zip(evaluation.tasks, scores, strict=True)}


def _table(growth: Growth, tasks: tuple[str, ...]) -> Table:
    title = f"Test perplexity with an expert more, for {readable(growth.task)} ({growth.rows} rows)"
    table = Table(title=escape(title))
    table.add_column("task")
    for column in ("before", "after", "change", "new expert's score"):
        table.add_column(column, justify="right")
    for task in (*tasks, ALL_TASKS):
        if task not in growth.perplexity:
            continue
        row = PerplexityRow(task, None, growth.perplexity_before[task], growth.perplexity[task])
        if task == ALL_TASKS:
            table.add_section()
        score = f"{growth.new_expert[task]:.2f}" if task in growth.new_expert else ""
        style = "bold" if task == growth.task else None
        figures = (perplexity_text(row.before), perplexity_text(row.after), percent_text(row.change_percent), score)
        table.add_row(escape(readable(task)), *figures, style=style)
    return table
