"""Rows where nobody has everyone's: the server has its own for pretraining, each client its own to train on."""

from collections.abc import Sequence

from mops_fl.config import DataConfig
from mops_fl.data import (
    Row,
    TaskData,
    apportion,
    hold_out,
    load_rows,
    rows_of_tasks,
    shuffled_by_task,
    without_held_out,
)
from mops_fl.errors import InputError
from mops_fl.sources import resolve_data
from mops_fl.task_choice import list_tasks, present_tasks
from mops_fl.task_files import default_tasks, find_task_files, read_task_file


def load_server_rows(config: DataConfig, *, with_test: bool) -> TaskData:
    """The server's own data set: up to `server_rows` rows to pretrain on and, if it measures, its test rows.

    The test rows are as many as of a shared set, `test_fraction` of `num_rows`; in a set too small for both, both
    shares shrink alike.

    Raises:
        InputError: as `mops_fl.data.load_task_data`.
    """
    source, tasks, rows = load_rows(config)
    num_test = round(config.test_fraction * config.num_rows) if with_test else 0
    fit = min(1.0, len(rows) / max(1, num_test + config.server_rows))
    by_task = shuffled_by_task(rows, tasks, config.data_seed)
    sizes = [len(members) for members in by_task.values()]
    tested, kept = (apportion(int(fit * total), sizes) for total in (num_test, config.server_rows))
    test: list[Row] = []
    server: list[Row] = []
    for (task, members), of_test, of_server in zip(by_task.items(), tested, kept, strict=True):
        if with_test and not of_test:
            raise InputError(f"{source.path} has too few rows of {task!r} to measure on; give more, or raise num-rows.")
        test += members[:of_test]
        server += members[of_test : of_test + of_server]
    data = TaskData(tasks, (), tuple(test), tuple(server), (), source.description, source.is_sample)
    return without_held_out(data, config)


def load_own_rows(config: DataConfig, path: str) -> TaskData:
    """All rows of a client's own file or folder, as training rows; it may lack tasks, or have held-out ones only.

    Raises:
        InputError: as `mops_fl.data.load_task_data`, or there is no row of the configured tasks.
    """
    source = resolve_data(config.dataset, path)
    if config.dataset == "dolly":
        _, tasks, rows = load_rows(config, path)
    else:
        files = find_task_files(source.path)
        tasks = present_tasks(config.tasks, list(files)) if config.tasks else default_tasks(files, source.path)
        rows = list(rows_of_tasks(read_task_file(files[task]) for task in tasks))
    if not rows:
        wanted = list_tasks(tasks) or config.tasks
        raise InputError(f"{source.path} has no row of the tasks {wanted}; give rows of at least one.")
    data = TaskData(tasks, tuple(rows), (), (), (), source.description, is_sample=False)
    unseen = present_tasks(config.held_out_tasks, tasks)
    return hold_out(data, unseen) if unseen else data


def keep_back(rows: Sequence[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Part a client's rows, task by task, into those it trains on and those it is measured on.

    Of a task with at least two rows, at least one is kept for each.
    """
    train: list[Row] = []
    kept_back: list[Row] = []
    for members in shuffled_by_task(rows, sorted({row.task for row in rows}), seed).values():
        num_kept_back = min(max(1, round(fraction * len(members))), len(members) - 1)
        kept_back += members[:num_kept_back]
        train += members[num_kept_back:]
    return train, kept_back
