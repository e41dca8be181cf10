"""Task files in the schema of Super-Natural Instructions (`tasks/task*.json` of allenai/natural-instructions).

A file is one task: its `Definition` says what is asked, its `Instances` are inputs, each with the outputs that count
as right. The other fields are not read.
"""

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mops_fl.errors import InputError
from mops_fl.task_choice import list_tasks

# The paper's seven by their official names. Deviation: the paper calls the last one task697, which in the official
# numbering is `formal_logic`, and it gives `conala` as the source of `add_integer_to_list`, which is a synthetic task
# there; we go by what the tasks are called.
PAPER_TASKS = (
    "task001_quoref_question_generation",
    "task026_drop_question_generation",
    "task044_essential_terms_identifying_essential_words",
    "task1190_add_integer_to_list",
    "task1429_evalution_semantic_relation_classification",
    "task1703_ljspeech_textmodification",
    "task698_mmmlu_answer_generation_global_facts",
)

# In a folder with more files than this nobody means all of them by saying nothing.
MOST_UNNAMED = 50

_SCHEMA = "give a task file as in allenai/natural-instructions"


@dataclass(frozen=True)
class Instance:
    """One input of a task.

    Attributes:
        text: the input; may be empty where the definition says it all.
        references: the outputs that count as right, at least one, all different.
    """

    text: str
    references: tuple[str, ...]


@dataclass(frozen=True)
class TaskFile:
    """What is read of a task file.

    Attributes:
        name: the file's name without `.json`.
        definition: what is asked of every instance.
        instances: at least one.
    """

    name: str
    definition: str
    instances: tuple[Instance, ...]


def find_task_files(folder: Path) -> dict[str, Path]:
    """The files `task*.json` of a folder, or of `tasks/` in it as in a checkout, by task name and in its order.

    Raises:
        InputError: there are none.
    """
    for place in (folder / "tasks", folder):
        if files := {path.stem: path for path in sorted(place.glob("task*.json")) if path.is_file()}:
            return files
    raise InputError(
        f"{folder} has no task*.json, nor has tasks/ in it; give a checkout of allenai/natural-instructions or a "
        "folder of its task files."
    )


def default_tasks(available: Collection[str], folder: Path) -> tuple[str, ...]:
    """The tasks that are used if none are named: the paper's seven if all are there, else every one there is.

    Raises:
        InputError: they are not all there, and those that are, are too many to be meant.
    """
    if set(PAPER_TASKS) <= set(available):
        return PAPER_TASKS
    if len(available) > MOST_UNNAMED:
        missing = [task for task in PAPER_TASKS if task not in available]
        raise InputError(
            f"{folder} has {len(available)} task files, but of the paper's seven not {list_tasks(missing)}; "
            "name those to be used in `tasks`."
        )
    return tuple(available)


def read_task_file(path: Path) -> TaskFile:
    """Read one task.

    A definition that is a list (newer files) holds wordings of the same; the first one is taken.

    Raises:
        InputError: the file cannot be read or is not of the schema; the message names it, and the instance.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:  # broken JSON and broken UTF-8 are both ValueErrors
        raise InputError(f"{path} cannot be read ({error}); fetch or copy it again.") from error
    fields: dict[str, Any] = content if isinstance(content, dict) else {}
    definition = fields.get("Definition")
    if isinstance(definition, list) and definition:
        definition = definition[0]
    if not isinstance(definition, str) or not definition.strip():
        raise InputError(f"{path} has no text as `Definition`; {_SCHEMA}.")
    require_characters(path, definition)
    instances = fields.get("Instances")
    if not isinstance(instances, list) or not instances:
        raise InputError(f"{path} has no list of `Instances`; {_SCHEMA}.")
    parsed = (_parse_instance(instance, number, path) for number, instance in enumerate(instances, start=1))
    return TaskFile(path.stem, definition.strip(), tuple(parsed))


def require_characters(where: object, *texts: str) -> None:
    """Refuse what JSON can name but no tokenizer reads: half of a pair of surrogates, as left by a cut in an emoji.

    Raises:
        InputError: a text cannot be written in UTF-8.
    """
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where} has half a character (a lone surrogate); correct or remove it.") from error


def _parse_instance(content: object, number: int, path: Path) -> Instance:
    where = f"Instance {number} of {path}"
    fields = content if isinstance(content, dict) else {}
    text, outputs = fields.get("input"), fields.get("output")
    if not isinstance(text, str):
        raise InputError(f"{where} has no text as `input`; correct or remove it.")
    if not isinstance(outputs, list) or not all(isinstance(output, str) for output in outputs):
        raise InputError(f"{where} has no list of texts as `output`; correct or remove it.")
    if not outputs or not all(output.strip() for output in outputs):
        raise InputError(f"{where} has an empty `output`; correct or remove it.")
    require_characters(where, text, *outputs)
    return Instance(text.strip(), tuple(dict.fromkeys(output.strip() for output in outputs)))
