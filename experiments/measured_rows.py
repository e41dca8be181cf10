"""The rows that an adapter is measured on: those of a file, or those on which its run was measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from experiments.run_folder import ALL_TASKS, RunFolder
from mops_fl.config import DataConfig
from mops_fl.errors import InputError
from partitioning import OWN_ROWS

if TYPE_CHECKING:
    from mops_fl.data import Row, TaskData


class EvaluatedRows(NamedTuple):
    """Rows to measure on, and where they are from."""

    description: str
    tasks: tuple[str, ...]
    rows: tuple[Row, ...]


def read_rows(path: Path, wanted: str, count: int) -> EvaluatedRows:
    """Rows of a file in Dolly's columns, of a task file, or of a folder of these.

    Raises:
        InputError: there is no such file, it is not as it should be, has none of the wanted tasks, or one of them has
            the name that stands for all tasks.
    """
    from mops_fl.data import read_dolly, rows_of_tasks, spread_rows
    from mops_fl.task_choice import choose_tasks
    from mops_fl.task_files import find_task_files, read_task_file

    if path.is_dir():
        files = find_task_files(path)
        rows = tuple(
            rows_of_tasks(read_task_file(files[task]) for task in choose_tasks(wanted, list(files), str(path)) or files)
        )
    elif path.suffix == ".json":
        rows = tuple(rows_of_tasks([read_task_file(path)]))
    else:
        rows = tuple(read_dolly(path, any_task=True))
    available = tuple(dict.fromkeys(row.task for row in rows))
    tasks = choose_tasks(wanted, available, str(path)) or available
    if ALL_TASKS in tasks:
        raise InputError(f"{path} has a task named {ALL_TASKS!r}, which stands for all tasks together; rename it.")
    rows = spread_rows([row for row in rows if row.task in tasks], count)
    if not rows:
        raise InputError(f"{path} has no rows; give a file that has some.")
    return EvaluatedRows(path.name, tasks, rows)


def run_rows(run: Path, data_config: DataConfig, wanted: str, count: int) -> EvaluatedRows:
    """The test rows on which a run measured its perplexity.

    Args:
        run: its folder, which knows where its data lay and how many rows were measured on.
        data_config: the rest, of its adapter.
        wanted: only these tasks, comma-separated, wildcards allowed; empty: all.
        count: only so many; 0: all of them.

    Raises:
        InputError: as `run_data`, or there is no such task.
    """
    from mops_fl.data import spread_rows
    from mops_fl.task_choice import choose_tasks

    folder = RunFolder.open(run)
    data = run_data(folder, data_config)
    tasks = choose_tasks(wanted, data.tasks, str(run)) or data.tasks
    rows = [row for row in data.evaluation_rows(int(folder.config["eval-rows"])) if row.task in tasks]
    return EvaluatedRows(f"the run's test rows, {data.description}", tasks, spread_rows(rows, count))


def run_data(run: RunFolder, data_config: DataConfig) -> TaskData:
    """The rows that a run trained and measured on.

    Args:
        run: knows where its data lay.
        data_config: the rest.

    Raises:
        InputError: they are not there any more, are others now, or only the run's clients had them.
    """
    from mops_fl.data import load_task_data
    from mops_fl.own_rows import load_server_rows

    if run.config.get("evaluate-on") == "clients":
        raise InputError(f"{run.path} was measured on rows that its clients keep, which nobody else has.")
    config = replace(data_config, data_path=str(run.config["data-path"]))
    own_rows = run.config.get("partitioner") == OWN_ROWS
    data = load_server_rows(config, with_test=True) if own_rows else load_task_data(config)
    if (run.summary or {}).get("data_sha256", data.sha256) != data.sha256:
        raise InputError(
            f"The rows of {run.path} are no longer there, others are ({data.description}); bring them back."
        )
    return data
