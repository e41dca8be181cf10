"""Which tasks of a data set take part, by the names and patterns of the run-config's `tasks`."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from mops_fl.errors import InputError

WILDCARDS = frozenset("*?[")
SHOWN = 7


def choose_tasks(wanted: str, available: Sequence[str], place: str, key: str = "tasks") -> tuple[str, ...]:
    """The tasks that `wanted` names, in its order, each once.

    Args:
        wanted: comma-separated. A word is a task's name or its first parts (`task001` is
            `task001_quoref_question_generation`) and means one task; with `*`, `?` or `[...]` it means every task
            that it matches.
        available: names of the tasks there are.
        place: where they are, for messages.
        key: of the run-config that `wanted` is the value of, for messages.

    Returns:
        The chosen names; empty if `wanted` names nothing.

    Raises:
        InputError: a word means no task, or a word without wildcard several.
    """
    words = [word.strip() for word in wanted.split(",") if word.strip()]
    return tuple(dict.fromkeys(task for word in words for task in _matching(word, available, place, key)))


def present_tasks(wanted: str, available: Sequence[str]) -> tuple[str, ...]:
    """Of the tasks there are, those that `wanted` means, as `choose_tasks`; that some are not there is no error."""
    words = [word.strip() for word in wanted.split(",") if word.strip()]
    return tuple(task for task in available if any(_means(word, task) for word in words))


def _means(word: str, task: str) -> bool:
    return fnmatchcase(task, word) if WILDCARDS & set(word) else task == word or task.startswith(f"{word}_")


def list_tasks(tasks: Sequence[str]) -> str:
    """The names for a sentence; of many, the first ones."""
    left_out = len(tasks) - SHOWN
    return ", ".join(tasks) if left_out <= 1 else f"{', '.join(tasks[:SHOWN])} and {left_out} more"


def _matching(word: str, available: Sequence[str], place: str, key: str) -> list[str]:
    found = [task for task in available if _means(word, task)]
    if word in found:
        return [word]
    if not found:
        raise InputError(f"`{key}` names {word!r}, but there is no such task in {place}: {list_tasks(available)}.")
    if len(found) > 1 and not WILDCARDS & set(word):
        raise InputError(
            f"`{key}` names {word!r}, which may be {list_tasks(found)}; write the name in full, "
            f"or {word + '_*'!r} for all of them."
        )
    return found
