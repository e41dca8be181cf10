import pytest

from mops_fl.errors import InputError
from mops_fl.task_choice import choose_tasks, list_tasks

TASKS = ("task001_quoref_question", "task001_quoref_answer", "task0012_other", "task073_sciq", "task100")


@pytest.mark.parametrize(
    ("wanted", "chosen"),
    [
        ("", ()),
        (" , ,", ()),
        ("task073_sciq", ("task073_sciq",)),
        ("task073", ("task073_sciq",)),
        ("task100", ("task100",)),
        ("task0012", ("task0012_other",)),
        ("task001_quoref_a*", ("task001_quoref_answer",)),
        ("task001_*", ("task001_quoref_question", "task001_quoref_answer")),
        ("*sciq, task001_quoref_answer ", ("task073_sciq", "task001_quoref_answer")),  # the order asked for
        ("task073, *sciq,task073", ("task073_sciq",)),
        ("task?00", ("task100",)),
        ("task[!01]*,task1*", None),
        ("*", TASKS),
    ],
)
def test_words_name_one_task_and_patterns_all_that_match(wanted, chosen):
    if chosen is None:
        with pytest.raises(InputError, match=r"names 'task\[!01\]\*', but there is no such task"):
            choose_tasks(wanted, TASKS, "here")
    else:
        assert choose_tasks(wanted, TASKS, "here") == chosen


@pytest.mark.parametrize("wanted", ["task00", "quoref", "TASK073", "sciq", "task073_", "task073, task9*"])
def test_word_that_is_no_task_is_refused_with_those_there_are(wanted):
    with pytest.raises(InputError) as refusal:
        choose_tasks(wanted, TASKS, "some/folder")
    word = wanted.split(", ")[-1]
    assert str(refusal.value) == (
        f"`tasks` names {word!r}, but there is no such task in some/folder: {', '.join(TASKS)}."
    )


def test_word_that_may_be_several_tasks_is_refused_with_them():
    with pytest.raises(InputError) as refusal:
        choose_tasks("task073,task001", TASKS, "here")
    assert str(refusal.value) == (
        "`tasks` names 'task001', which may be task001_quoref_question, task001_quoref_answer; "
        "write the name in full, or 'task001_*' for all of them."
    )


def test_many_tasks_are_listed_by_the_first_ones():
    assert list_tasks(list("abcdefgh")) == "a, b, c, d, e, f, g, h"
    assert list_tasks(list("abcdefghi")) == "a, b, c, d, e, f, g and 2 more"
