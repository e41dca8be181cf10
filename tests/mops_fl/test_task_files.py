import json

import pytest

from mops_fl.errors import InputError
from mops_fl.task_files import (
    MOST_UNNAMED,
    PAPER_TASKS,
    Instance,
    default_tasks,
    find_task_files,
    read_task_file,
)

INSTANCE = {"id": "task001-1", "input": "Passage: red.", "output": ["red"]}
TASK = {
    "Contributors": ["someone"],
    "Definition": ["Name the colour."],
    "Positive Examples": [{"input": "Passage: blue.", "output": "blue", "explanation": "It says so."}],
    "Negative Examples": [],
    "Instances": [INSTANCE],
}


@pytest.fixture
def write(tmp_path):
    def make(content, name="task001_colour.json"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path

    return make


# One file


@pytest.mark.parametrize(
    "definition", [["Name the colour."], "Name the colour.", [" Name the colour.\n", "Which colour?"]]
)
def test_definition_may_be_a_text_or_a_list_whose_first_is_taken(definition, write):
    task = read_task_file(write({**TASK, "Definition": definition}))
    assert (task.name, task.definition) == ("task001_colour", "Name the colour.")


def test_instances_keep_all_their_references_in_order_and_each_once(write):
    instances = [
        {"id": "a", "input": " Größe? \n", "output": [" groß", "weit ", "groß", "hoch"]},
        {"input": "", "output": ["yes"]},
    ]
    task = read_task_file(write(json.dumps({**TASK, "Instances": instances}, ensure_ascii=False)))
    assert task.instances == (Instance("Größe?", ("groß", "weit", "hoch")), Instance("", ("yes",)))


def without(*keys):
    return {key: value for key, value in TASK.items() if key not in keys}


BAD_FILES = {
    "no JSON": ("{'Definition': 1}", "cannot be read"),
    "cut off": (json.dumps(TASK)[:-7], "cannot be read"),
    "empty": ("", "cannot be read"),
    "a list": ([TASK], "no text as `Definition`"),
    "no definition": (without("Definition"), "no text as `Definition`"),
    "empty definition": ({**TASK, "Definition": [" "]}, "no text as `Definition`"),
    "empty list of definitions": ({**TASK, "Definition": []}, "no text as `Definition`"),
    "number as definition": ({**TASK, "Definition": [3]}, "no text as `Definition`"),
    "no instances": (without("Instances"), "no list of `Instances`"),
    "empty instances": ({**TASK, "Instances": []}, "no list of `Instances`"),
    "instances by name": ({**TASK, "Instances": {"a": INSTANCE}}, "no list of `Instances`"),
}


@pytest.mark.parametrize(("content", "reason"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_file_is_refused_by_name(content, reason, write):
    path = write(content)
    with pytest.raises(InputError) as refusal:
        read_task_file(path)
    assert str(refusal.value).startswith(f"{path} ")
    assert reason in str(refusal.value)


BAD_INSTANCES = {
    "half a character": ({**INSTANCE, "input": "\ud83d"}, "half a character (a lone surrogate)"),
    "no input": ({"output": ["red"]}, "no text as `input`"),
    "number as input": ({**INSTANCE, "input": 3}, "no text as `input`"),
    "a text": ("red", "no text as `input`"),
    "no output": ({"input": "x"}, "no list of texts as `output`"),
    "text as output": ({**INSTANCE, "output": "red"}, "no list of texts as `output`"),
    "number in output": ({**INSTANCE, "output": ["red", 3]}, "no list of texts as `output`"),
    "null in output": ({**INSTANCE, "output": [None]}, "no list of texts as `output`"),
    "empty output": ({**INSTANCE, "output": []}, "an empty `output`"),
    "blank output": ({**INSTANCE, "output": ["red", " "]}, "an empty `output`"),
}


@pytest.mark.parametrize(("instance", "reason"), BAD_INSTANCES.values(), ids=BAD_INSTANCES)
def test_bad_instance_is_refused_with_file_and_number(instance, reason, write):
    path = write({**TASK, "Instances": [INSTANCE, instance, INSTANCE]})
    with pytest.raises(InputError) as refusal:
        read_task_file(path)
    assert str(refusal.value) == f"Instance 2 of {path} has {reason}; correct or remove it."


def test_file_that_is_not_utf8_is_refused_by_name(write):
    path = write(TASK)
    path.write_bytes(json.dumps({**TASK, "Definition": "ü"}, ensure_ascii=False).encode("latin-1"))
    with pytest.raises(InputError, match=r"task001_colour\.json cannot be read"):
        read_task_file(path)


# A folder


@pytest.mark.parametrize("place", ["", "tasks/"])
def test_files_are_found_in_the_folder_or_in_tasks_in_it_in_the_order_of_their_names(place, write, tmp_path):
    for name in ("task10_b.json", "task02_a.json", "README.md", "splits.json", "task03.jsonl"):
        write(TASK, f"{place}{name}")
    found = find_task_files(tmp_path)
    assert list(found) == ["task02_a", "task10_b"]
    assert found["task02_a"] == tmp_path / place / "task02_a.json"


def test_checkouts_own_files_beside_tasks_are_not_taken(write, tmp_path):
    write(TASK, "tasks/task001_a.json")
    write(TASK, "task999_draft.json")
    assert list(find_task_files(tmp_path)) == ["task001_a"]


def test_folder_without_task_files_is_refused(write, tmp_path):
    write(TASK, "other.json")
    with pytest.raises(InputError, match=r"has no task\*\.json, nor has tasks/ in it"):
        find_task_files(tmp_path)


def test_papers_seven_are_taken_out_of_a_whole_checkout_in_the_papers_order(tmp_path):
    checkout = sorted([*PAPER_TASKS, *[f"task{number}_other" for number in range(2000, 3600)]])
    assert default_tasks(checkout, tmp_path) == PAPER_TASKS
    assert len(set(PAPER_TASKS)) == 7


def test_small_folder_of_other_tasks_is_used_whole(tmp_path):
    others = [f"task{number}_other" for number in range(MOST_UNNAMED - 6)]
    assert default_tasks([*others, *PAPER_TASKS[:6]], tmp_path) == (*others, *PAPER_TASKS[:6])


def test_checkout_that_lacks_one_of_the_seven_is_not_used_whole(tmp_path):
    others = [f"task{number}_other" for number in range(MOST_UNNAMED)]
    with pytest.raises(InputError) as refusal:
        default_tasks([*others, *PAPER_TASKS[1:]], tmp_path)
    assert str(refusal.value) == (
        f"{tmp_path} has {MOST_UNNAMED + 6} task files, but of the paper's seven not {PAPER_TASKS[0]}; "
        "name those to be used in `tasks`."
    )
