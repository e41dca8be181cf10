import gzip
import json
from collections import Counter
from dataclasses import replace

import pytest

from mops_fl.data import DOLLY_TASKS, Row, TaskData, apportion, draw_parts, load_task_data, read_dolly
from mops_fl.errors import InputError

TASKS = ("a", "b", "c")
GOOD = {"instruction": "Say red.", "context": "", "response": "red", "category": "open_qa"}


def write_lines(path, *lines):
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def rows_of(**sizes):
    """So many rows of each task, the tasks mixed."""
    tasks = [task for i in range(max(sizes.values())) for task, size in sizes.items() if i < size]
    return [Row(i, f"question {i}", "", f"answer {i}", task) for i, task in enumerate(tasks)]


def counts(rows):
    return Counter(row.task for row in rows)


# Reading


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_rows_are_read_from_plain_and_compressed_lines(name, tmp_path):
    second = {"instruction": " Groß? ", "context": "\ntext ", "response": "ja\n", "category": "closed_qa"}
    path = write_lines(tmp_path / name, GOOD, second)
    assert list(read_dolly(path)) == [
        Row(0, "Say red.", "", "red", "open_qa"),
        Row(1, "Groß?", "text", "ja", "closed_qa"),
    ]


def test_exact_duplicates_are_dropped_and_near_ones_kept(tmp_path):
    others = [{**GOOD, key: "other"} for key in ("instruction", "context", "response")]
    spaced = {**GOOD, "response": "red "}
    rows = list(read_dolly(write_lines(tmp_path / "rows.jsonl", GOOD, *others, GOOD, spaced)))
    assert [row.row_id for row in rows] == [0, 1, 2, 3]


def test_eighth_task_is_skipped_even_where_it_is_incomplete(tmp_path):
    general = {**GOOD, "category": "general_qa", "response": ""}
    rows = list(read_dolly(write_lines(tmp_path / "rows.jsonl", general, GOOD)))
    assert [(row.row_id, row.task) for row in rows] == [(1, "open_qa")]


BAD_LINES = {
    "no JSON": ("{'instruction': 1}", "not a JSON object"),
    "cut off": (json.dumps(GOOD)[:-5], "not a JSON object"),
    "a list": ([1, 2], "not a JSON object"),
    "missing column": ({key: GOOD[key] for key in ("instruction", "context", "response")}, "category"),
    "a number as text": ({**GOOD, "context": 3}, "not a JSON object with the texts"),
    "null as text": ({**GOOD, "context": None}, "not a JSON object with the texts"),
    "no response": ({**GOOD, "response": " "}, "has no response"),
    "no instruction": ({**GOOD, "instruction": ""}, "has no instruction"),
    "half a character": (json.dumps({**GOOD, "context": "\ud83d"}), "has half a character"),
    "unknown task": ({**GOOD, "category": "poetry"}, "unknown task 'poetry'"),
}


@pytest.mark.parametrize(("line", "reason"), BAD_LINES.values(), ids=BAD_LINES)
def test_bad_line_is_refused_with_file_and_line(line, reason, tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", GOOD, {**GOOD, "response": "blue"}, line, GOOD)
    with pytest.raises(InputError) as error:
        list(read_dolly(path))
    assert str(error.value).startswith(f"Line 3 of {path}")
    assert reason in str(error.value)


def test_mark_of_byte_order_and_blank_lines_are_no_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\ufeff" + json.dumps(GOOD) + "\n\n" + json.dumps({**GOOD, "response": "blue"}) + "\n\n", "utf-8")
    assert [row.row_id for row in read_dolly(path)] == [0, 2]


def cut_in_half(content):
    return content[: len(content) // 2]


def not_compressed(_):
    return json.dumps(GOOD).encode()


@pytest.mark.parametrize("damage", [cut_in_half, not_compressed], ids=lambda damage: damage.__name__)
def test_damaged_compressed_file_is_refused_by_name(damage, tmp_path):
    path = write_lines(tmp_path / "rows.jsonl.gz", *[{**GOOD, "response": str(i)} for i in range(500)])
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=r"rows\.jsonl\.gz cannot be read"):
        list(read_dolly(path))


def test_file_that_is_not_utf8_is_refused_by_name(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps({**GOOD, "response": "ü"}, ensure_ascii=False).encode("latin-1"))
    with pytest.raises(InputError, match=r"rows\.jsonl cannot be read"):
        list(read_dolly(path))


# Drawing


@pytest.mark.parametrize(
    ("total", "sizes", "shares"),
    [
        (10, [1, 1], [5, 5]),
        (10, [5, 3, 2], [5, 3, 2]),
        (10, [1, 1, 1], [4, 3, 3]),  # 3.33 each: the first of equals
        (7, [10, 20, 30], [1, 2, 4]),  # 1.17, 2.33, 3.5: the half goes up
        (5, [6, 3, 2], [3, 1, 1]),  # 2.73, 1.36, 0.91: two are left, for .91 and .73
        (1, [1, 98, 1], [0, 1, 0]),
        (0, [4, 4], [0, 0]),
        (3, [3, 0], [3, 0]),
        (100, [33, 33, 34], [33, 33, 34]),
    ],
)
def test_apportion_is_largest_remainders(total, sizes, shares):
    assert apportion(total, sizes) == shares


@pytest.mark.parametrize("total", [0, 1, 17, 99, 500, 4999, 5000])
def test_apportion_adds_up_and_never_exceeds_what_is_there(total):
    sizes = [709, 1773, 3742, 1188, 1506, 2136, 1766]
    shares = apportion(total, sizes)
    assert sum(shares) == total
    assert all(abs(share - total * size / sum(sizes)) < 1 for share, size in zip(shares, sizes, strict=True))


def test_parts_have_the_sizes_asked_for_and_share_no_row(data_config):
    rows = rows_of(a=300, b=200, c=100)
    train, test, server = draw_parts(rows, TASKS, data_config(num_rows=200, server_rows=30))
    assert (len(train), len(test), len(server)) == (180, 20, 30)
    assert len({row.row_id for row in (*train, *test, *server)}) == 230


def test_train_and_test_have_the_tasks_in_the_datas_proportions_and_the_server_alike(data_config):
    rows = rows_of(a=300, b=200, c=100)
    train, test, server = draw_parts(rows, TASKS, data_config(num_rows=120, server_rows=32))
    assert counts(train) == {"a": 54, "b": 36, "c": 18}
    assert counts(test) == {"a": 6, "b": 4, "c": 2}
    assert counts(server) == {"a": 10, "b": 10, "c": 10}  # 32 over three tasks


def test_odd_sizes_add_up_exactly(data_config):
    rows = rows_of(a=97, b=61, c=31)
    train, test, _ = draw_parts(rows, TASKS, data_config(num_rows=101, test_fraction=0.17, server_rows=0))
    assert (len(train), len(test)) == (84, 17)  # 17.17 rounded


def test_server_rows_of_zero_leaves_the_server_without(data_config):
    assert draw_parts(rows_of(a=60, b=60, c=60), TASKS, data_config(server_rows=0))[2] == ()


@pytest.mark.parametrize(("sizes", "server_rows"), [({"a": 60, "b": 60, "c": 60}, 2), ({"a": 6, "b": 6, "c": 6}, 20)])
def test_server_rows_that_leave_none_of_each_task_are_refused(data_config, sizes, server_rows):
    with pytest.raises(InputError, match=f"`server-rows` is {server_rows}, .* leaves the server none of each"):
        draw_parts(rows_of(**sizes), TASKS, data_config(num_rows=200, server_rows=server_rows))


def test_draw_is_set_by_the_data_seed(data_config):
    rows = rows_of(a=300, b=200, c=100)
    first, same, other = (draw_parts(rows, TASKS, data_config(data_seed=seed)) for seed in (0, 0, 1))
    assert first == same
    for part, other_part in zip(first, other, strict=True):
        assert {row.row_id for row in part} != {row.row_id for row in other_part}


def test_draw_does_not_depend_on_how_tasks_follow_each_other_in_the_file(data_config):
    rows = rows_of(a=60, b=60, c=60)
    parts = [draw_parts(order, TASKS, data_config()) for order in (rows, sorted(rows, key=lambda row: row.task))]
    assert parts[0] == parts[1]


def test_small_set_is_used_whole_with_both_shares_shrunk_alike(data_config):
    rows = rows_of(a=60, b=60, c=60)  # 180 rows for 300 + 60: half of each
    train, test, server = draw_parts(rows, TASKS, data_config(num_rows=300, server_rows=60))
    assert (len(train), len(test), len(server)) == (135, 15, 30)


def test_small_sets_large_task_gives_the_server_no_more_than_its_shrunk_share(data_config):
    rows = rows_of(a=100, b=50, c=30)  # half of 60 over three tasks
    assert max(counts(draw_parts(rows, TASKS, data_config(num_rows=300, server_rows=60))[2]).values()) == 10


@pytest.mark.parametrize("size", [0, 1, 4, 8])
def test_task_with_too_few_rows_is_refused_by_name(size, data_config):
    rows = [*rows_of(a=300, c=300), *[Row(1000 + i, "q", "", "r", "b") for i in range(size)]]
    with pytest.raises(InputError, match=f"Task 'b' has {size} rows, too few"):
        draw_parts(rows, TASKS, data_config())


def test_loaded_without_a_file_of_ones_own_the_sample_says_so(data_config):
    data = load_task_data(data_config(num_rows=210, server_rows=35))
    assert data.is_sample
    assert "not Dolly itself" in data.description
    assert data.tasks == DOLLY_TASKS
    assert counts(data.test) == dict.fromkeys(DOLLY_TASKS, 3)
    assert counts(data.train) == dict.fromkeys(DOLLY_TASKS, 27)
    assert counts(data.server) == dict.fromkeys(DOLLY_TASKS, 5)


# Evaluation rows


@pytest.fixture
def task_data():
    rows = [*rows_of(a=6), *rows_of(b=4), *rows_of(c=2)]
    test = tuple(replace(row, row_id=row_id) for row_id, row in enumerate(rows))
    return TaskData(TASKS, (), test, (), (), "", is_sample=False)


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (3, {"a": 1, "b": 1, "c": 1}),
        (6, {"a": 2, "b": 2, "c": 2}),
        (8, {"a": 3, "b": 3, "c": 2}),  # c has no more
        (11, {"a": 5, "b": 4, "c": 2}),
        (0, {"a": 6, "b": 4, "c": 2}),
        (12, {"a": 6, "b": 4, "c": 2}),
        (99, {"a": 6, "b": 4, "c": 2}),
    ],
)
def test_evaluation_rows_are_spread_evenly_over_the_tasks(count, expected, task_data):
    rows = task_data.evaluation_rows(count)
    assert counts(rows) == expected
    assert len(set(rows)) == len(rows)


def test_fewer_evaluation_rows_are_among_the_more(task_data):
    assert set(task_data.evaluation_rows(4)) < set(task_data.evaluation_rows(7))


def test_gz_with_a_flipped_byte_is_refused_by_name(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl.gz", *[{**GOOD, "response": str(i)} for i in range(500)])
    whole = path.read_bytes()
    for position in range(20, len(whole), len(whole) // 30):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :])
        with pytest.raises(InputError, match=r"rows\.jsonl\.gz"):
            list(read_dolly(path))


# Held-out tasks


def test_held_out_tasks_are_tested_and_nobody_has_their_rows(data_config):
    whole = load_task_data(data_config(num_rows=210, server_rows=35))
    data = load_task_data(data_config(num_rows=210, server_rows=35, held_out_tasks="closed_qa, *_writing"))
    unseen = {"closed_qa", "creative_writing"}
    assert data.tasks[-2:] == ("closed_qa", "creative_writing")
    assert data.trained_tasks == tuple(task for task in whole.tasks if task not in unseen) == data.tasks[:5]
    assert data.test == whole.test
    assert data.train == tuple(row for row in whole.train if row.task not in unseen)
    assert data.server == tuple(row for row in whole.server if row.task not in unseen)
    assert set(data.held_out) == {row for row in whole.train + whole.server if row.task in unseen}
    assert data.description.endswith(", held out from training: closed_qa, creative_writing")


def test_holding_out_nothing_leaves_everything_as_it_is(data_config):
    data = load_task_data(data_config(num_rows=210))
    assert data.held_out == ()
    assert data.trained_tasks == data.tasks


@pytest.mark.parametrize(
    ("wanted", "complaint"),
    [("*", "names every task"), ("poetry", "`held-out-tasks` names 'poetry', but there is no such task")],
)
def test_bad_held_out_tasks_are_refused(wanted, complaint, data_config):
    with pytest.raises(InputError, match=complaint.replace("*", r"\*")):
        load_task_data(data_config(num_rows=210, held_out_tasks=wanted))
