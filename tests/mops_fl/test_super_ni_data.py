import json
from collections import Counter

import pytest

from mops_fl import sources
from mops_fl.data import DOLLY_TASKS, Row, load_task_data, rows_of_tasks
from mops_fl.errors import InputError
from mops_fl.task_files import PAPER_TASKS, Instance, TaskFile

SIZES = {"task01_add": 60, "task02_long": 120, "task03_few": 24}


@pytest.fixture
def folder(tmp_path):
    """Three task files of 60, 120 and 24 instances, every third with a second reference."""
    return write_tasks(tmp_path / "mine", SIZES)


def write_tasks(folder, sizes):
    (folder / "tasks").mkdir(parents=True)
    for task, size in sizes.items():
        instances = [
            {"id": f"{task}-{i}", "input": f"{task} {i}", "output": [f"{i}", "also"][: 2 if i % 3 == 0 else 1]}
            for i in range(size)
        ]
        content = {"Definition": [f"Do {task}."], "Positive Examples": [], "Instances": instances}
        (folder / "tasks" / f"{task}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


@pytest.fixture
def load(folder, data_config):
    def make(**changes):
        values = {"num_rows": 102, "server_rows": 30, **changes}
        return load_task_data(data_config(dataset="super-ni", data_path=str(folder), **values))

    return make


def counts(rows):
    return Counter(row.task for row in rows)


# Rows


def test_row_is_definition_input_and_first_reference_and_keeps_the_others():
    file = TaskFile("task1_x", "Name it.", (Instance("red?", ("red", "rouge", "rot")), Instance("blue?", ("blue",))))
    rows = list(rows_of_tasks([file]))
    assert rows == [
        Row(0, "Name it.", "red?", "red", "task1_x", ("rouge", "rot")),
        Row(1, "Name it.", "blue?", "blue", "task1_x"),
    ]
    assert [row.references for row in rows] == [("red", "rouge", "rot"), ("blue",)]


def test_exact_duplicates_are_dropped_within_a_task_and_what_differs_is_kept():
    instances = (Instance("a", ("1",)), Instance("a", ("2",)), Instance("b", ("1",)), Instance("a", ("1", "one")))
    rows = list(rows_of_tasks([TaskFile("task1", "Do.", instances), TaskFile("task2", "Do.", instances[:1])]))
    assert [(row.row_id, row.task, row.context, row.response) for row in rows] == [
        (0, "task1", "a", "1"),
        (1, "task1", "a", "2"),
        (2, "task1", "b", "1"),
        (4, "task2", "a", "1"),
    ]


def test_rows_of_dolly_have_their_response_as_the_one_reference(data_config):
    rows = load_task_data(data_config(num_rows=210, server_rows=35)).test
    assert all(row.references == (row.response,) for row in rows)


# The draw


def test_parts_share_no_row_and_follow_the_tasks_sizes(load):
    data = load()
    assert data.tasks == tuple(SIZES)
    assert counts(data.train) + counts(data.test) == {"task01_add": 30, "task02_long": 60, "task03_few": 12}
    assert counts(data.test) == {"task01_add": 3, "task02_long": 6, "task03_few": 1}
    assert counts(data.server) == dict.fromkeys(SIZES, 10)
    everything = [*data.train, *data.test, *data.server]
    assert len({row.row_id for row in everything}) == len({row.context for row in everything}) == 132
    assert not data.is_sample


def test_draw_is_set_by_the_data_seed(load):
    assert load() == load()
    assert {row.row_id for row in load(data_seed=1).test} != {row.row_id for row in load().test}


def test_description_says_where_the_rows_come_from_and_which_tasks_they_are(load):
    assert load().description == "task files of mine (data-path), 3 tasks (task01_add, task02_long, task03_few)"


def test_description_says_what_there_is_too_little_of(load):
    # 204 rows for 204 + 204: half of each, so 34 of each task for the server, of the smallest only what is left.
    assert load(num_rows=204, server_rows=204).description.endswith(
        "), 102 instead of 204 rows, the server has 12 instead of 68 of task03_few"
    )


def test_task_too_small_for_its_share_of_the_server_is_said_even_where_there_are_enough_rows(load):
    data = load(num_rows=102, server_rows=60)
    assert counts(data.server) == {"task01_add": 20, "task02_long": 20, "task03_few": 12}
    assert data.description.endswith("), the server has 12 instead of 20 of task03_few")


def test_task_that_the_draw_leaves_too_few_rows_is_refused_by_name(load):
    with pytest.raises(InputError, match="Task 'task03_few' has 24 rows, too few to train and test on with num-rows ="):
        load(num_rows=20)


# Which tasks


def test_tasks_are_those_named_in_the_order_named(load):
    data = load(tasks="task03, *add", num_rows=40, server_rows=0)
    assert data.tasks == ("task03_few", "task01_add")
    assert set(counts([*data.train, *data.test])) == {"task03_few", "task01_add"}
    assert "2 tasks (task03_few, task01_add)" in data.description


def test_task_file_that_is_not_chosen_is_not_read(load, folder):
    (folder / "tasks/task04_broken.json").write_text("{")
    assert load(tasks="task01,task02").tasks == ("task01_add", "task02_long")
    with pytest.raises(InputError, match=r"task04_broken\.json cannot be read"):
        load()


def test_unknown_task_is_refused_with_the_folder(load, folder):
    with pytest.raises(InputError, match=f"names 'task09', but there is no such task in {folder}"):
        load(tasks="task09")


def test_papers_seven_are_used_where_all_are_there(tmp_path, data_config):
    sizes = dict.fromkeys([*PAPER_TASKS, "task999_another"], 20)
    folder = write_tasks(tmp_path / "checkout", sizes)
    config = data_config(dataset="super-ni", data_path=str(folder), num_rows=70, server_rows=14)
    assert load_task_data(config).tasks == PAPER_TASKS


def test_tasks_of_dolly_can_be_chosen_too(data_config):
    data = load_task_data(data_config(tasks="open_qa, *writing", num_rows=60, server_rows=20))
    assert data.tasks == ("open_qa", "creative_writing")
    assert set(counts([*data.train, *data.test, *data.server])) == {"open_qa", "creative_writing"}
    assert data.description.endswith(", 2 tasks (open_qa, creative_writing)")
    halves = load_task_data(data_config(tasks="open_qa, *writing", num_rows=120, server_rows=120))
    assert len(halves.server) == 60, "120 rows of the two tasks for 240, whatever the other five have"
    with pytest.raises(InputError, match=f"no such task in Dolly: {', '.join(DOLLY_TASKS)}"):
        load_task_data(data_config(tasks="general_qa"))


# Where the folder is


def test_folder_comes_from_data_path_before_the_variable_before_the_cache(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("MOPS_CACHE", str(tmp_path / "cache"))
    with pytest.raises(InputError, match="There are no task files: give a checkout"):
        sources.resolve_super_ni("")
    cached = write_tasks(sources.cached_super_ni_path(), SIZES)
    with pytest.raises(InputError, match="is incomplete: delete it and run `mops-fl fetch --super-ni`"):
        sources.resolve_super_ni("")
    (cached / sources.RECEIPT).write_text("{}")
    found = sources.resolve_super_ni("")
    assert (found.path, found.revision) == (cached, sources.SUPER_NI_REVISION)
    monkeypatch.setenv("MOPS_SUPER_NI", str(tmp_path))
    assert sources.resolve_super_ni("").path == tmp_path
    chosen = sources.resolve_super_ni(str(folder))
    assert (chosen.path, chosen.revision, chosen.description) == (folder, None, "task files of mine (data-path)")


def test_named_folder_must_be_one(folder, monkeypatch):
    with pytest.raises(InputError, match=r"data-path names .*, which is no folder"):
        sources.resolve_super_ni(str(folder / "tasks/task01_add.json"))
    monkeypatch.setenv("MOPS_SUPER_NI", str(folder / "absent"))
    with pytest.raises(InputError, match=r"MOPS_SUPER_NI names .*absent, which is no folder"):
        sources.resolve_super_ni("")
