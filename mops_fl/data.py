"""Rows with a task: Dolly-15k or Super-NI task files, and the draw into train, test and server rows."""

import gzip
import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mops_fl.config import DataConfig
from mops_fl.errors import InputError
from mops_fl.sources import DataSource, resolve_data
from mops_fl.task_choice import choose_tasks, list_tasks
from mops_fl.task_files import TaskFile, default_tasks, find_task_files, read_task_file, require_characters

# The paper's seven; `general_qa`, Dolly's eighth, is not used.
DOLLY_TASKS = (
    "creative_writing",
    "closed_qa",
    "open_qa",
    "summarization",
    "information_extraction",
    "classification",
    "brainstorming",
)
DOLLY_UNUSED = ("general_qa",)


@dataclass(frozen=True)
class Row:
    """One example.

    Attributes:
        row_id: its place among the loaded rows, unique over all splits.
        instruction: what is asked.
        context: the passage it is asked about, empty if there is none.
        response: the answer.
        task: name of its task.
        further_references: other answers that count as right; Dolly's rows have none.
    """

    row_id: int
    instruction: str
    context: str
    response: str
    task: str
    further_references: tuple[str, ...] = ()

    @property
    def sha256(self) -> str:
        """Of its texts, by which it is known again in another draw or file."""
        return hashlib.sha256(repr((self.instruction, self.context, self.response)).encode()).hexdigest()

    @property
    def references(self) -> tuple[str, ...]:
        """Every answer that counts as right, the one to train on first."""
        return (self.response, *self.further_references)


@dataclass(frozen=True)
class TaskData:
    """The rows of an experiment; no row is in two of the four parts.

    Attributes:
        tasks: task names, those held out last; a row's label is its task's index here.
        train: rows dealt to the clients.
        test: rows that measure, those of held-out tasks too.
        server: rows the server holds for pretraining and calibration.
        held_out: rows of held-out tasks that nobody has; empty if no task is held out.
        description: one line on where they come from, which tasks were chosen, and what they are short of.
        is_sample: they are the bundled sample, not a real data set.
        num_held_out: tasks held out, whether or not there are rows of them.
    """

    tasks: tuple[str, ...]
    train: tuple[Row, ...]
    test: tuple[Row, ...]
    server: tuple[Row, ...]
    held_out: tuple[Row, ...]
    description: str
    is_sample: bool
    num_held_out: int = 0

    @property
    def trained_tasks(self) -> tuple[str, ...]:
        """The tasks that are not held out."""
        return self.tasks[: len(self.tasks) - self.num_held_out]

    @property
    def sha256(self) -> str:
        """Of all rows and of which part each is in."""
        return hashlib.sha256(repr((self.train, self.test, self.server, self.held_out)).encode()).hexdigest()

    def evaluation_rows(self, count: int) -> tuple[Row, ...]:
        """The first `count` test rows, spread evenly over the tasks; all of them for 0."""
        return spread_rows(self.test, count)


def spread_rows(rows: Sequence[Row], count: int) -> tuple[Row, ...]:
    """The first `count` rows, spread evenly over their tasks; all of them for 0."""
    if count == 0 or count >= len(rows):
        return tuple(rows)
    seen: Counter[str] = Counter()
    ranked = []
    for row in rows:
        ranked.append((seen[row.task], row.row_id, row))
        seen[row.task] += 1
    return tuple(row for _, _, row in sorted(ranked)[:count])


def load_task_data(config: DataConfig) -> TaskData:
    """Load the configured data set and draw its parts.

    Raises:
        InputError: no such file or folder, a line or a task file that is not as it should be, a row without
            instruction or response, a task that is not there or has too few rows.
    """
    source, tasks, rows = load_rows(config)
    train, test, server = draw_parts(rows, tasks, config)
    description = f"{source.description}{_shortfall(train + test, server, tasks, config)}"
    return without_held_out(TaskData(tasks, train, test, server, (), description, source.is_sample), config)


def load_rows(config: DataConfig, data_path: str | None = None) -> tuple[DataSource, tuple[str, ...], list[Row]]:
    """The configured data set, or that of the same kind at another path: whence it comes, its tasks, all their rows.

    Raises:
        InputError: as `load_task_data`, except for what it says of too few rows.
    """
    source = resolve_data(config.dataset, config.data_path if data_path is None else data_path)
    load = {"dolly": _load_dolly, "super-ni": _load_task_files}[config.dataset]
    tasks, rows = load(source.path, config.tasks)
    chosen = "" if tasks == DOLLY_TASKS else f", {len(tasks)} tasks ({list_tasks(tasks)})"
    return replace(source, description=f"{source.description}{chosen}"), tasks, rows


def without_held_out(data: TaskData, config: DataConfig) -> TaskData:
    """The same data with the configured `held_out_tasks` only tested.

    Raises:
        InputError: no task would be left to train on, or there is none of such a name.
    """
    unseen = choose_tasks(config.held_out_tasks, data.tasks, "those chosen", key="held-out-tasks")
    if set(unseen) == set(data.tasks):
        raise InputError("`held-out-tasks` names every task; leave at least one to train on.")
    return hold_out(data, unseen) if unseen else data


def hold_out(data: TaskData, unseen: tuple[str, ...]) -> TaskData:
    """The same data with some tasks only tested; every row stays in the part that it was drawn for, or leaves it."""
    seen = tuple(task for task in data.tasks if task not in unseen)
    return replace(
        data,
        tasks=seen + unseen,
        train=tuple(row for row in data.train if row.task in seen),
        server=tuple(row for row in data.server if row.task in seen),
        held_out=tuple(row for row in data.train + data.server if row.task in unseen),
        description=f"{data.description}, held out from training: {list_tasks(unseen)}",
        num_held_out=len(unseen),
    )


def rows_of_tasks(files: Iterable[TaskFile]) -> Iterator[Row]:
    """A row for each instance: definition, input and first output; exact duplicates within a task are dropped."""
    row_id = 0
    for file in files:
        seen: set[tuple[str, str]] = set()
        for instance in file.instances:
            response, *further = instance.references
            if (instance.text, response) not in seen:
                seen.add((instance.text, response))
                yield Row(row_id, file.definition, instance.text, response, file.name, tuple(further))
            row_id += 1


def read_dolly(path: Path, *, any_task: bool = False) -> Iterator[Row]:
    """Read the seven tasks of a `.jsonl` or `.jsonl.gz` in Dolly's columns; exact duplicates are dropped.

    Args:
        path: the file.
        any_task: whether `category` may be anything, and all rows are wanted.

    Raises:
        InputError: names the file and the line that is wrong.
    """
    seen: set[tuple[str, str, str]] = set()
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                row = _parse_dolly_line(line, number, path, any_task)
                if row is not None and (row.instruction, row.context, row.response) not in seen:
                    seen.add((row.instruction, row.context, row.response))
                    yield row
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise InputError(f"{path} cannot be read ({error}); fetch or copy it again.") from error


def draw_parts(
    rows: Sequence[Row], tasks: Sequence[str], config: DataConfig
) -> tuple[tuple[Row, ...], tuple[Row, ...], tuple[Row, ...]]:
    """Draw train, test and server rows, stratified by task, by `data_seed`.

    In a set too small for `num_rows + server_rows` both shares shrink alike.

    Raises:
        InputError: a task has too few rows to be trained on and tested, or the server's are fewer than the tasks.
    """
    by_task = shuffled_by_task(rows, tasks, config.data_seed)
    fit = min(1.0, len(rows) / (config.num_rows + config.server_rows))
    used = apportion(int(fit * config.num_rows), [len(members) for members in by_task.values()])
    tested = apportion(round(config.test_fraction * sum(used)), used)
    server_quota = int(fit * config.server_rows) // len(tasks)
    if config.server_rows and not server_quota:
        raise InputError(
            f"`server-rows` is {config.server_rows}, which with {len(rows)} rows of {len(tasks)} tasks leaves the "
            "server none of each; raise it, lower `num-rows`, give more data, or set it to 0."
        )
    train: list[Row] = []
    test: list[Row] = []
    server: list[Row] = []
    for (task, members), num_used, num_test in zip(by_task.items(), used, tested, strict=True):
        if num_test == 0 or num_test == num_used:
            raise InputError(
                f"Task {task!r} has {len(members)} rows, too few to train and test on with num-rows = "
                f"{config.num_rows}; give more data or raise num-rows."
            )
        test += members[:num_test]
        train += members[num_test:num_used]
        server += members[num_used : num_used + server_quota]
    return tuple(train), tuple(test), tuple(server)


def shuffled_by_task(rows: Sequence[Row], tasks: Iterable[str], seed: int) -> dict[str, list[Row]]:
    """The rows of each task in an order that depends on the seed, and on how many rows the tasks before it have."""
    rng = np.random.default_rng(seed)
    by_task = {task: [row for row in rows if row.task == task] for task in tasks}
    return {task: [members[i] for i in rng.permutation(len(members))] for task, members in by_task.items()}


def apportion(total: int, sizes: Sequence[int]) -> list[int]:
    """Share `total` out in proportion to `sizes`, by largest remainders, so that it adds up exactly."""
    exact = np.array(sizes) * total / max(sum(sizes), 1)
    shares = np.floor(exact).astype(int)
    largest_remainders = np.argsort(shares - exact, kind="stable")
    shares[largest_remainders[: total - shares.sum()]] += 1
    return [int(share) for share in shares]


def _load_dolly(path: Path, wanted: str) -> tuple[tuple[str, ...], list[Row]]:
    tasks = choose_tasks(wanted, DOLLY_TASKS, "Dolly") or DOLLY_TASKS
    return tasks, [row for row in read_dolly(path) if row.task in tasks]


def _load_task_files(folder: Path, wanted: str) -> tuple[tuple[str, ...], list[Row]]:
    files = find_task_files(folder)
    tasks = choose_tasks(wanted, list(files), str(folder)) or default_tasks(files, folder)
    return tasks, list(rows_of_tasks(read_task_file(files[task]) for task in tasks))


def _shortfall(used: Sequence[Row], server: Sequence[Row], tasks: Sequence[str], config: DataConfig) -> str:
    """What was asked for and not there, as text to append; empty if nothing."""
    per_task = config.server_rows // len(tasks)
    counts = Counter(row.task for row in server)
    fewest = min(tasks, key=lambda task: counts[task])
    text = f", {len(used)} instead of {config.num_rows} rows" if len(used) < config.num_rows else ""
    if counts[fewest] < per_task:
        text += f", the server has {counts[fewest]} instead of {per_task} of {fewest}"
    return text


def _parse_dolly_line(line: str, number: int, path: Path, any_task: bool) -> Row | None:
    where = f"Line {number} of {path}"
    try:
        fields: dict[str, Any] = json.loads(line)
        instruction, context, response, task = (
            fields[name].strip() for name in ("instruction", "context", "response", "category")
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{where} is not a JSON object with the texts instruction, context, response and category; "
            "correct or remove it."
        ) from error
    require_characters(where, instruction, context, response, task)
    if task in DOLLY_UNUSED and not any_task:
        return None
    if task not in DOLLY_TASKS and not (any_task and task):
        raise InputError(f"{where} has the unknown task {task!r}; known are: {', '.join(DOLLY_TASKS + DOLLY_UNUSED)}.")
    if not instruction or not response:
        raise InputError(f"{where} has no {'response' if instruction else 'instruction'}; correct or remove it.")
    return Row(number - 1, instruction, context, response, task)
