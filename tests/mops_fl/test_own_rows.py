import json
from collections import Counter

import pytest

from mops_fl.data import DOLLY_TASKS, Row
from mops_fl.errors import InputError
from mops_fl.own_rows import keep_back, load_own_rows, load_server_rows
from mops_fl.task_choice import present_tasks


def dolly_file(path, per_task):
    lines = [
        {"instruction": f"{task} {n}", "context": "", "response": "yes", "category": task}
        for task, count in per_task.items()
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(path)


def task_files(folder, sizes):
    folder.mkdir()
    for task, size in sizes.items():
        instances = [{"input": f"{task} {n}", "output": ["yes"]} for n in range(size)]
        content = {"Definition": ["Do it."], "Instances": instances}
        (folder / f"{task}.json").write_text(json.dumps(content), encoding="utf-8")
    return str(folder)


def rows(**per_task):
    return [Row(100 * i + n, "?", "", "!", task) for i, (task, c) in enumerate(per_task.items()) for n in range(c)]


def counts(part):
    return Counter(row.task for row in part)


def test_rows_held_out_are_a_share_of_each_task_and_leave_some_of_it():
    own = rows(a=20, b=3, c=1)
    train, held_out = keep_back(own, 0.1, seed=0)
    assert counts(held_out) == {"a": 2, "b": 1}
    assert sorted(row.row_id for row in train + held_out) == sorted(row.row_id for row in own)
    assert keep_back(own, 0.9, seed=0)[0] != []
    assert counts(keep_back(own, 0.99, seed=0)[0]) == {"a": 1, "b": 1, "c": 1}


def test_rows_held_out_are_fixed_by_the_seed():
    own = rows(a=50)
    assert keep_back(own, 0.2, seed=1) == keep_back(own, 0.2, seed=1)
    assert keep_back(own, 0.2, seed=1)[1] != keep_back(own, 0.2, seed=2)[1]


def test_server_takes_no_row_to_train_clients_on(tmp_path, data_config):
    path = dolly_file(tmp_path / "server.jsonl", dict.fromkeys(DOLLY_TASKS, 40))
    config = data_config(data_path=path, num_rows=700, test_fraction=0.1, server_rows=140)
    data = load_server_rows(config, with_test=True)
    assert data.train == ()
    assert counts(data.test) == dict.fromkeys(DOLLY_TASKS, 10)
    assert counts(data.server) == dict.fromkeys(DOLLY_TASKS, 20)
    assert not {row.row_id for row in data.test} & {row.row_id for row in data.server}
    assert load_server_rows(config, with_test=False).test == ()


def test_server_with_few_rows_uses_all_of_them(tmp_path, data_config):
    path = dolly_file(tmp_path / "server.jsonl", {DOLLY_TASKS[0]: 6, DOLLY_TASKS[1]: 4})
    data = load_server_rows(data_config(data_path=path, num_rows=5000, server_rows=700), with_test=False)
    assert counts(data.server) == {DOLLY_TASKS[0]: 6, DOLLY_TASKS[1]: 4}
    with pytest.raises(InputError, match="too few rows of 'open_qa' to measure on"):
        load_server_rows(data_config(data_path=path, num_rows=5000, server_rows=700), with_test=True)


def test_own_rows_are_all_for_training_and_may_lack_tasks(tmp_path, data_config):
    path = dolly_file(tmp_path / "own.jsonl", {DOLLY_TASKS[2]: 3, DOLLY_TASKS[5]: 1})
    data = load_own_rows(data_config(num_rows=2), path)
    assert counts(data.train) == {DOLLY_TASKS[2]: 3, DOLLY_TASKS[5]: 1}
    assert (data.test, data.server, data.is_sample) == ((), (), False)
    assert counts(load_own_rows(data_config(tasks=DOLLY_TASKS[5]), path).train) == {DOLLY_TASKS[5]: 1}


def test_rows_of_held_out_tasks_train_nobody(tmp_path, data_config):
    path = dolly_file(tmp_path / "rows.jsonl", dict.fromkeys(DOLLY_TASKS, 10))
    config = data_config(data_path=path, held_out_tasks="open_qa", num_rows=70, test_fraction=0.5, server_rows=35)
    assert set(counts(load_own_rows(config, path).train)) == set(DOLLY_TASKS) - {"open_qa"}
    server = load_server_rows(config, with_test=True)
    assert "open_qa" not in counts(server.server)
    assert counts(server.test)["open_qa"] == 5
    lacking = dolly_file(tmp_path / "lacking.jsonl", {"closed_qa": 2})
    assert counts(load_own_rows(config, lacking).train) == {"closed_qa": 2}


def test_task_is_held_out_even_where_there_are_no_rows_of_it(tmp_path, data_config):
    path = dolly_file(tmp_path / "rows.jsonl", dict.fromkeys(DOLLY_TASKS, 10))
    config = data_config(data_path=path, held_out_tasks="open_qa", num_rows=70, test_fraction=0.5, server_rows=0)
    data = load_server_rows(config, with_test=True)
    assert (data.server, data.held_out) == ((), ())
    assert data.trained_tasks == tuple(task for task in DOLLY_TASKS if task != "open_qa")
    lacking = dolly_file(tmp_path / "lacking.jsonl", {"closed_qa": 2})
    assert load_own_rows(config, lacking).trained_tasks == data.trained_tasks


def test_own_folder_of_task_files_may_lack_tasks_that_are_named(tmp_path, data_config):
    path = task_files(tmp_path / "own", {"task1_add": 3, "task2_long": 2, "task3_other": 4})
    config = data_config(dataset="super-ni", tasks="task1, task9_missing, *_long")
    assert counts(load_own_rows(config, path).train) == {"task1_add": 3, "task2_long": 2}
    everything = load_own_rows(data_config(dataset="super-ni"), path)
    assert everything.tasks == ("task1_add", "task2_long", "task3_other")


@pytest.mark.parametrize(("dataset", "task"), [("dolly", "open_qa"), ("super-ni", "task1_add")])
def test_own_rows_of_held_out_tasks_alone_leave_nothing_to_train_on(tmp_path, data_config, dataset, task):
    write, name = {"dolly": (dolly_file, "own.jsonl"), "super-ni": (task_files, "own")}[dataset]
    data = load_own_rows(data_config(dataset=dataset, held_out_tasks=task), write(tmp_path / name, {task: 2}))
    assert data.train == ()
    assert counts(data.held_out) == {task: 2}
    assert task not in data.trained_tasks


@pytest.mark.parametrize(
    ("dataset", "tasks", "complaint"),
    [
        ("dolly", "brainstorming", "no row of the tasks brainstorming"),
        ("super-ni", "task9", "no row of the tasks task9"),
    ],
)
def test_nothing_of_the_named_tasks_is_refused(tmp_path, data_config, dataset, tasks, complaint):
    if dataset == "dolly":
        path = dolly_file(tmp_path / "own.jsonl", {"open_qa": 2})
    else:
        path = task_files(tmp_path / "own", {"task1_add": 3})
    with pytest.raises(InputError, match=complaint):
        load_own_rows(data_config(dataset=dataset, tasks=tasks), path)


def test_present_tasks_are_those_that_a_word_means():
    assert present_tasks("b, x*, task1", ("a", "b", "b_2", "task1_y", "task12")) == ("b", "b_2", "task1_y")
    assert present_tasks("", ("a",)) == ()
